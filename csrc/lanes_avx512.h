// Sixteen float lanes in one AVX-512 register.
#pragma once

constexpr int BAG_VECTORS = 16;  // sums of `bag` that fit the registers

typedef __m512 V;

INLINE V load(const float* p) { return _mm512_loadu_ps(p); }
INLINE V load_head(const float* p, int n) { return _mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p); }
INLINE void store(float* p, V x) { _mm512_storeu_ps(p, x); }
INLINE void store_head(float* p, V x, int n) { _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), x); }
INLINE V set1(float x) { return _mm512_set1_ps(x); }
INLINE V add(V a, V b) { return _mm512_add_ps(a, b); }
INLINE V sub(V a, V b) { return _mm512_sub_ps(a, b); }
INLINE V mul(V a, V b) { return _mm512_mul_ps(a, b); }
INLINE V max(V a, V b) { return _mm512_max_ps(a, b); }
INLINE V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
INLINE V round_even(V a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
INLINE unsigned gt(V a, V b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
INLINE unsigned ge(V a, V b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
// a 2^n for whole n >= -126
INLINE V scale2(V a, V n) {
    return _mm512_mul_ps(
        a, _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127)), 23)));
}
// a where x >= least, else 0 (also for NaN: a keeps it)
INLINE V zero_below(V a, V x, V least) {
    return _mm512_mask_mov_ps(a, _mm512_cmp_ps_mask(x, least, _CMP_LT_OQ), _mm512_setzero_ps());
}

INLINE float sum(V x) {
    __m256 a = _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
    __m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    b = _mm_add_ps(b, _mm_movehl_ps(b, b));
    return _mm_cvtss_f32(_mm_add_ss(b, _mm_movehdup_ps(b)));
}
INLINE float largest(V x) { return _mm512_reduce_max_ps(x); }

// The chosen lanes, moved together, and their ids. Compressing into memory is microcoded on some processors.
INLINE int append(float* values, int32_t* ids, V x, __m512i id, unsigned mask) {
    _mm512_storeu_ps(values, _mm512_maskz_compress_ps((__mmask16)mask, x));
    _mm512_storeu_si512(ids, _mm512_maskz_compress_epi32((__mmask16)mask, id));
    return __builtin_popcount(mask);
}
INLINE int append_from(float* values, int32_t* ids, V x, int32_t first, unsigned mask) {
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return append(values, ids, x, _mm512_add_epi32(_mm512_set1_epi32(first), lane), mask);
}
INLINE int append_listed(float* values, int32_t* ids, V x, const int32_t* from, unsigned mask) {
    return append(values, ids, x, _mm512_loadu_si512(from), mask);
}
