// Lists of the best scores: a growing shortlist under a rising floor, and the one total order that ends every search.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#include "kernels.h"

namespace cfsfl {

constexpr float INF = std::numeric_limits<float>::infinity();

template <class T>
using Array = std::unique_ptr<T[]>;

// Uninitialised memory: its pages are touched by whoever fills it.
template <class T>
Array<T> array(int64_t n) {
    return Array<T>(new T[n > 0 ? n : 1]);
}

// Floats in order as integers; -0 just below 0.
inline int32_t to_order(float x) {
    int32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits ^ ((bits >> 31) & 0x7fffffff);
}
inline float from_order(int32_t bits) {
    bits ^= (bits >> 31) & 0x7fffffff;
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

// Greater key = better item: score descending, then id ascending. -0 counts as 0.
inline uint64_t to_key(float score, int32_t id) {
    return (uint64_t)((uint32_t)to_order(score + 0.0f) ^ 0x80000000u) << 32 | (0xffffffffu - (uint32_t)id);
}
inline float key_score(uint64_t key) { return from_order((int32_t)((uint32_t)(key >> 32) ^ 0x80000000u)); }
inline int32_t key_id(uint64_t key) { return (int32_t)(0xffffffffu - (uint32_t)key); }

// A value t with at least K of the values >= t, and no more than K + slack of them unless t itself repeats.
inline float cut(const Kernels& kernels, const float* values, int n, int K, int slack, int* count) {
    float least = values[0], most = values[0];
    for (int i = 1; i < n; ++i) {
        least = values[i] < least ? values[i] : least;
        most = values[i] > most ? values[i] : most;
    }
    int64_t lo = to_order(least), hi = to_order(most);
    int at_lo = n;
    while (at_lo > K + slack && lo < hi) {
        const int64_t middle = lo + (hi - lo + 1) / 2;
        const int c = kernels.count_ge(values, n, from_order((int32_t)middle));
        if (c >= K) {
            lo = middle;
            at_lo = c;
        } else {
            hi = middle - 1;
        }
    }
    *count = at_lo;
    return from_order((int32_t)lo);
}

// Candidates of one user in the order of their ids. Everything that was turned away or dropped is <= floor, and an
// equal one had a greater id than K candidates that are here.
struct Shortlist {
    float* values = nullptr;
    int32_t* ids = nullptr;
    int n = 0;
    float floor = -INF;

    // Room for `capacity` and one more block.
    static int64_t room(int capacity) { return capacity + BLOCK_M + LANES; }

    void add(const Kernels& kernels, const float* s, int count, int32_t first, int K, int capacity) {
        n += kernels.filter(values + n, ids + n, s, count, first, floor);
        if (n > capacity) shrink(kernels, K, (capacity - K) / 4);
    }

    // Drops all but K to K + slack candidates.
    void shrink(const Kernels& kernels, int K, int slack) {
        if (n <= K + slack) return;
        if (K == 0) {
            floor = INF;
            n = 0;
            return;
        }
        int count;
        const float t = cut(kernels, values, n, K, slack, &count);
        if (t > floor) floor = t;
        if (count <= K + slack) {
            n = kernels.keep_ge(values, ids, n, t);
            return;
        }
        // More than slack of them are equal to t: the first ones stay.
        int above = 0;
        for (int i = 0; i < n; ++i) above += values[i] > t;
        int equal = K - above, kept = 0;
        for (int i = 0; i < n; ++i)
            if (values[i] > t || (values[i] == t && equal-- > 0)) {
                values[kept] = values[i];
                ids[kept++] = ids[i];
            }
        n = kept;
    }
};

// The K best of n pairs, in order, padded. -inf and NaN are no candidates. Returns the last place's score.
inline float best(int64_t* ids_out, float* scores_out, const float* values, const int32_t* ids, int n, int K,
                  std::vector<uint64_t>& keys) {
    keys.clear();
    for (int i = 0; i < n; ++i)
        if (values[i] > -INF) keys.push_back(to_key(values[i], ids[i]));
    const int found = std::min((int)keys.size(), K);
    if ((int)keys.size() > 2 * K) std::nth_element(keys.begin(), keys.begin() + K, keys.end(), std::greater<>());
    const auto end = (int)keys.size() > 2 * K ? keys.begin() + K : keys.end();
    std::sort(keys.begin(), end, std::greater<>());
    for (int k = 0; k < found; ++k) {
        ids_out[k] = key_id(keys[k]);
        scores_out[k] = key_score(keys[k]);
    }
    for (int k = found; k < K; ++k) {
        ids_out[k] = -1;
        scores_out[k] = -INF;
    }
    return K ? scores_out[K - 1] : INF;
}

}  // namespace cfsfl
