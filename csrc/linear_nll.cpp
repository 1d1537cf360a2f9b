// The multinomial loss of s = u weight^T + bias against CSR rows x, in one pass over the scores.
//
//     nll = |x| logsumexp(s) - sum_{j in x} s_j                                                                     (1)
//     ds_j = dnll (|x| exp(s_j - logsumexp(s)) - [j in x])                                                          (2)
//
// Shapes    u [B, H], weight [M, H], bias [M]; items [E], offsets [B + 1]; nll, lse [B]; scores, ds [B, M].
// Traffic   2 B M H flops forward, on tiles in the first-level cache; backward one pass over ds [B, columns] in memory,
//           then the library's two products.
// Numerics  float32 exponentials, summed over SEGMENT items at a time and joined in double, in item order: the same
//           bits on any number of threads and in any batch. Exponentials and gradients below the normal range are 0.
#include <omp.h>

#include <cmath>

#include "isa.h"
#include "ops.h"

namespace cfsfl {

void linear_nll(const Problem& p, float* nll, float* lse, Lists out, const int64_t* items, const int64_t* offsets,
                float* scores) {
    const Kernels& kernels = cfsfl::kernels();
    const int K = out.K, capacity = 2 * K + 192;
    const int64_t room = Shortlist::room(capacity);
    const Split split(p.B, p.M, p.threads);
    const int64_t segments = (p.M + SEGMENT - 1) / SEGMENT;
    // max and sum exp(s - max) of each segment.
    Array<float> peaks = array<float>(segments * p.B), sums = array<float>(segments * p.B);
    const int64_t lists = K ? p.B * split.ranges : 0;
    Array<float> values = array<float>(lists * room);
    Array<int32_t> ids = array<int32_t>(lists * room);
    std::vector<Shortlist> all(lists);
    for (int64_t i = 0; i < lists; ++i) {
        all[i].values = values.get() + i * room;
        all[i].ids = ids.get() + i * room;
    }
#pragma omp parallel num_threads(p.threads)
    {
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < split.tasks; ++task) {
            const int64_t begin = split.begin(task), end = split.end(task), part = split.part(task);
            const int64_t first = split.first(task), last = std::min(first + split.range, p.M);
            for_tiles(
                kernels, p, begin, end, first, last, [](int64_t b) { return b; },
                [&](int64_t b, const float* s, int64_t j, int n) {
                    float& peak = peaks[j / SEGMENT * p.B + b];
                    float& sum = sums[j / SEGMENT * p.B + b];
                    if (j % SEGMENT == 0) peak = -INF, sum = 0.0f;
                    const float here = kernels.peak(s, n);
                    if (here > peak) {
                        sum *= (float)std::exp((double)peak - (double)here);
                        peak = here;
                    }
                    sum += kernels.exp_sum(s, n, peak == -INF ? 0.0f : peak);
                    if (scores) std::copy_n(s, n, scores + b * p.M + j);
                    if (K) all[b * split.ranges + part].add(kernels, s, n, (int32_t)j, K, capacity);
                });
        }
        std::vector<uint64_t> keys;
        std::vector<float> joined_values, hits;
        std::vector<int32_t> joined_ids;
#pragma omp for schedule(dynamic, 8)
        for (int64_t b = 0; b < p.B; ++b) {
            double peak = -INF, sum = 0;
            for (int64_t i = 0; i < segments; ++i) peak = std::max(peak, (double)peaks[i * p.B + b]);
            for (int64_t i = 0; i < segments; ++i)
                if (sums[i * p.B + b] != 0.0f)
                    sum += (double)sums[i * p.B + b] * std::exp((double)peaks[i * p.B + b] - peak);
            const double total = peak == -INF && sum == 0 ? -INF : peak + std::log(sum);
            lse[b] = (float)total;
            // The targets' scores: those stored, or the same bits again.
            const int64_t e = offsets[b], count = offsets[b + 1] - e;
            double hit = 0;
            if (scores) {
                for (int64_t i = 0; i < count; ++i) hit += scores[b * p.M + items[e + i]];
            } else {
                hits.resize(count);
                joined_ids.assign(items + e, items + e + count);
                kernels.score_list(hits.data(), p.u + b * p.H, p.weight, p.bias, joined_ids.data(), (int)count,
                                   (int)p.H);
                for (float s : hits) hit += s;
            }
            nll[b] = count ? (float)(count * total - hit) : 0.0f;
            if (!K) continue;
            joined_values.clear();
            joined_ids.clear();
            for (int64_t part = 0; part < split.ranges; ++part) {
                const Shortlist& list = all[b * split.ranges + part];
                joined_values.insert(joined_values.end(), list.values, list.values + list.n);
                joined_ids.insert(joined_ids.end(), list.ids, list.ids + list.n);
            }
            best(out.ids + b * K, out.scores + b * K, joined_values.data(), joined_ids.data(),
                 (int)joined_values.size(), K, keys);
        }
    }
}

void linear_nll_backward(const Problem& p, float* ds, int64_t ld, float* dbias, const float* dnll, const float* lse,
                         const int64_t* items, const int64_t* offsets, const float* scores, int64_t first,
                         int64_t last) {
    const Kernels& kernels = cfsfl::kernels();
    // Columns that one thread sums over all users, so that the sum has one order.
    constexpr int64_t columns = SEGMENT;
#pragma omp parallel num_threads(p.threads)
    {
        FlushScope flush;
        float total[columns];
#pragma omp for schedule(dynamic, 1)
        for (int64_t j0 = first; j0 < last; j0 += columns) {
            const int64_t j1 = std::min(j0 + columns, last);
            std::fill_n(total, columns, 0.0f);
            const auto row = [&](int64_t b, const float* s, int64_t j, int n) {
                const float scale = dnll[b] * (float)(offsets[b + 1] - offsets[b]);
                kernels.softmax_grad(ds + b * ld + (j - first), total + (j - j0), s, n, lse[b] == -INF ? 0.0f : lse[b],
                                     scale);
            };
            if (scores) {
                for (int64_t b = 0; b < p.B; ++b) row(b, scores + b * p.M + j0, j0, (int)(j1 - j0));
            } else {
                for_tiles(kernels, p, 0, p.B, j0, j1, [](int64_t b) { return b; }, row);
            }
            std::copy_n(total, j1 - j0, dbias + j0);
        }
    }
    // The targets' -dnll. Rows are few and short beside [B, M]: one thread, one order.
    for (int64_t b = 0; b < p.B; ++b)
        for (int64_t e = offsets[b]; e < offsets[b + 1]; ++e)
            if (items[e] >= first && items[e] < last) {
                ds[b * ld + items[e] - first] -= dnll[b];
                dbias[items[e]] -= dnll[b];
            }
}

}  // namespace cfsfl
