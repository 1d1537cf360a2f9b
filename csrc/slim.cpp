// Columns of SLIM: non-negative elastic nets of one item on all others, by coordinate descent on the Gram matrix.
//
//     w_j = argmin_{w >= 0, w_j = 0}  1/2 |X_j - X w|^2 + l2 / 2 |w|^2 + l1 sum w
//     w_i <- max(0, r_i + G_ii w_i - l1) / (G_ii + l2),    r = G_j - G w,    G = X^T X
//
// Shapes    G [M, M] -> columns [last - first, M], the weights of item first + n in row n.
// Traffic   Where X >= 0, r_i <= G_ij: items with G_ij <= l1 stay at 0 and are never looked at. Of the others, those that
//           ever were above 0 have their row of G gathered once; every change of a weight is one pass over such a row.
// Numerics  r and w in float64; one order of operations per column: the same bits on any number of threads.
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "ops.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(__SANITIZE_ADDRESS__)
#define WIDE __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define WIDE
#endif

namespace cfsfl {
namespace {

WIDE void subtract(double* r, const float* row, double change, int64_t n) {
    for (int64_t s = 0; s < n; ++s) r[s] -= change * row[s];
}

// One column, in memory that the next column uses again.
class Column {
 public:
    Column(const float* G, int64_t M, double l1, double l2) : G(G), M(M), l1(l1), l2(l2) {}

    // Writes the weights to out [M]; whether they converged.
    bool solve(float* out, int64_t j, double tolerance, int passes) {
        const float* own = G + j * M;
        items.clear(), r.clear(), norm.clear(), active.clear();
        for (int64_t i = 0; i < M; ++i)
            if (i != j && own[i] > l1) items.push_back(i), r.push_back(own[i]), norm.push_back(G[i * M + i]);
        const int64_t S = (int64_t)items.size();
        w.assign(S, 0.0), row.assign(S, -1);
        bool converged = false;
        for (int pass = 0; pass < passes && !converged; ++pass) {
            double moved = 0;
            for (int64_t s = 0; s < S; ++s) moved = std::max(moved, step(s));
            converged = moved <= tolerance;
            for (; moved > tolerance && pass < passes; ++pass) {  // among those that are not 0
                moved = 0;
                for (const int64_t s : active) moved = std::max(moved, step(s));
            }
        }
        std::memset(out, 0, M * sizeof(float));
        for (int64_t s = 0; s < S; ++s) out[items[s]] = (float)w[s];
        return converged;
    }

 private:
    // Moves one weight to its best; how far.
    double step(int64_t s) {
        const double best = std::max(0.0, r[s] + norm[s] * w[s] - l1) / (norm[s] + l2);
        const double change = best - w[s];
        if (change == 0) return 0;
        const int64_t S = (int64_t)items.size();
        if (row[s] < 0) {
            row[s] = (int64_t)active.size();
            active.push_back(s);
            if ((int64_t)rows.size() < (row[s] + 1) * S) rows.resize((row[s] + 1) * S);
            const float* from = G + items[s] * M;
            for (int64_t t = 0; t < S; ++t) rows[row[s] * S + t] = from[items[t]];
        }
        subtract(r.data(), rows.data() + row[s] * S, change, S);
        w[s] = best;
        return std::abs(change);
    }

    const float* G;
    const int64_t M;
    const double l1, l2;
    std::vector<int64_t> items, active, row;  // candidates; places of those ever above 0; where their row is
    std::vector<double> r, norm, w;
    std::vector<float> rows;
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
