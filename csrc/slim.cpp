// Columns of SLIM: non-negative elastic nets of one item on all others, by coordinate descent on the Gram matrix.
//
//     w_j = argmin_{w >= 0, w_j = 0}  1/2 |X_j - X w|^2 + l2 / 2 |w|^2 + l1 sum w
//     w_i <- max(0, r_i + G_ii w_i - l1) / (G_ii + l2),    r = G_j - G w,    G = X^T X
//
// Shapes    G [M, M] -> columns [last - first, M], the weights of item first + n in row n.
// Traffic   Where X >= 0, r_i <= G_ij: items with G_ij <= l1 stay at 0 and are never looked at. The others, S of them, are
//           admitted to the descent by what they would gain, twice as many each time, until nobody outside would move;
//           the A inside share a Gram matrix of their own. A time costs A^2 a sweep, and A S for the r of all.
// Numerics  r and w in float64; one order of operations per column: the same bits on any number of threads.
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>
#include <vector>

#include "ops.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(__SANITIZE_ADDRESS__)
#define WIDE __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define WIDE
#endif

namespace cfsfl {
namespace {

constexpr int64_t FIRST = 32;  // admitted at once

WIDE void subtract(double* r, const float* row, double change, int64_t n) {
    for (int64_t s = 0; s < n; ++s) r[s] -= change * row[s];
}

WIDE void subtract(double* r, const float* row, const int64_t* items, double change, int64_t n) {
    for (int64_t s = 0; s < n; ++s) r[s] -= change * row[items[s]];
}

// One column, in memory that the next column uses again.
class Column {
 public:
    Column(const float* G, int64_t M, double l1, double l2) : G(G), M(M), l1(l1), l2(l2) {}

    // Writes the weights to out [M]; whether they converged.
    bool solve(float* out, int64_t j, double tolerance, int passes) {
        const float* own = G + j * M;
        items.clear(), r.clear(), norm.clear(), inside.clear(), w.clear();
        for (int64_t i = 0; i < M; ++i)
            if (i != j && own[i] > l1) items.push_back(i), r.push_back(own[i]), norm.push_back(G[i * M + i]);
        is_inside.assign(items.size(), false);
        bool converged = !admit(tolerance);
        for (int pass = 0; pass < passes && !converged;) {
            before = w;
            for (double moved = INFINITY; moved > tolerance && pass < passes; ++pass) moved = sweep();
            tell_all();
            converged = pass < passes && !admit(tolerance);
        }
        std::memset(out, 0, M * sizeof(float));
        for (size_t a = 0; a < inside.size(); ++a) out[items[inside[a]]] = (float)w[a];
        return converged;
    }

 private:
    // Takes those in who gain most of all that would move; whether there were any.
    bool admit(double tolerance) {
        wanting.clear();
        for (int64_t s = 0; s < (int64_t)items.size(); ++s)
            if (!is_inside[s] && r[s] - l1 > tolerance * (norm[s] + l2)) wanting.push_back(s);
        if (wanting.empty()) return false;
        const auto gain = [this](int64_t s) { return (r[s] - l1) * (r[s] - l1) / (norm[s] + l2); };
        const int64_t room = std::max(FIRST, (int64_t)inside.size());
        if ((int64_t)wanting.size() > room) {
            const auto more = [&](int64_t s, int64_t t) {
                return std::make_pair(gain(s), t) > std::make_pair(gain(t), s);
            };
            std::nth_element(wanting.begin(), wanting.begin() + room, wanting.end(), more);
            wanting.resize(room);
        }
        for (const int64_t s : wanting) inside.push_back(s), is_inside[s] = true, w.push_back(0.0);
        const size_t A = inside.size();
        near.resize(A), gram.resize(A * A);
        for (size_t a = 0; a < A; ++a) {
            const float* from = G + items[inside[a]] * M;
            near[a] = r[inside[a]];
            for (size_t b = 0; b < A; ++b) gram[a * A + b] = from[items[inside[b]]];
        }
        return true;
    }

    // Moves every weight inside to its best, one after the other; how far the one that moved most.
    double sweep() {
        const size_t A = inside.size();
        double most = 0;
        for (size_t a = 0; a < A; ++a) {
            const double own = norm[inside[a]];
            const double best = std::max(0.0, near[a] + own * w[a] - l1) / (own + l2), change = best - w[a];
            if (change == 0) continue;
            subtract(near.data(), gram.data() + a * A, change, A);
            w[a] = best;
            most = std::max(most, std::abs(change));
        }
        return most;
    }

    // r of all candidates after what changed inside.
    void tell_all() {
        for (size_t a = 0; a < inside.size(); ++a)
            if (w[a] != before[a])
                subtract(r.data(), G + items[inside[a]] * M, items.data(), w[a] - before[a], (int64_t)items.size());
    }

    const float* G;
    const int64_t M;
    const double l1, l2;
    std::vector<int64_t> items, inside, wanting;  // candidates [S]; places among them of the A inside, and who wants in
    std::vector<char> is_inside;                  // [S]
    std::vector<double> r, norm;                  // [S]
    std::vector<double> w, before, near;          // [A]: weights, those of the last time, r
    std::vector<float> gram;                      // [A, A]
};

}  // namespace

int64_t slim(float* columns, const float* G, int64_t M, int64_t first, int64_t last, double l1, double l2,
             double tolerance, int passes, int threads) {
    int64_t unfinished = 0;
#pragma omp parallel num_threads(threads) reduction(+ : unfinished)
    {
        Column column(G, M, l1, l2);
#pragma omp for schedule(dynamic, 1)
        for (int64_t j = first; j < last; ++j)
            unfinished += !column.solve(columns + (j - first) * M, j, tolerance, passes);
    }
    return unfinished;
}

}  // namespace cfsfl
