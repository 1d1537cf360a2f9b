// Register tiles of equation (1) for AVX-512: R users x 4 items, one accumulator of sixteen lanes per pair.
//
// Per sixteen h: 4 loads of items, R of users, 4 R fused multiply-adds; 24 accumulators at R = 6 hide their latency.
#pragma once

// Four folded pairs (1) of each of four rows: lane 4 r + j is the sum of acc[r][j].
INLINE __m512 fold(const __m512 a[4], const __m512 b[4], const __m512 c[4], const __m512 d[4]) {
    __m512 pair[4];
    for (int j = 0; j < 4; ++j) {
        __m512 ab = _mm512_add_ps(_mm512_shuffle_f32x4(a[j], b[j], 0x44), _mm512_shuffle_f32x4(a[j], b[j], 0xee));
        __m512 cd = _mm512_add_ps(_mm512_shuffle_f32x4(c[j], d[j], 0x44), _mm512_shuffle_f32x4(c[j], d[j], 0xee));
        pair[j] = _mm512_add_ps(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xdd));
    }
    __m512 x =
        _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(pair[0]), _mm512_castps_pd(pair[1]))),
                      _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(pair[0]), _mm512_castps_pd(pair[1]))));
    __m512 y =
        _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(pair[2]), _mm512_castps_pd(pair[3]))),
                      _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(pair[2]), _mm512_castps_pd(pair[3]))));
    return _mm512_add_ps(_mm512_shuffle_ps(x, y, 0x88), _mm512_shuffle_ps(x, y, 0xdd));
}

template <int R>
INLINE void tile(const float* u, int64_t stride_u, const float* const w[4], int H, __m512 acc[6][4]) {
    for (int r = 0; r < R; ++r)
        for (int j = 0; j < 4; ++j) acc[r][j] = _mm512_setzero_ps();
    int h = 0;
    for (; h + LANES <= H; h += LANES) {
        __m512 b[4];
        for (int j = 0; j < 4; ++j) b[j] = _mm512_loadu_ps(w[j] + h);
        for (int r = 0; r < R; ++r) {
            __m512 a = _mm512_loadu_ps(u + r * stride_u + h);
            for (int j = 0; j < 4; ++j) acc[r][j] = _mm512_fmadd_ps(a, b[j], acc[r][j]);
        }
    }
    if (h < H) {
        const __mmask16 head = (__mmask16)((1u << (H - h)) - 1);
        __m512 b[4];
        for (int j = 0; j < 4; ++j) b[j] = _mm512_maskz_loadu_ps(head, w[j] + h);
        for (int r = 0; r < R; ++r) {
            __m512 a = _mm512_maskz_loadu_ps(head, u + r * stride_u + h);
            for (int j = 0; j < 4; ++j) acc[r][j] = _mm512_fmadd_ps(a, b[j], acc[r][j]);
        }
    }
}

template <int R>
INLINE void block(float* s, int64_t ld, const float* u, int64_t stride_u, const float* weight, int N, const float* bias,
                  int H, const char* ahead, int64_t ahead_bytes) {
    const int64_t ahead_step = ((ahead_bytes * 4 / BLOCK_M) + 63) / 64 * 64;
    for (int j = 0; j < N; j += 4) {
        const __mmask8 in = (__mmask8)(N - j >= 4 ? 15 : (1u << (N - j)) - 1);
        const float* w[4];
        for (int i = 0; i < 4; ++i) w[i] = weight + (int64_t)(j + i < N ? j + i : N - 1) * H;
        for (int64_t a = 0; a < ahead_step; a += 64) _mm_prefetch(ahead + j / 4 * ahead_step + a, _MM_HINT_T1);
        __m512 acc[6][4];
        tile<R>(u, stride_u, w, H, acc);
        const __m128 b = _mm_maskz_loadu_ps(in, bias + j);
        const __m512 bb = _mm512_broadcast_f32x4(b);
        __m512 x = fold(acc[0], acc[R > 1 ? 1 : 0], acc[R > 2 ? 2 : 0], acc[R > 3 ? 3 : 0]);
        x = _mm512_add_ps(x, bb);
        _mm_mask_storeu_ps(s + j, in, _mm512_castps512_ps128(x));
        if (R > 1) _mm_mask_storeu_ps(s + ld + j, in, _mm512_extractf32x4_ps(x, 1));
        if (R > 2) _mm_mask_storeu_ps(s + 2 * ld + j, in, _mm512_extractf32x4_ps(x, 2));
        if (R > 3) _mm_mask_storeu_ps(s + 3 * ld + j, in, _mm512_extractf32x4_ps(x, 3));
        if (R > 4) {
            x = _mm512_add_ps(fold(acc[4], acc[R > 5 ? 5 : 4], acc[4], acc[4]), bb);
            _mm_mask_storeu_ps(s + 4 * ld + j, in, _mm512_castps512_ps128(x));
            if (R > 5) _mm_mask_storeu_ps(s + 5 * ld + j, in, _mm512_extractf32x4_ps(x, 1));
        }
    }
}

FUNCTION void score_block(float* s, int64_t ld, const float* u, int64_t stride_u, int R, const float* weight, int N,
                          const float* bias, int H, const char* ahead, int64_t ahead_bytes) {
    switch (R) {
        case 6:
            return block<6>(s, ld, u, stride_u, weight, N, bias, H, ahead, ahead_bytes);
        case 5:
            return block<5>(s, ld, u, stride_u, weight, N, bias, H, ahead, ahead_bytes);
        case 4:
            return block<4>(s, ld, u, stride_u, weight, N, bias, H, ahead, ahead_bytes);
        case 3:
            return block<3>(s, ld, u, stride_u, weight, N, bias, H, ahead, ahead_bytes);
        case 2:
            return block<2>(s, ld, u, stride_u, weight, N, bias, H, ahead, ahead_bytes);
        case 1:
            return block<1>(s, ld, u, stride_u, weight, N, bias, H, ahead, ahead_bytes);
    }
}

FUNCTION void score_list(float* s, const float* u, const float* weight, const float* bias, const int32_t* ids, int n,
                         int H) {
    for (int i = 0; i < n; i += 4) {
        const float* w[4];
        for (int q = 0; q < 4; ++q) w[q] = weight + (int64_t)ids[i + q < n ? i + q : n - 1] * H;
        for (int q = i + 8; q < i + 12 && q < n; ++q) {
            const char* next = (const char*)(weight + (int64_t)ids[q] * H);
            for (int64_t a = 0; a < (int64_t)H * 4; a += 64) _mm_prefetch(next + a, _MM_HINT_T0);
        }
        __m512 acc[6][4];
        tile<1>(u, 0, w, H, acc);
        float four[4];
        _mm_storeu_ps(four, _mm512_castps512_ps128(fold(acc[0], acc[0], acc[0], acc[0])));
        for (int q = 0; q < 4 && i + q < n; ++q) s[i + q] = four[q] + bias[ids[i + q]];
    }
}
