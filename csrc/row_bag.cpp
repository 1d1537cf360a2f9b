// Sums of table rows that CSR rows name, and their gradient by item.
//
//     out_b = sum_{e in row b} weights_e table[items_e]                                                             (1)
//     dtable_j = sum_{e : items_e = j} weights_e dout[row of e]                                                     (2)
//
// Shapes    table [M, D], items [E] int64, offsets [B + 1] int64, weights [E] -> out [B, D].
// Traffic   E D + B D floats read and written, E D multiply-adds: bound by memory.
// Numerics  entries are added in their order, (2) by a stable counting sort: the same bits on any number of threads.
#include <omp.h>

#include <stdexcept>
#include <string>

#include "isa.h"
#include "ops.h"

namespace cfsfl {
void check_rows(const int64_t* items, const int64_t* offsets, int64_t B, int64_t E, int64_t M, bool ascending,
                int threads) {
    bool offsets_ascend = offsets[0] == 0 && offsets[B] == E;
    for (int64_t b = 0; b < B; ++b) offsets_ascend = offsets_ascend && offsets[b] <= offsets[b + 1];
    if (!offsets_ascend)
        throw std::invalid_argument("offsets must ascend from 0 to " + std::to_string(E) + ", the number of items");
    int64_t wrong = E;  // the first entry that is
#pragma omp parallel for schedule(static) num_threads(threads) reduction(min : wrong) if (E > 1 << 14)
    for (int64_t b = 0; b < B; ++b)
        for (int64_t e = offsets[b]; e < offsets[b + 1]; ++e)
            if (items[e] < 0 || items[e] >= M || (ascending && e > offsets[b] && items[e] <= items[e - 1])) {
                wrong = std::min(wrong, e);
                break;
            }
    if (wrong == E) return;
    const std::string item = std::to_string(items[wrong]);
    if (items[wrong] < 0 || items[wrong] >= M)
        throw std::invalid_argument("item ids must lie in 0.." + std::to_string(M - 1) + "; got " + item);
    throw std::invalid_argument("items must ascend without duplicates in a row; got " +
                                std::to_string(items[wrong - 1]) + " before " + item);
}

void row_bag(float* out, const float* table, const int64_t* items, const int64_t* offsets, const float* weights,
             int64_t B, int64_t D, int64_t M, int threads) {
    const Kernels& kernels = cfsfl::kernels();
#pragma omp parallel for schedule(dynamic, 4) num_threads(threads)
    for (int64_t b = 0; b < B; ++b) {
        const int64_t e = offsets[b];
        kernels.bag(out + b * D, nullptr, table, D, items + e, weights ? weights + e : nullptr, offsets[b + 1] - e);
    }
}

void row_bag_backward(float* dtable, const float* dout, const int64_t* items, const int64_t* offsets,
                      const float* weights, int64_t B, int64_t D, int64_t M, int threads) {
    const Kernels& kernels = cfsfl::kernels();
    const int64_t E = offsets[B];
    // The transposed matrix: where each item's entries begin, then row and weight of each, in entry order.
    std::vector<int64_t> start(M + 1, 0);
    for (int64_t e = 0; e < E; ++e) ++start[items[e] + 1];
    for (int64_t j = 0; j < M; ++j) start[j + 1] += start[j];
    Array<int64_t> rows = array<int64_t>(E);
    Array<float> w = array<float>(weights ? E : 0);
    std::vector<int64_t> next(start.begin(), start.end() - 1);
    for (int64_t b = 0; b < B; ++b)
        for (int64_t e = offsets[b]; e < offsets[b + 1]; ++e) {
            const int64_t place = next[items[e]]++;
            rows[place] = b;
            if (weights) w[place] = weights[e];
        }
    // A hot item's entries are summed in blocks, and the blocks' sums in order: errors grow with the block.
    constexpr int64_t block = 64;
#pragma omp parallel num_threads(threads)
    {
        const int64_t zero = 0;
        Array<float> part = array<float>(D);
#pragma omp for schedule(dynamic, 64)
        for (int64_t j = 0; j < M; ++j) {
            float* out = dtable + j * D;
            for (int64_t e = start[j]; e == start[j] || e < start[j + 1]; e += block) {
                const int64_t n = std::min(block, start[j + 1] - e);
                const bool first = e == start[j];
                kernels.bag(first ? out : part.get(), nullptr, dout, D, rows.get() + e, weights ? w.get() + e : nullptr,
                            n);
                if (!first) kernels.bag(out, out, part.get(), D, &zero, nullptr, 1);
            }
        }
    }
}

void row_dot(float* out, const float* x, const float* table, const int64_t* ids, int64_t B, int64_t K, int64_t D,
             int threads) {
    const Kernels& kernels = cfsfl::kernels();
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t b = 0; b < B; ++b)
        for (int64_t k = 0; k < K; ++k) {
            const int64_t j = ids[b * K + k];
            out[b * K + k] = j < 0 ? 0.0f : kernels.dot(x + b * D, table + j * D, (int)D);
        }
}

}  // namespace cfsfl
