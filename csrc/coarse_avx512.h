// Integer products for coarse.h on AVX-512-VNNI: users as unsigned bytes q + 128, items as signed bytes.
//
// Users lie as [ceil(H / 4)][COARSE_B][4], items as [ceil(H / 4)][COARSE_M][4]: four h are one 32-bit lane.
#pragma once

#define VNNI_TARGET "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma"

// x = scale q + rest; the squares in double, so that nothing under- or overflows.
FUNCTION void coarse_users(uint8_t* q, float* scale, double* error2, double* norm2_out, const float* u, int H,
                           int row) {
    float top = 0.0f;
    for (int h = 0; h < H; ++h) top = std::fabs(u[h]) > top ? std::fabs(u[h]) : top;
    const float step = top > 1e-30f ? top / 127.0f : 1.0f;
    double e2 = 0, n2 = 0;
    for (int h = 0; h < H; ++h) {
        int z = (int)std::lrint(u[h] / step);
        z = z > 127 ? 127 : z < -127 ? -127 : z;
        q[((int64_t)(h >> 2) * COARSE_B + row) * 4 + (h & 3)] = (uint8_t)(z + 128);
        const double e = (double)u[h] - (double)step * z;
        e2 += e * e;
        n2 += (double)u[h] * u[h];
    }
    for (int h = H; h & 3; ++h) q[((int64_t)(h >> 2) * COARSE_B + row) * 4 + (h & 3)] = 128;
    *scale = step;
    *error2 = e2;
    *norm2_out = n2;
}

// n <= COARSE_M rows; offset = 128 sum_h q_h, what the users' + 128 adds to a product.
FUNCTION void coarse_items(int8_t* q, float* scale, int32_t* offset, float* norm, float* error, const float* weight,
                           int n, int H) {
    const int64_t words = (H + 3) / 4;
    if (n < COARSE_M) std::memset(q, 0, words * COARSE_M * 4);
    for (int j = 0; j < COARSE_M; ++j) {
        if (j >= n) {
            scale[j] = norm[j] = error[j] = 0.0f;
            offset[j] = 0;
            continue;
        }
        const float* w = weight + (int64_t)j * H;
        __m512 big = _mm512_setzero_ps(), squares = big, errors = big;
        for (int h = 0; h < H; h += LANES) {
            __m512 x = load_head(w + h, H - h < LANES ? H - h : LANES);
            big = _mm512_max_ps(big, _mm512_abs_ps(x));
            squares = _mm512_fmadd_ps(x, x, squares);
        }
        const float top = _mm512_reduce_max_ps(big);
        const float step = top > 1e-30f && top < 1e30f ? top / 127.0f : 1.0f;
        const __m512 inverse = _mm512_set1_ps(1.0f / step), steps = _mm512_set1_ps(step);
        __m512i total = _mm512_setzero_si512();
        for (int h = 0; h < H; h += LANES) {
            __m512 x = load_head(w + h, H - h < LANES ? H - h : LANES);
            __m512i z = _mm512_cvtps_epi32(_mm512_mul_ps(x, inverse));
            z = _mm512_max_epi32(_mm512_min_epi32(z, _mm512_set1_epi32(127)), _mm512_set1_epi32(-127));
            total = _mm512_add_epi32(total, z);
            __m512 e = _mm512_fnmadd_ps(_mm512_cvtepi32_ps(z), steps, x);
            errors = _mm512_fmadd_ps(e, e, errors);
            int32_t word[4];
            _mm_storeu_si128((__m128i*)word, _mm512_cvtepi32_epi8(z));
            for (int i = 0; i < 4 && h / 4 + i < words; ++i)
                std::memcpy(q + ((int64_t)(h / 4 + i) * COARSE_M + j) * 4, word + i, 4);
        }
        scale[j] = step;
        offset[j] = 128 * _mm512_reduce_add_epi32(total);
        norm[j] = _mm512_reduce_add_ps(squares);
        error[j] = _mm512_reduce_add_ps(errors);
    }
}

// upper[r][j] of coarse.h, COARSE_B users x COARSE_M items.
__attribute__((target(VNNI_TARGET))) static void coarse_block(float* upper, const uint8_t* user_q,
                                                              const float* user_scale, const float* user_a,
                                                              const float* user_b, const int8_t* item_q,
                                                              const float* item_scale, const int32_t* item_offset,
                                                              const float* item_norm, const float* item_error,
                                                              const float* item_bias, int H) {
    const int words = (H + 3) / 4;
    const int32_t* u = (const int32_t*)user_q;
    __m512i acc[COARSE_B][2];
    for (int r = 0; r < COARSE_B; ++r) acc[r][0] = acc[r][1] = _mm512_setzero_si512();
    for (int k = 0; k < words; ++k) {
        const __m512i b0 = _mm512_loadu_si512(item_q + k * 128), b1 = _mm512_loadu_si512(item_q + k * 128 + 64);
        for (int r = 0; r < COARSE_B; ++r) {
            const __m512i a = _mm512_set1_epi32(u[k * COARSE_B + r]);
            acc[r][0] = _mm512_dpbusd_epi32(acc[r][0], a, b0);
            acc[r][1] = _mm512_dpbusd_epi32(acc[r][1], a, b1);
        }
    }
    for (int half = 0; half < 2; ++half) {
        const int j = half * LANES;
        const __m512i offset = _mm512_loadu_si512(item_offset + j);
        const __m512 scale = _mm512_loadu_ps(item_scale + j), bias = _mm512_loadu_ps(item_bias + j);
        const __m512 norm = _mm512_loadu_ps(item_norm + j), error = _mm512_loadu_ps(item_error + j);
        for (int r = 0; r < COARSE_B; ++r) {
            const __m512 product = _mm512_cvtepi32_ps(_mm512_sub_epi32(acc[r][half], offset));
            __m512 x = _mm512_fmadd_ps(_mm512_mul_ps(product, scale), _mm512_set1_ps(user_scale[r]), bias);
            x = _mm512_fmadd_ps(_mm512_set1_ps(user_a[r]), norm, x);
            x = _mm512_fmadd_ps(_mm512_set1_ps(user_b[r]), error, x);
            _mm512_storeu_ps(upper + r * COARSE_M + j, x);
        }
    }
}
