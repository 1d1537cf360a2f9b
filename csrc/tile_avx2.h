// Register tiles of equation (1) for AVX2: 4 users x 3 items, lanes 0..7 of every pair in one sweep, 8..15 in a second.
#pragma once

// Lanes `half` .. `half` + 7 of every sixteen.
template <int R, int N>
INLINE void sweep(const float* u, int64_t stride_u, const float* const w[3], int H, int half, __m256 acc[4][3]) {
    for (int r = 0; r < R; ++r)
        for (int j = 0; j < N; ++j) acc[r][j] = _mm256_setzero_ps();
    int h = half;
    for (; h + 8 <= H; h += LANES) {
        __m256 b[3];
        for (int j = 0; j < N; ++j) b[j] = _mm256_loadu_ps(w[j] + h);
        for (int r = 0; r < R; ++r) {
            __m256 a = _mm256_loadu_ps(u + r * stride_u + h);
            for (int j = 0; j < N; ++j) acc[r][j] = _mm256_fmadd_ps(a, b[j], acc[r][j]);
        }
    }
    // What is left of the last sixteen lanes, or zeros where this half ended before.
    const int whole = H / LANES * LANES;
    if (whole < H && h < whole + LANES) {
        const __m256i head = head_mask(H - h);
        for (int r = 0; r < R; ++r) {
            __m256 a = _mm256_maskload_ps(u + r * stride_u + h, head);
            for (int j = 0; j < N; ++j) acc[r][j] = _mm256_fmadd_ps(a, _mm256_maskload_ps(w[j] + h, head), acc[r][j]);
        }
    }
}

INLINE float fold(__m256 lo, __m256 hi) { return sum(V{lo, hi}); }

template <int R, int N>
INLINE void tile(float* s, int64_t ld, const float* u, int64_t stride_u, const float* const w[3], int H,
                 const float* bias) {
    __m256 lo[4][3], hi[4][3];
    sweep<R, N>(u, stride_u, w, H, 0, lo);
    sweep<R, N>(u, stride_u, w, H, 8, hi);
    for (int r = 0; r < R; ++r)
        for (int j = 0; j < N; ++j) s[r * ld + j] = fold(lo[r][j], hi[r][j]) + bias[j];
}

template <int R>
INLINE void rows(float* s, int64_t ld, const float* u, int64_t stride_u, const float* weight, int N, const float* bias,
                 int H) {
    int j = 0;
    for (; j + 3 <= N; j += 3) {
        const float* w[3] = {weight + (int64_t)j * H, weight + (int64_t)(j + 1) * H, weight + (int64_t)(j + 2) * H};
        tile<R, 3>(s + j, ld, u, stride_u, w, H, bias + j);
    }
    for (; j < N; ++j) {
        const float* w[3] = {weight + (int64_t)j * H, nullptr, nullptr};
        tile<R, 1>(s + j, ld, u, stride_u, w, H, bias + j);
    }
}

FUNCTION void score_block(float* s, int64_t ld, const float* u, int64_t stride_u, int R, const float* weight, int N,
                          const float* bias, int H, const char*, int64_t) {
    int r = 0;
    for (; r + 4 <= R; r += 4) rows<4>(s + r * ld, ld, u + r * stride_u, stride_u, weight, N, bias, H);
    for (; r + 2 <= R; r += 2) rows<2>(s + r * ld, ld, u + r * stride_u, stride_u, weight, N, bias, H);
    for (; r < R; ++r) rows<1>(s + r * ld, ld, u + r * stride_u, stride_u, weight, N, bias, H);
}

FUNCTION void score_list(float* s, const float* u, const float* weight, const float* bias, const int32_t* ids, int n,
                         int H) {
    for (int i = 0; i < n; ++i) s[i] = dot(u, weight + (int64_t)ids[i] * H, H) + bias[ids[i]];
}
