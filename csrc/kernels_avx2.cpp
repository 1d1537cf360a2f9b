// The kernels on AVX2 with fused multiply-add.
#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>

#define INLINE static inline __attribute__((target("avx2,fma"), always_inline))
#define FUNCTION static __attribute__((target("avx2,fma")))

namespace cfsfl {
namespace avx2 {
namespace {

#include "lanes_avx2.h"
//
#include "kernels.inl"
//
#include "tile_avx2.h"

}  // namespace
}  // namespace avx2

using namespace avx2;
const Kernels avx2_kernels = {"avx2", score_block, score_list, filter,  count_ge,     keep_ge, norm2,   distance2,
                              dot,    bag,         peak,       exp_sum, softmax_grad, nullptr, nullptr, nullptr};

}  // namespace cfsfl
#endif
