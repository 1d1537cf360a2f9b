// The kernels in portable C++.
#include "kernels.h"

#define INLINE static inline
#define FUNCTION static

namespace cfsfl {
namespace plain {
namespace {

#include "lanes_plain.h"
//
#include "kernels.inl"

void score_block(float* s, int64_t ld, const float* u, int64_t stride_u, int R, const float* weight, int N,
                 const float* bias, int H, const char*, int64_t) {
    for (int j = 0; j < N; ++j)
        for (int r = 0; r < R; ++r) s[r * ld + j] = dot(u + r * stride_u, weight + (int64_t)j * H, H) + bias[j];
}

void score_list(float* s, const float* u, const float* weight, const float* bias, const int32_t* ids, int n, int H) {
    for (int i = 0; i < n; ++i) s[i] = dot(u, weight + (int64_t)ids[i] * H, H) + bias[ids[i]];
}

}  // namespace
}  // namespace plain

using namespace plain;
const Kernels plain_kernels = {"plain", score_block, score_list, filter,  count_ge,     keep_ge, norm2,   distance2,
                               dot,     bag,         peak,       exp_sum, softmax_grad, nullptr, nullptr, nullptr};

}  // namespace cfsfl
