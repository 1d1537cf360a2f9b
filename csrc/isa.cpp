#include "isa.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace cfsfl {
namespace {

#if defined(__x86_64__)
constexpr unsigned both = 0x8040;  // flush results, read denormals as zero
#endif

std::vector<const Kernels*> found() {
    std::vector<const Kernels*> tables = {&plain_kernels};
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
        tables.push_back(&avx2_kernels);
        if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
            tables.push_back(&avx512_kernels);
    }
#endif
    return tables;
}

const Kernels* named(const std::string& name) {
    const auto tables = found();
    if (name.empty() || name == "auto") return tables.back();
    std::string list;
    for (const Kernels* t : tables) {
        if (name == t->name) return t;
        list += std::string(list.empty() ? "" : ", ") + t->name;
    }
    throw std::invalid_argument("this processor runs " + list + "; got '" + name + "'");
}

std::atomic<const Kernels*>& chosen() {
    static std::atomic<const Kernels*> table{[] {
        const char* name = std::getenv("CFSFL_ISA");
        return named(name ? name : "");
    }()};
    return table;
}

std::atomic<bool>& screen() {
    static std::atomic<bool> on{[] {
        const char* value = std::getenv("CFSFL_SCREENING");
        return !value || std::string(value) != "0";
    }()};
    return on;
}

}  // namespace

const Kernels& kernels() { return *chosen().load(); }

std::vector<std::string> supported_isas() {
    std::vector<std::string> names;
    for (const Kernels* t : found()) names.push_back(t->name);
    return names;
}

std::string set_isa(const std::string& name) { return chosen().exchange(named(name))->name; }

bool coarse_available() {
#if defined(__x86_64__)
    return kernels().coarse_block && __builtin_cpu_supports("avx512vnni");
#else
    return false;
#endif
}

bool screening() { return screen().load() && coarse_available(); }
bool set_screening(bool on) { return screen().exchange(on); }

bool flush_denormals_here(bool on) {
#if defined(__x86_64__)
    const unsigned old = _mm_getcsr();
    _mm_setcsr(on ? old | both : old & ~both);
    return (old & both) == both;
#else
    (void)on;
    return false;
#endif
}

bool denormals_flushed_here() {
#if defined(__x86_64__)
    return (_mm_getcsr() & both) == both;
#else
    return false;
#endif
}

// What the pool's threads were last told, and how many of them; new ones start as their creator is.
static std::atomic<int> pool_flushes{-1}, pool_threads{0};

bool flush_denormals_everywhere(bool on, int threads) {
    const bool old = flush_denormals_here(on);
#pragma omp parallel num_threads(threads)
    flush_denormals_here(on);
    pool_flushes = on;
    pool_threads = threads;
    return old;
}

void follow_caller(int threads) {
    const bool on = denormals_flushed_here();
    if (pool_flushes != (int)on || threads > pool_threads) flush_denormals_everywhere(on, threads);
}

}  // namespace cfsfl
