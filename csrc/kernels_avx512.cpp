// The kernels on AVX-512; the integer ones on AVX-512-VNNI.
#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include <cmath>
#include <cstring>

#define CFSFL_TARGET "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"
#define INLINE static inline __attribute__((target(CFSFL_TARGET), always_inline))
#define FUNCTION static __attribute__((target(CFSFL_TARGET)))

namespace cfsfl {
namespace avx512 {
namespace {

#include "lanes_avx512.h"
//
#include "kernels.inl"
//
#include "tile_avx512.h"
//
#include "coarse_avx512.h"

}  // namespace
}  // namespace avx512

using namespace avx512;
const Kernels avx512_kernels = {"avx512",     score_block,  score_list,   filter,      count_ge, keep_ge,
                                norm2,        distance2,    dot,          bag,         peak,     exp_sum,
                                softmax_grad, coarse_users, coarse_items, coarse_block};

}  // namespace cfsfl
#endif
