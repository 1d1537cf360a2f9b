// Sixteen float lanes in two AVX2 registers.
#pragma once

constexpr int BAG_VECTORS = 4;  // sums of `bag` that fit the registers

struct V {
    __m256 lo, hi;
};

INLINE __m256i head_mask(int n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
INLINE V load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
INLINE V load_head(const float* p, int n) {
    return {_mm256_maskload_ps(p, head_mask(n)), _mm256_maskload_ps(p + 8, head_mask(n - 8))};
}
INLINE void store(float* p, V x) {
    _mm256_storeu_ps(p, x.lo);
    _mm256_storeu_ps(p + 8, x.hi);
}
INLINE void store_head(float* p, V x, int n) {
    _mm256_maskstore_ps(p, head_mask(n), x.lo);
    _mm256_maskstore_ps(p + 8, head_mask(n - 8), x.hi);
}
INLINE V set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
INLINE V add(V a, V b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
INLINE V sub(V a, V b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
INLINE V mul(V a, V b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
INLINE V max(V a, V b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
INLINE V fma(V a, V b, V c) { return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)}; }
INLINE V round_even(V a) {
    constexpr int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    return {_mm256_round_ps(a.lo, mode), _mm256_round_ps(a.hi, mode)};
}
INLINE unsigned gt(V a, V b) {
    return (unsigned)_mm256_movemask_ps(_mm256_cmp_ps(a.lo, b.lo, _CMP_GT_OQ)) |
           (unsigned)_mm256_movemask_ps(_mm256_cmp_ps(a.hi, b.hi, _CMP_GT_OQ)) << 8;
}
INLINE unsigned ge(V a, V b) {
    return (unsigned)_mm256_movemask_ps(_mm256_cmp_ps(a.lo, b.lo, _CMP_GE_OQ)) |
           (unsigned)_mm256_movemask_ps(_mm256_cmp_ps(a.hi, b.hi, _CMP_GE_OQ)) << 8;
}
INLINE __m256 scale2(__m256 a, __m256 n) {
    return _mm256_mul_ps(
        a, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23)));
}
INLINE V scale2(V a, V n) { return {scale2(a.lo, n.lo), scale2(a.hi, n.hi)}; }
INLINE V zero_below(V a, V x, V least) {
    return {_mm256_andnot_ps(_mm256_cmp_ps(x.lo, least.lo, _CMP_LT_OQ), a.lo),
            _mm256_andnot_ps(_mm256_cmp_ps(x.hi, least.hi, _CMP_LT_OQ), a.hi)};
}
INLINE float sum(V x) {
    __m256 a = _mm256_add_ps(x.lo, x.hi);
    __m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    b = _mm_add_ps(b, _mm_movehl_ps(b, b));
    return _mm_cvtss_f32(_mm_add_ss(b, _mm_movehdup_ps(b)));
}
INLINE float largest(V x) {
    __m256 a = _mm256_max_ps(x.lo, x.hi);
    __m128 b = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    b = _mm_max_ps(b, _mm_movehl_ps(b, b));
    return _mm_cvtss_f32(_mm_max_ss(b, _mm_movehdup_ps(b)));
}
INLINE int append_from(float* values, int32_t* ids, V x, int32_t first, unsigned mask) {
    float lane[LANES];
    store(lane, x);
    int n = 0;
    for (; mask; mask &= mask - 1) {
        int l = __builtin_ctz(mask);
        values[n] = lane[l];
        ids[n++] = first + l;
    }
    return n;
}
INLINE int append_listed(float* values, int32_t* ids, V x, const int32_t* from, unsigned mask) {
    float lane[LANES];
    store(lane, x);
    int n = 0;
    for (; mask; mask &= mask - 1) {
        int l = __builtin_ctz(mask);
        values[n] = lane[l];
        ids[n++] = from[l];
    }
    return n;
}
