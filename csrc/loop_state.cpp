// The lists of one loop's steps, each from the one before: exact top-K without a full product.
//
// A user whose code has the bits of the step before keeps the list. For the others, with d = ||u_t - u_(t-1)||,
//
//     s_t(j) <= s_(t-1)(j) + d ||w_j||                         (Cauchy and Schwarz)                                (1)
//
// moves the bound of every candidate and the one bound for all items that are not candidates (with the largest norm).
// The best candidates are scored again; the list is proved when its last score beats the bound on the rest. Rounding:
// computed scores are within (ceil(H / 16) + 6) 2^-24 ||u|| ||w|| of the true ones before the bias is added, and both
// additions round.
#include <omp.h>

#include <cmath>

#include "isa.h"
#include "linear_topk.h"

namespace cfsfl {
namespace {

// Candidates kept for each user; more prove more steps and cost more to look at: bench_feedback_step.
constexpr int CANDIDATES = 512;

constexpr double LARGEST = 1e30;  // products of norms beyond this prove nothing

double norm_bound(double squares, int64_t H) {
    return std::sqrt(squares + H * 1.2e-38) * (1 + (H / LANES + 8) * 1.2e-7);
}

// A bound on a computed score after its true value moved by no more than `by`.
float moved(float bound, double by) {
    if (bound == -INF) return bound;  // no item, or one that can never be listed
    const double up = bound + by + std::fabs((double)bound) * std::ldexp(1.0, -22);
    return (float)(up + std::fabs(up) * std::ldexp(1.0, -22) + 1e-33);
}

}  // namespace

bool LoopState::fits(const Problem& p) const {
    return p.weight == weight_ && p.bias == bias_ && p.B == B_ && p.M == M_ && p.H == H_;
}

void LoopState::start(const Problem& p, Lists out) {
    const Kernels& kernels = cfsfl::kernels();
    weight_ = p.weight, bias_ = p.bias, B_ = p.B, M_ = p.M, H_ = p.H, K_ = 0;
    codes_.first = -1;
    u_ = array<float>(p.B * p.H);
    u_norm_.assign(p.B, INF);
    norms_.resize(p.M);
    float largest = 0;
    bool sound = true;
#pragma omp parallel for schedule(static) num_threads(p.threads) reduction(max : largest) reduction(&& : sound)
    for (int64_t j = 0; j < p.M; ++j) {
        norms_[j] = (float)norm_bound(kernels.norm2(p.weight + j * p.H, (int)p.H), p.H);
        largest = std::max(largest, norms_[j]);
        sound = sound && norms_[j] < LARGEST;
    }
    largest_norm_ = largest;
    const int C = (int)std::min<int64_t>(std::max(CANDIDATES, 4 * out.K), p.M);
    bounded_ = sound && 2 * out.K <= C;
    if (bounded_) kept_ = Candidates(p.B, C);
}

// One row from the step before; false where nothing is proved.
bool LoopState::advance(const Kernels& kernels, const Problem& p, int64_t b, Refiner& refiner, Lists out) {
    const float* u = p.u + b * p.H;
    const double norm = norm_bound(kernels.norm2(u, (int)p.H), p.H);
    const double gone = norm_bound(kernels.distance2(u, u_.get() + b * p.H, (int)p.H), p.H);
    const double rounding = ((p.H + LANES - 1) / LANES + 6) * std::ldexp(1.0, -24);
    const double d = (gone + rounding * (norm + u_norm_[b])) * 1.000001;
    if (!(d * largest_norm_ < LARGEST) || !((norm + u_norm_[b]) * largest_norm_ < LARGEST)) return false;
    const float rest = moved(kept_.rest[b], d * largest_norm_);
    // Where the bound on the rest passes the old list's end, scoring the candidates again is hardly ever a proof.
    if (rest != -INF && out.K <= K_ && !(rest < scores_[b * K_ + out.K - 1])) return false;
    float* upper = kept_.upper.get() + b * kept_.room;
    int32_t* items = kept_.ids.get() + b * kept_.room;
    for (int i = 0; i < kept_.n[b]; ++i) upper[i] = moved(upper[i], d * norms_[items[i]]);
    kept_.rest[b] = rest;
    return refiner.refine(kernels, p, u, upper, items, kept_.n[b], rest, out.ids + b * out.K, out.scores + b * out.K,
                          out.K);
}

void LoopState::topk(const Problem& p, Lists out) {
    const Kernels& kernels = cfsfl::kernels();
    const int K = out.K;
    const bool first = !fits(p);
    if (first) start(p, out);
    const bool bounded = bounded_ && 2 * K <= kept_.size;
    enum : char { OPEN, REPEATED, REFINED };
    std::vector<char> how(p.B, OPEN);
    if (!first) {
#pragma omp parallel num_threads(p.threads)
        {
            Refiner refiner;
#pragma omp for schedule(dynamic, 8)
            for (int64_t b = 0; b < p.B; ++b) {
                if (K <= K_ && std::memcmp(u_.get() + b * p.H, p.u + b * p.H, p.H * sizeof(float)) == 0) {
                    std::copy_n(ids_.data() + b * K_, K, out.ids + b * K);
                    std::copy_n(scores_.data() + b * K_, K, out.scores + b * K);
                    how[b] = REPEATED;
                } else if (bounded && advance(kernels, p, b, refiner, out)) {
                    how[b] = REFINED;
                }
            }
        }
    }
    std::vector<int64_t> open;
    int64_t repeated = 0;
    for (int64_t b = 0; b < p.B; ++b) {
        if (how[b] == OPEN) open.push_back(b);
        repeated += how[b] == REPEATED;
    }
    counts.repeated += repeated;
    counts.refined += p.B - repeated - (int64_t)open.size();
    // Where most of those that moved moved too far, later steps are searched without keeping candidates.
    if (!first && bounded && 2 * (int64_t)open.size() > p.B - repeated) bounded_ = false;
    if (!open.empty())
        search(p, (int64_t)open.size() == p.B ? nullptr : &open, out, bounded && bounded_ ? &kept_ : nullptr, codes_,
               counts);
    if (!bounded) bounded_ = false;
    if (K != K_) {
        K_ = K;
        ids_.resize(p.B * K);
        scores_.resize(p.B * K);
        how.assign(p.B, OPEN);
    }
#pragma omp parallel for schedule(static) num_threads(p.threads)
    for (int64_t b = 0; b < p.B; ++b) {
        if (how[b] == REPEATED) continue;
        std::memcpy(u_.get() + b * p.H, p.u + b * p.H, p.H * sizeof(float));
        u_norm_[b] = (float)(norm_bound(kernels.norm2(p.u + b * p.H, (int)p.H), p.H) * 1.000001);
        std::copy_n(out.ids + b * K, K, ids_.data() + b * K);
        std::copy_n(out.scores + b * K, K, scores_.data() + b * K);
    }
}

}  // namespace cfsfl
