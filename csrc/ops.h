// The operations as the bindings call them. Tensors are C-contiguous; sizes are the letters of reference.py.
#pragma once

#include <cstdint>

#include "linear_topk.h"

namespace cfsfl {

// row_bag.cpp
// Raises std::invalid_argument unless offsets ascend from 0 to E and every item is in range (and its row ascends).
void check_rows(const int64_t* items, const int64_t* offsets, int64_t B, int64_t E, int64_t M, bool ascending,
                int threads);
void row_bag(float* out, const float* table, const int64_t* items, const int64_t* offsets, const float* weights,
             int64_t B, int64_t D, int64_t M, int threads);
void row_bag_backward(float* dtable, const float* dout, const int64_t* items, const int64_t* offsets,
                      const float* weights, int64_t B, int64_t D, int64_t M, int threads);
void row_dot(float* out, const float* x, const float* table, const int64_t* ids, int64_t B, int64_t K, int64_t D,
             int threads);

// slim.cpp
// Returns how many columns did not converge in so many passes.
int64_t slim(float* columns, const float* G, int64_t M, int64_t first, int64_t last, double l1, double l2,
             double tolerance, int passes, int threads);

// feedback_step.cpp
void fuse(float* h, float* w, const float* hx, const float* lookup, const int64_t* ids, const float* scores, bool soft,
          int64_t B, int64_t K, int64_t D, int threads);

struct Layer {
    const float *weight, *bias;  // [out, in], [out]
    int64_t in, out;
};
void respond(float* v, float* logit, const float* h, const std::vector<Layer>& reward,
             const std::vector<Layer>& feedback, int64_t B, int64_t D, int threads);

// linear_topk.cpp
void linear_topk(const Problem& p, Lists out, LoopState* state);

// linear_nll.cpp
void linear_nll(const Problem& p, float* nll, float* lse, Lists out, const int64_t* items, const int64_t* offsets,
                float* scores);
void linear_nll_backward(const Problem& p, float* ds, int64_t ld, float* dbias, const float* dnll, const float* lse,
                         const int64_t* items, const int64_t* offsets, const float* scores, int64_t first,
                         int64_t last);

}  // namespace cfsfl
