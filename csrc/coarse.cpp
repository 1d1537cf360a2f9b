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
// Traffic   B M H multiply-adds of 8 bits, a quarter of the time of float32. Codes of at most BUDGET bytes are held: a
//           catalogue that fits is coded once for all steps of a loop, a larger one in parts at every search.
#include <omp.h>

#include <cmath>

#include "isa.h"
#include "linear_topk.h"

namespace cfsfl {
namespace {

constexpr int64_t BUDGET = 16 << 20;
constexpr double TOO_LARGE = 1e30;  // of a squared norm

double rounding(const Problem& p) { return ((p.H + LANES - 1) / LANES + 24) * std::ldexp(1.0, -24); }

float tiny(const Problem& p) { return (float)(p.H + 64) * 4e-38f; }

int64_t words(const Problem& p) { return (p.H + 3) / 4; }

}  // namespace

void ItemCodes::reserve(const Problem& p, int64_t items) {
    if ((int64_t)scale.size() >= items && first >= 0) return;
    first = last = -1;
    q = array<int8_t>(items * words(p) * 4);
    for (auto* v : {&scale, &norm, &error, &bias}) v->resize(items);
    offset.resize(items);
}

void ItemCodes::code(const Kernels& kernels, const Problem& p, int64_t from, int64_t to) {
    const double grown = 1.000001 + rounding(p), share = std::ldexp(1.0, -21);
#pragma omp for schedule(static)
    for (int64_t at = 0; at < to - from; at += COARSE_M) {
        const int n = (int)std::min<int64_t>(COARSE_M, to - from - at);
        kernels.coarse_items(q.get() + at * words(p) * 4, &scale[at], &offset[at], &norm[at], &error[at],
                             p.weight + (from + at) * p.H, n, (int)p.H);
        for (int64_t i = at; i < at + n; ++i) {
            const double norm2 = norm[i], b = p.bias[from + i];
            norm[i] = (float)(std::sqrt(norm2 + tiny(p)) * grown);
            error[i] = (float)(std::sqrt((double)error[i] + tiny(p)) * grown);
            bias[i] = (float)(b + std::fabs(b) * share + tiny(p));
            if (!(norm2 < TOO_LARGE) || std::isnan(b)) {
                bias[i] = INF;
                scale[i] = norm[i] = error[i] = 0.0f;
            }
        }
        for (int64_t i = at + n; i < at + COARSE_M; ++i) bias[i] = -INF;
    }
#pragma omp single
    {
        first = from;
        last = to;
    }
}

void coarse_search(const Rows& rows, Candidates& keep, ItemCodes& codes) {
    const Kernels& kernels = cfsfl::kernels();
    const Problem& p = rows.p;
    const int C = keep.size, capacity = C + C / 2 + 64;
    const int64_t room = Shortlist::room(capacity);
    const int64_t user_bytes = words(p) * COARSE_B * 4, item_bytes = words(p) * COARSE_M * 4;
    const int64_t at_once = std::max<int64_t>(BUDGET / item_bytes, 1) * COARSE_M;
    const int64_t part = std::min(at_once, (p.M + COARSE_M - 1) / COARSE_M * COARSE_M);
    const Chunks chunks(p.B, COARSE_B, 66, p.threads);
    const int64_t padded = chunks.blocks * COARSE_B;

    codes.reserve(p, part);
    Array<uint8_t> user_q = array<uint8_t>(chunks.blocks * user_bytes);
    std::vector<float> user_scale(padded, 0.0f), user_a(padded, 0.0f), user_b(padded, 0.0f);
    Array<float> values = array<float>(p.B * room);
    Array<int32_t> ids = array<int32_t>(p.B * room);
    std::vector<Shortlist> lists(p.B);
    std::vector<Excluded> excluded(p.B);

    const auto code_users = [&](int64_t block) {
        uint8_t* q = user_q.get() + block * user_bytes;
        std::memset(q, 128, user_bytes);
        for (int64_t b = block * COARSE_B; b < std::min(p.B, (block + 1) * COARSE_B); ++b) {
            double error2, norm2;
            kernels.coarse_users(q, &user_scale[b], &error2, &norm2, p.u + b * p.H, (int)p.H,
                                 (int)(b - block * COARSE_B));
            const double norm = std::sqrt(norm2) * 1.000001, error = std::sqrt(error2) * 1.000001;
            user_a[b] = (float)((error + rounding(p) * norm) * 1.000001);
            user_b[b] = (float)((norm + error) * 1.000001);
            lists[b].values = values.get() + b * room;
            lists[b].ids = ids.get() + b * room;
            excluded[b] = Excluded(p, rows.of(b), 0);
            keep.rest[b] = norm2 < TOO_LARGE ? -INF : INF;
        }
    };
    const auto search_panel = [&](int64_t chunk, int64_t at) {
        alignas(64) float upper[COARSE_B * COARSE_M];
        const int64_t j = codes.first + at;
        const int n = (int)std::min<int64_t>(COARSE_M, codes.last - j);
        for (int64_t b0 = chunks.begin(chunk); b0 < chunks.end(chunk); b0 += COARSE_B) {
            kernels.coarse_block(upper, user_q.get() + b0 / COARSE_B * user_bytes, &user_scale[b0], &user_a[b0],
                                 &user_b[b0], codes.q.get() + at / COARSE_M * item_bytes, &codes.scale[at],
                                 &codes.offset[at], &codes.norm[at], &codes.error[at], &codes.bias[at], (int)p.H);
            for (int64_t b = b0; b < std::min(p.B, b0 + COARSE_B); ++b) {
                float* s = upper + (b - b0) * COARSE_M;
                excluded[b].mask(s, j, n);
                lists[b].add(kernels, s, n, (int32_t)j, C, capacity);
            }
        }
    };
#pragma omp parallel num_threads(p.threads)
    for (int64_t from = 0; from < p.M; from += part) {
        const int64_t to = std::min(from + part, p.M);
        if (codes.first != from || codes.last != to) {
#pragma omp barrier
            codes.code(kernels, p, from, to);
        }
#pragma omp for schedule(dynamic, 1)
        for (int64_t chunk = 0; chunk < chunks.n; ++chunk) {
            if (from == 0)
                for (int64_t b = chunks.begin(chunk); b < chunks.end(chunk); b += COARSE_B) code_users(b / COARSE_B);
            for (int64_t at = 0; at < to - from; at += COARSE_M) search_panel(chunk, at);
            if (to < p.M) continue;
            for (int64_t b = chunks.begin(chunk); b < chunks.end(chunk); ++b) {
                lists[b].shrink(kernels, C, C / 4);
                const bool sound = keep.rest[b] == -INF;
                keep.n[b] = sound ? lists[b].n : 0;
                if (sound) keep.rest[b] = lists[b].floor;
                std::copy_n(lists[b].values, keep.n[b], keep.upper.get() + b * keep.room);
                std::copy_n(lists[b].ids, keep.n[b], keep.ids.get() + b * keep.room);
            }
        }
    }
}

}  // namespace cfsfl
