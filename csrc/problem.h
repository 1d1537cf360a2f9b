// What the operations on scores share: the problem, its split into tasks, and the walk over its score tiles.
#pragma once

#include <algorithm>
#include <vector>

#include "kernels.h"
#include "lists.h"

namespace cfsfl {

// Scores s = u weight^T + bias with listed items left out.
struct Problem {
    const float *u, *weight, *bias;  // [B, H], [M, H], [M]
    int64_t B, M, H;
    const int64_t *exclude_items, *exclude_offsets;  // CSR, ascending in a row; null for none
    int threads;
};

// Items of a row that are left out, walked in ascending order.
struct Excluded {
    const int64_t *next = nullptr, *end = nullptr;

    Excluded() = default;
    Excluded(const Problem& p, int64_t row, int64_t first_item) {
        if (!p.exclude_items) return;
        end = p.exclude_items + p.exclude_offsets[row + 1];
        next = std::lower_bound(p.exclude_items + p.exclude_offsets[row], end, first_item);
    }

    // s[j] = -inf for the excluded among items first .. first + n - 1.
    void mask(float* s, int64_t first, int n) {
        for (; next < end && *next < first + n; ++next) s[*next - first] = -INF;
    }
};

// Items over which sums are taken before they are joined in order: never depends on how work is split.
constexpr int SEGMENT = 1024;

// Users in chunks of whole blocks, even to one block: few enough that their codes stay in the second-level cache.
struct Chunks {
    int64_t users, block, blocks, n;

    Chunks(int64_t users_, int64_t block_, int64_t most, int threads)
        : users(users_),
          block(block_),
          blocks((users_ + block_ - 1) / block_),
          n(std::min(blocks, threads * ((users_ + threads * most - 1) / (threads * most)))) {}
    int64_t begin(int64_t i) const { return std::min(users, blocks * i / n * block); }
    int64_t end(int64_t i) const { return begin(i + 1); }
    int64_t largest() const { return ((blocks + n - 1) / n) * block; }
};

// Tasks of a search: chunks of users, and ranges of items where there are too few users to occupy the threads.
struct Split {
    Chunks chunks;
    int64_t range, ranges, tasks;

    Split(int64_t B, int64_t M, int threads) : chunks(B, BLOCK_B, 132, threads) {
        const int64_t segments = std::max<int64_t>((M + SEGMENT - 1) / SEGMENT, 1);
        ranges = chunks.n >= threads ? 1 : std::min(segments, 2 * threads / std::max<int64_t>(chunks.n, 1));
        range = (segments + ranges - 1) / ranges * SEGMENT;
        ranges = std::max<int64_t>((M + range - 1) / range, 1);
        tasks = chunks.n * ranges;
    }
    int64_t begin(int64_t task) const { return chunks.begin(task / ranges); }
    int64_t end(int64_t task) const { return chunks.end(task / ranges); }
    int64_t part(int64_t task) const { return task % ranges; }
    int64_t first(int64_t task) const { return part(task) * range; }
};

// Calls sink(row, scores, first item, how many) for every block of items first .. last - 1 and every row begin .. end
// - 1. `row_of` names the row of the exclusion lists.
template <class RowOf, class Sink>
void for_tiles(const Kernels& kernels, const Problem& p, int64_t begin, int64_t end, int64_t first, int64_t last,
               RowOf row_of, Sink sink) {
    std::vector<Excluded> excluded;
    for (int64_t b = begin; b < end; ++b) excluded.emplace_back(p, row_of(b), first);
    alignas(64) float s[BLOCK_B * BLOCK_M];
    const int64_t blocks = (end - begin + BLOCK_B - 1) / BLOCK_B;
    for (int64_t j = first; j < last; j += BLOCK_M) {
        const int N = (int)std::min<int64_t>(BLOCK_M, last - j);
        const bool more = j + 2 * BLOCK_M <= last;
        const int64_t share = more ? BLOCK_M * p.H * 4 / blocks : 0;
        const char* ahead = (const char*)(p.weight + (more ? j + BLOCK_M : j) * p.H);
        for (int64_t b = begin; b < end; b += BLOCK_B, ahead += share) {
            const int R = (int)std::min<int64_t>(BLOCK_B, end - b);
            kernels.score_block(s, BLOCK_M, p.u + b * p.H, p.H, R, p.weight + j * p.H, N, p.bias + j, (int)p.H, ahead,
                                share);
            for (int r = 0; r < R; ++r) {
                excluded[b - begin + r].mask(s + r * BLOCK_M, j, N);
                sink(b + r, s + r * BLOCK_M, j, N);
            }
        }
    }
}

}  // namespace cfsfl
