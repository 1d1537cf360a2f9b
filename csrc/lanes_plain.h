// Sixteen float lanes in an array: any processor, the same bits.
#pragma once

constexpr int BAG_VECTORS = 4;  // sums of `bag` that fit the registers

struct V {
    float x[LANES];
};

#define EACH(expression)                                   \
    V out;                                                 \
    for (int l = 0; l < LANES; ++l) out.x[l] = expression; \
    return out

INLINE V load(const float* p) { EACH(p[l]); }
INLINE V load_head(const float* p, int n) { EACH(l < n ? p[l] : 0.0f); }
INLINE void store(float* p, V a) {
    for (int l = 0; l < LANES; ++l) p[l] = a.x[l];
}
INLINE void store_head(float* p, V a, int n) {
    for (int l = 0; l < n; ++l) p[l] = a.x[l];
}
INLINE V set1(float a) { EACH(a); }
INLINE V add(V a, V b) { EACH(a.x[l] + b.x[l]); }
INLINE V sub(V a, V b) { EACH(a.x[l] - b.x[l]); }
INLINE V mul(V a, V b) { EACH(a.x[l] * b.x[l]); }
INLINE V max(V a, V b) { EACH(a.x[l] > b.x[l] ? a.x[l] : b.x[l]); }
INLINE V fma(V a, V b, V c) { EACH(__builtin_fmaf(a.x[l], b.x[l], c.x[l])); }
INLINE V round_even(V a) { EACH(__builtin_rintf(a.x[l])); }
INLINE V scale2(V a, V n) { EACH(a.x[l] * __builtin_ldexpf(1.0f, (int)n.x[l])); }
INLINE V zero_below(V a, V x, V least) { EACH(x.x[l] < least.x[l] ? 0.0f : a.x[l]); }
INLINE unsigned gt(V a, V b) {
    unsigned mask = 0;
    for (int l = 0; l < LANES; ++l) mask |= (unsigned)(a.x[l] > b.x[l]) << l;
    return mask;
}
INLINE unsigned ge(V a, V b) {
    unsigned mask = 0;
    for (int l = 0; l < LANES; ++l) mask |= (unsigned)(a.x[l] >= b.x[l]) << l;
    return mask;
}
INLINE float sum(V a) {
    for (int half = LANES / 2; half; half /= 2)
        for (int l = 0; l < half; ++l) a.x[l] += a.x[l + half];
    return a.x[0];
}
INLINE float largest(V a) {
    float best = a.x[0];
    for (int l = 1; l < LANES; ++l) best = a.x[l] > best ? a.x[l] : best;
    return best;
}
INLINE int append_from(float* values, int32_t* ids, V a, int32_t first, unsigned mask) {
    int n = 0;
    for (int l = 0; l < LANES; ++l)
        if (mask >> l & 1) {
            values[n] = a.x[l];
            ids[n++] = first + l;
        }
    return n;
}
INLINE int append_listed(float* values, int32_t* ids, V a, const int32_t* from, unsigned mask) {
    int n = 0;
    for (int l = 0; l < LANES; ++l)
        if (mask >> l & 1) {
            values[n] = a.x[l];
            ids[n++] = from[l];
        }
    return n;
}

#undef EACH
