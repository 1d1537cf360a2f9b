// The module cfsfl_fast._cpp. Tensors come as addresses; cfsfl_fast/cpp.py checks them and keeps them alive.
#include <omp.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>

#include "isa.h"
#include "ops.h"

namespace py = pybind11;
using namespace cfsfl;

namespace {

using Address = uintptr_t;

template <class T>
T* at(Address a) {
    return reinterpret_cast<T*>(a);
}

using LayerAddresses = std::vector<std::tuple<Address, Address, int64_t, int64_t>>;

std::vector<Layer> layers(const LayerAddresses& from) {
    std::vector<Layer> all;
    for (const auto& [weight, bias, out, in] : from)
        all.push_back({at<const float>(weight), at<const float>(bias), in, out});
    return all;
}

Problem problem(Address u, Address weight, Address bias, int64_t B, int64_t M, int64_t H, Address exclude_items,
                Address exclude_offsets, int threads) {
    follow_caller(threads);
    if (M > INT32_MAX) throw std::invalid_argument("at most 2^31 - 1 items; got " + std::to_string(M));
    return {at<const float>(u),
            at<const float>(weight),
            at<const float>(bias),
            B,
            M,
            H,
            exclude_offsets ? at<const int64_t>(exclude_items) : nullptr,
            at<const int64_t>(exclude_offsets),
            threads};
}

}  // namespace

PYBIND11_MODULE(_cpp, m) {
    using release = py::call_guard<py::gil_scoped_release>;
    m.doc() = "C++ kernels of cfsfl_fast; call them through cfsfl_fast.cpp.";

    m.def("isa", [] { return std::string(kernels().name); }, "The instruction set in use.");
    m.def("supported_isas", &supported_isas, "Those that this processor runs, worst first.");
    m.def("set_isa", &set_isa, py::arg("name"), "Forces one of them, or \"auto\"; returns the one before.");
    m.def("screening", &screening, "Whether integer screening is used.");
    m.def("set_screening", &set_screening, py::arg("on"), "Allows or forbids it; returns the choice before.");
    m.def("flush_denormals", &flush_denormals_everywhere, py::arg("on"), py::arg("threads"), release(),
          "Flush-to-zero in every thread of the pool; returns what it was.");
    m.def(
        "check_rows",
        [](Address items, Address offsets, int64_t B, int64_t E, int64_t M, bool ascending, int threads) {
            check_rows(at<const int64_t>(items), at<const int64_t>(offsets), B, E, M, ascending, threads);
        },
        release());

    py::class_<LoopState>(m, "LoopState", "What the steps of one loop remember.")
        .def(py::init<>())
        .def_property_readonly("counts", [](const LoopState& s) {
            py::dict d;
            d["repeated"] = s.counts.repeated;
            d["refined"] = s.counts.refined;
            d["screened"] = s.counts.screened;
            d["full"] = s.counts.full;
            return d;
        });

    m.def(
        "linear_topk",
        [](Address ids, Address scores, int K, Address u, Address weight, Address bias, int64_t B, int64_t M, int64_t H,
           Address exclude_items, Address exclude_offsets, LoopState* state, int threads) {
            linear_topk(problem(u, weight, bias, B, M, H, exclude_items, exclude_offsets, threads),
                        {at<int64_t>(ids), at<float>(scores), K}, state);
        },
        release());
    m.def(
        "linear_nll",
        [](Address nll, Address lse, Address ids, Address scores, int K, Address kept, Address u, Address weight,
           Address bias, int64_t B, int64_t M, int64_t H, Address items, Address offsets, Address exclude_items,
           Address exclude_offsets, int threads) {
            linear_nll(problem(u, weight, bias, B, M, H, exclude_items, exclude_offsets, threads), at<float>(nll),
                       at<float>(lse), {at<int64_t>(ids), at<float>(scores), K}, at<const int64_t>(items),
                       at<const int64_t>(offsets), at<float>(kept));
        },
        release());
    m.def(
        "linear_nll_backward",
        [](Address ds, int64_t ld, Address dbias, Address dnll, Address lse, Address kept, int64_t first, int64_t last,
           Address u, Address weight, Address bias, int64_t B, int64_t M, int64_t H, Address items, Address offsets,
           Address exclude_items, Address exclude_offsets, int threads) {
            linear_nll_backward(problem(u, weight, bias, B, M, H, exclude_items, exclude_offsets, threads),
                                at<float>(ds), ld, at<float>(dbias), at<const float>(dnll), at<const float>(lse),
                                at<const int64_t>(items), at<const int64_t>(offsets), at<const float>(kept), first,
                                last);
        },
        release());
    m.def(
        "row_bag",
        [](Address out, Address table, Address items, Address offsets, Address weights, int64_t B, int64_t D, int64_t M,
           int threads) {
            follow_caller(threads);
            row_bag(at<float>(out), at<const float>(table), at<const int64_t>(items), at<const int64_t>(offsets),
                    at<const float>(weights), B, D, M, threads);
        },
        release());
    m.def(
        "row_bag_backward",
        [](Address dtable, Address dout, Address items, Address offsets, Address weights, int64_t B, int64_t D,
           int64_t M, int threads) {
            follow_caller(threads);
            row_bag_backward(at<float>(dtable), at<const float>(dout), at<const int64_t>(items),
                             at<const int64_t>(offsets), at<const float>(weights), B, D, M, threads);
        },
        release());
    m.def(
        "row_dot",
        [](Address out, Address x, Address table, Address ids, int64_t B, int64_t K, int64_t D, int threads) {
            follow_caller(threads);
            row_dot(at<float>(out), at<const float>(x), at<const float>(table), at<const int64_t>(ids), B, K, D,
                    threads);
        },
        release());
    m.def(
        "slim",
        [](Address columns, Address G, int64_t M, int64_t first, int64_t last, double l1, double l2, double tolerance,
           int passes, int threads) {
            follow_caller(threads);
            return slim(at<float>(columns), at<const float>(G), M, first, last, l1, l2, tolerance, passes, threads);
        },
        release());
    m.def(
        "fuse",
        [](Address h, Address w, Address hx, Address lookup, Address ids, Address scores, bool soft, int64_t B,
           int64_t K, int64_t D, int threads) {
            follow_caller(threads);
            fuse(at<float>(h), at<float>(w), at<const float>(hx), at<const float>(lookup), at<const int64_t>(ids),
                 at<const float>(scores), soft, B, K, D, threads);
        },
        release());
    m.def(
        "respond",
        [](Address v, Address logit, Address h, const LayerAddresses& reward, const LayerAddresses& feedback, int64_t B,
           int64_t D, int threads) {
            follow_caller(threads);
            respond(at<float>(v), at<float>(logit), at<const float>(h), layers(reward), layers(feedback), B, D,
                    threads);
        },
        release());
}
