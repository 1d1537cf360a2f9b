// The vector kernels that every operation is made of, one table per instruction set.
//
// The score of a user and an item is ONE float32 computation, whatever finds it:
//
//     lane_l = fma chain over h = l, l + 16, l + 32, ... of u_h w_h,   l = 0 .. 15, rows read as if padded with zeros
//     sum    = the lanes folded in halves: l + (l + 8), + 4, + 2, + 1
//     s      = sum + bias                                                                                           (1)
//
// Tiles, lists of candidates and every instruction set do exactly this, so a score has the same bits in any batch, on
// any number of threads and through any shortcut. Lanes run along h: the table is read as it lies, without a copy.
#pragma once

#include <cstdint>

namespace cfsfl {

// Users and items of one register tile, and items that stay in the second-level cache while all users of a task pass.
constexpr int BLOCK_B = 6;
constexpr int BLOCK_M = 64;
constexpr int LANES = 16;

// Users and items of one integer tile (`coarse_block`).
constexpr int COARSE_B = 12;
constexpr int COARSE_M = 32;

struct Kernels {
    const char* name;

    // s[r * ld + j] = score of u_r and w_j, (1). `ahead`: bytes that the next call will read, fetched meanwhile.
    void (*score_block)(float* s, int64_t ld, const float* u, int64_t stride_u, int R, const float* weight, int N,
                        const float* bias, int H, const char* ahead, int64_t ahead_bytes);

    // s[i] = score of u and item ids[i], (1).
    void (*score_list)(float* s, const float* u, const float* weight, const float* bias, const int32_t* ids, int n,
                       int H);

    // Appends (s_j, first + j) where s_j > floor, in order. Writes up to LANES past the end. Returns how many.
    int (*filter)(float* values, int32_t* ids, const float* s, int n, int32_t first, float floor);

    // How many values are >= t, and the same kept in order.
    int (*count_ge)(const float* values, int n, float t);
    int (*keep_ge)(float* values, int32_t* ids, int n, float t);

    // sum_h x_h^2 and sum_h (x_h - y_h)^2.
    float (*norm2)(const float* x, int H);
    float (*distance2)(const float* x, const float* y, int H);

    // < x, y >.
    float (*dot)(const float* x, const float* y, int H);

    // out = (add or 0) + sum_e weights_e table[items_e], entries in order; weights null for ones; items < 0 skipped.
    void (*bag)(float* out, const float* add, const float* table, int64_t D, const int64_t* items, const float* weights,
                int64_t n);

    // max_j s_j, and sum_j exp(s_j - shift).
    float (*peak)(const float* s, int n);
    float (*exp_sum)(const float* s, int n, float shift);

    // ds_j = scale exp(s_j - shift), total_j += ds_j.
    void (*softmax_grad)(float* ds, float* total, const float* s, int n, float shift, float scale);

    // Integer screening, null where the processor has no 8-bit dot product: see coarse.h.
    void (*coarse_users)(uint8_t* q, float* scale, double* error2, double* norm2, const float* u, int H, int row);
    void (*coarse_items)(int8_t* q, float* scale, int32_t* offset, float* norm, float* error, const float* weight,
                         int n, int H);
    void (*coarse_block)(float* upper, const uint8_t* user_q, const float* user_scale, const float* user_a,
                         const float* user_b, const int8_t* item_q, const float* item_scale, const int32_t* item_offset,
                         const float* item_norm, const float* item_error, const float* item_bias, int H);
};

extern const Kernels plain_kernels;
extern const Kernels avx2_kernels;    // x86-64 only
extern const Kernels avx512_kernels;  // x86-64 only

}  // namespace cfsfl
