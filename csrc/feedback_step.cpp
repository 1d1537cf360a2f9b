// The virtual user's turn, after the list: what it sees (16), its reward (3) and its feedback (4).
//
//     h = hx + sum_k w_k lookup[ids_k]         w_k = 1 / listed, or softmax over the listed scores
//     g = MLP_R(h),   v = MLP_F([h ; sigmoid(g)])
//
// Shapes    hx [B, D], lookup [M, D], ids and scores [B, K]; layers [out, in]; h [B, D], w [B, K], g [B], v [B, V].
// Traffic   under 1 % of the product that makes the list.
// Numerics  the layers are scored by equation (1) of kernels.h, so a user's answer has the same bits in any batch.
#include <omp.h>

#include <cmath>

#include "isa.h"
#include "ops.h"

namespace cfsfl {
namespace {

// One layer for R <= BLOCK_B users: y = x weight^T + bias, with ReLU except in the last.
void layer(const Kernels& kernels, float* y, int64_t ld, const float* x, int64_t stride, int R, const Layer& l,
           bool last) {
    kernels.score_block(y, ld, x, stride, R, l.weight, (int)l.out, l.bias, (int)l.in, nullptr, 0);
    if (last) return;
    for (int r = 0; r < R; ++r)
        for (int64_t i = 0; i < l.out; ++i) y[r * ld + i] = y[r * ld + i] < 0.0f ? 0.0f : y[r * ld + i];
}

// All layers; x and spare are [BLOCK_B, ld] and are written over, the answer is in the one returned.
float* layers(const Kernels& kernels, float* x, float* spare, int64_t ld, int R, const std::vector<Layer>& all) {
    for (size_t i = 0; i < all.size(); ++i) {
        layer(kernels, spare, ld, x, ld, R, all[i], i + 1 == all.size());
        std::swap(x, spare);
    }
    return x;
}

}  // namespace

void fuse(float* h, float* w, const float* hx, const float* lookup, const int64_t* ids, const float* scores, bool soft,
          int64_t B, int64_t K, int64_t D, int threads) {
    const Kernels& kernels = cfsfl::kernels();
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t b = 0; b < B; ++b) {
        const int64_t* list = ids + b * K;
        int64_t listed = 0;
        while (listed < K && list[listed] >= 0) ++listed;
        float* weight = w + b * K;
        double total = 0;
        for (int64_t k = 0; k < listed && soft; ++k)
            total += std::exp((double)scores[b * K + k] - (double)scores[b * K]);
        for (int64_t k = 0; k < K; ++k) {
            const bool in = k < listed;
            weight[k] = !in    ? 0.0f
                        : soft ? (float)(std::exp((double)scores[b * K + k] - (double)scores[b * K]) / total)
                               : 1.0f / (float)listed;
        }
        kernels.bag(h + b * D, hx + b * D, lookup, D, list, weight, listed);
    }
}

void respond(float* v, float* logit, const float* h, const std::vector<Layer>& reward,
             const std::vector<Layer>& feedback, int64_t B, int64_t D, int threads) {
    const Kernels& kernels = cfsfl::kernels();
    const int64_t V = feedback.back().out;
    int64_t ld = D + 1;
    for (const auto* all : {&reward, &feedback})
        for (const Layer& l : *all) ld = std::max(ld, l.out);
#pragma omp parallel num_threads(threads)
    {
        Array<float> x = array<float>(BLOCK_B * ld), spare = array<float>(BLOCK_B * ld);
#pragma omp for schedule(static)
        for (int64_t b = 0; b < B; b += BLOCK_B) {
            const int R = (int)std::min<int64_t>(BLOCK_B, B - b);
            for (int r = 0; r < R; ++r) std::copy_n(h + (b + r) * D, D, x.get() + r * ld);
            const float* g = layers(kernels, x.get(), spare.get(), ld, R, reward);
            for (int r = 0; r < R; ++r) logit[b + r] = g[r * ld];
            for (int r = 0; r < R; ++r) {
                std::copy_n(h + (b + r) * D, D, x.get() + r * ld);
                x[r * ld + D] = (float)(1.0 / (1.0 + std::exp(-(double)logit[b + r])));
            }
            const float* answer = layers(kernels, x.get(), spare.get(), ld, R, feedback);
            for (int r = 0; r < R; ++r) std::copy_n(answer + r * ld, V, v + (b + r) * V);
        }
    }
}

}  // namespace cfsfl
