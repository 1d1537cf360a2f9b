// Exact lists of the K best scores: the full search, the screened one, and what a loop remembers.
#pragma once

#include <cstdint>
#include <vector>

#include "lists.h"
#include "problem.h"

namespace cfsfl {

// Where a row's list goes.
struct Lists {
    int64_t* ids;  // [B, K]
    float* scores;
    int K;
};

// Candidates of every row with an upper bound of each one's score, and one bound for all the items that are not here.
struct Candidates {
    int64_t rows = 0;
    int size = 0, room = 0;
    Array<float> upper;       // [rows, room]
    Array<int32_t> ids;       // [rows, room]
    std::vector<int> n;       // [rows]
    std::vector<float> rest;  // [rows]

    Candidates() = default;
    Candidates(int64_t rows_, int size_)
        : rows(rows_),
          size(size_),
          room(size_ + size_ / 4 + LANES),
          upper(array<float>(rows_ * room)),
          ids(array<int32_t>(rows_ * room)),
          n(rows_, 0),
          rest(rows_, INF) {}
};

// How many rows each way answered; for tests and benches.
struct Counts {
    int64_t repeated = 0, refined = 0, screened = 0, full = 0;
};

// The rows of a problem that a search is for, their codes lying together.
struct Rows {
    Problem p;           // B = how many
    const int64_t* row;  // their places in the whole problem, null for all
    Array<float> gathered;

    explicit Rows(const Problem& whole) : p(whole), row(nullptr) {}
    Rows(const Problem& whole, const std::vector<int64_t>& chosen);
    int64_t of(int64_t b) const { return row ? row[b] : b; }
};

// Every score computed. Lists of `out`; with `keep` also the candidates (their scores exact).
void full_search(const Rows& rows, Lists out, Candidates* keep);

// coarse.cpp: 8-bit codes of items, as many as fit a fixed budget at a time.
struct ItemCodes {
    int64_t first = -1, last = -1;  // the items that are coded now
    Array<int8_t> q;
    std::vector<float> scale, norm, error, bias;
    std::vector<int32_t> offset;

    // Codes items from..to, by all threads of a team that calls it together.
    void code(const Kernels& kernels, const Problem& p, int64_t from, int64_t to);
    void reserve(const Problem& p, int64_t items);
};

// coarse.cpp: candidates by integer upper bounds.
void coarse_search(const Rows& rows, Candidates& keep, ItemCodes& codes);

// Looks again at one row's candidates until the list is proved: false where the bound on the rest forbids it.
// Leaves exact scores in `upper` where it computed them.
struct Refiner {
    std::vector<uint64_t> keys;
    std::vector<float> scores;
    std::vector<int32_t> ids;
    bool refine(const Kernels& kernels, const Problem& p, const float* u, float* upper, int32_t* items, int n,
                float rest, int64_t* ids_out, float* scores_out, int K);
};

// The lists of all rows, screened where that pays. `keep` (optional): its rows are those of the whole problem.
void search(const Problem& p, const std::vector<int64_t>* chosen, Lists out, Candidates* keep, ItemCodes& codes,
            Counts& counts);

// What the steps of one loop know of each other: see loop_state.cpp.
class LoopState {
 public:
    void topk(const Problem& p, Lists out);
    Counts counts;

 private:
    bool fits(const Problem& p) const;
    void start(const Problem& p, Lists out);
    bool advance(const Kernels& kernels, const Problem& p, int64_t b, Refiner& refiner, Lists out);

    const float *weight_ = nullptr, *bias_ = nullptr;
    int64_t B_ = -1, M_ = 0, H_ = 0;
    int K_ = 0;
    bool bounded_ = false;  // whether candidates are still kept
    float largest_norm_ = 0;
    std::vector<float> norms_;  // [M] upper bounds of || w_j ||
    Candidates kept_;
    ItemCodes codes_;
    Array<float> u_;  // [B, H] the last step's codes
    std::vector<float> u_norm_;
    std::vector<int64_t> ids_;  // [B, K] the last step's lists
    std::vector<float> scores_;
};

}  // namespace cfsfl
