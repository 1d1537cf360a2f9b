// Candidates by integer products: an upper bound of every score from 8-bit codes of u and w.
//
//     u = a p + x,   w = c q + y          p, q whole numbers in -127 .. 127, x and y what rounding leaves
//     < u, w >  =  a c < p, q > + < x, w > + < a p, y >
//              <=  a c < p, q > + ||x|| ||w|| + (||u|| + ||x||) ||y||                                              (1)
//
// plus what float32 may add when the exact score is computed, and here: (ceil(H / 16) + 24) 2^-24 ||u|| ||w||, a share
// of |bias|, and a constant for results that are flushed to zero. An item or a user too large for these sums to be
// finite gets the bound +inf: it is scored exactly.
//
// Traffic   B M H multiply-adds of 8 bits, a quarter of the time of float32. The items are coded SEGMENT at a time by
// all
//           threads together, so nothing here grows with M.
#include <omp.h>

#include <cmath>

#include "isa.h"
#include "linear_topk.h"

namespace cfsfl {

void coarse_search(const Rows& rows, Candidates& keep) {
    const Kernels& kernels = cfsfl::kernels();
    const Problem& p = rows.p;
    const int C = keep.size, capacity = C + C / 2 + 64;
    const int64_t room = Shortlist::room(capacity);
    const int64_t words = (p.H + 3) / 4, user_bytes = words * COARSE_B * 4, item_bytes = words * COARSE_M * 4;
    const int64_t blocks = (p.B + COARSE_B - 1) / COARSE_B, padded = blocks * COARSE_B;
    constexpr int panels = SEGMENT / COARSE_M;
    constexpr double too_large = 1e30;  // of a squared norm
    const double rounding = ((p.H + LANES - 1) / LANES + 24) * std::ldexp(1.0, -24);
    const float tiny = (float)(p.H + 64) * 4e-38f;

    Array<uint8_t> user_q = array<uint8_t>(blocks * user_bytes);
    std::vector<float> user_scale(padded, 0.0f), user_a(padded, 0.0f), user_b(padded, 0.0f);
    std::vector<char> beyond(p.B, 0);
    Array<int8_t> item_q = array<int8_t>(panels * item_bytes);
    float item_scale[SEGMENT], item_norm[SEGMENT], item_error[SEGMENT], item_bias[SEGMENT];
    int32_t item_offset[SEGMENT];
    Array<float> values = array<float>(p.B * room);
    Array<int32_t> ids = array<int32_t>(p.B * room);
    std::vector<Shortlist> lists(p.B);
    std::vector<Excluded> excluded(p.B);

#pragma omp parallel num_threads(p.threads)
    {
#pragma omp for schedule(static)
        for (int64_t block = 0; block < blocks; ++block) {
            uint8_t* q = user_q.get() + block * user_bytes;
            std::memset(q, 128, user_bytes);
            for (int64_t b = block * COARSE_B; b < std::min(p.B, (block + 1) * COARSE_B); ++b) {
                double error2, norm2;
                kernels.coarse_users(q, &user_scale[b], &error2, &norm2, p.u + b * p.H, (int)p.H,
                                     (int)(b - block * COARSE_B));
                const double norm = std::sqrt(norm2) * 1.000001, error = std::sqrt(error2) * 1.000001;
                user_a[b] = (float)((error + rounding * norm) * 1.000001);
                user_b[b] = (float)((norm + error) * 1.000001);
                beyond[b] = !(norm2 < too_large);
                lists[b].values = values.get() + b * room;
                lists[b].ids = ids.get() + b * room;
                excluded[b] = Excluded(p, rows.of(b), 0);
            }
        }
        alignas(64) float upper[COARSE_B * COARSE_M];
        for (int64_t first = 0; first < p.M; first += SEGMENT) {
            const int64_t last = std::min(first + SEGMENT, p.M);
            const int here = (int)((last - first + COARSE_M - 1) / COARSE_M);
#pragma omp for schedule(static)
            for (int panel = 0; panel < here; ++panel) {
                const int64_t j = first + panel * COARSE_M;
                const int n = (int)std::min<int64_t>(COARSE_M, last - j), at = panel * COARSE_M;
                kernels.coarse_items(item_q.get() + panel * item_bytes, item_scale + at, item_offset + at,
                                     item_norm + at, item_error + at, p.weight + j * p.H, n, (int)p.H);
                for (int i = at; i < at + n; ++i) {
                    const double norm2 = item_norm[i], grown = 1.000001 + rounding, b = p.bias[first + i];
                    item_norm[i] = (float)(std::sqrt(norm2 + tiny) * grown);
                    item_error[i] = (float)(std::sqrt((double)item_error[i] + tiny) * grown);
                    item_bias[i] = (float)(b + std::fabs(b) * std::ldexp(1.0, -21) + tiny);
                    if (!(norm2 < too_large) || std::isnan(b)) {
                        item_bias[i] = INF;
                        item_scale[i] = item_norm[i] = item_error[i] = 0.0f;
                    }
                }
                for (int i = at + n; i < at + COARSE_M; ++i) item_bias[i] = -INF;
            }
#pragma omp for schedule(dynamic, 2)
            for (int64_t pair = 0; pair < (blocks + 1) / 2; ++pair)
                for (int panel = 0; panel < here; ++panel) {
                    const int at = panel * COARSE_M;
                    const int64_t j = first + at;
                    const int n = (int)std::min<int64_t>(COARSE_M, last - j);
                    for (int64_t block = 2 * pair; block < std::min(blocks, 2 * pair + 2); ++block) {
                        const int64_t b0 = block * COARSE_B;
                        kernels.coarse_block(upper, user_q.get() + block * user_bytes, &user_scale[b0], &user_a[b0],
                                             &user_b[b0], item_q.get() + panel * item_bytes, item_scale + at,
                                             item_offset + at, item_norm + at, item_error + at, item_bias + at,
                                             (int)p.H, nullptr);
                        for (int64_t b = b0; b < std::min(p.B, b0 + COARSE_B); ++b) {
                            float* s = upper + (b - b0) * COARSE_M;
                            excluded[b].mask(s, j, n);
                            lists[b].add(kernels, s, n, (int32_t)j, C, capacity);
                        }
                    }
                }
        }
#pragma omp for schedule(static)
        for (int64_t b = 0; b < p.B; ++b) {
            lists[b].shrink(kernels, C, C / 4);
            const int n = beyond[b] ? 0 : lists[b].n;
            std::copy(lists[b].values, lists[b].values + n, keep.upper.get() + b * keep.room);
            std::copy(lists[b].ids, lists[b].ids + n, keep.ids.get() + b * keep.room);
            keep.n[b] = n;
            keep.rest[b] = beyond[b] ? INF : lists[b].floor;
        }
    }
}

}  // namespace cfsfl
