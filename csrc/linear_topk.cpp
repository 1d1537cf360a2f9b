// Equation (2): ids and scores of the K best items of s = u weight^T + bias, listed items left out.
//
// Shapes    u [B, H], weight [M, H], bias [M] -> ids [B, K] int64, scores [B, K].
// Traffic   2 B M H flops over 4 M H bytes: bound by arithmetic. Scores live in a tile of BLOCK_B x BLOCK_M in the
//           first-level cache; what beats a user's floor goes to a shortlist of O(K).
// Numerics  equation (1) of kernels.h; score descending, then id ascending. NaN and -inf are no candidates.
//
// The screened search ranks upper bounds from 8-bit products (coarse.cpp), scores the best of them exactly, and proves
// by the bound on all the others that no list changed; a row without proof gets the full search.
#include "linear_topk.h"

#include <omp.h>

#include "isa.h"
#include "ops.h"

namespace cfsfl {

Rows::Rows(const Problem& whole, const std::vector<int64_t>& chosen) : p(whole), row(chosen.data()) {
    p.B = (int64_t)chosen.size();
    gathered = array<float>(p.B * p.H);
    for (int64_t b = 0; b < p.B; ++b)
        std::memcpy(gathered.get() + b * p.H, whole.u + chosen[b] * p.H, p.H * sizeof(float));
    p.u = gathered.get();
}

namespace {

// Ends a row: the candidates go to `keep`, the K best of them to `out`.
void finish(const Kernels& kernels, Shortlist& list, int64_t row, int C, Lists out, Candidates* keep,
            std::vector<uint64_t>& keys) {
    list.shrink(kernels, C, C / 4);
    if (keep) {
        std::copy(list.values, list.values + list.n, keep->upper.get() + row * keep->room);
        std::copy(list.ids, list.ids + list.n, keep->ids.get() + row * keep->room);
        keep->n[row] = list.n;
        keep->rest[row] = list.floor;
        list.shrink(kernels, out.K, out.K / 2);
    }
    best(out.ids + row * out.K, out.scores + row * out.K, list.values, list.ids, list.n, out.K, keys);
}

}  // namespace

void full_search(const Rows& rows, Lists out, Candidates* keep) {
    const Kernels& kernels = cfsfl::kernels();
    const Problem& p = rows.p;
    const int C = keep ? std::max(keep->size, out.K) : out.K;
    const int capacity = 2 * C + 192;
    const int64_t room = Shortlist::room(capacity);
    const Split split(p.B, p.M, p.threads);
    // Where the items are split, each task leaves its shortlists here.
    const bool joined = split.ranges > 1;
    const int64_t lists = joined ? p.B * split.ranges : 0;
    Array<float> all_values = array<float>(lists * room);
    Array<int32_t> all_ids = array<int32_t>(lists * room);
    std::vector<Shortlist> all(lists);
#pragma omp parallel num_threads(p.threads)
    {
        Array<float> values = array<float>(joined ? 0 : split.chunks.largest() * room);
        Array<int32_t> ids = array<int32_t>(joined ? 0 : split.chunks.largest() * room);
        std::vector<uint64_t> keys;
        std::vector<Shortlist> chunk_lists;
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < split.tasks; ++task) {
            const int64_t begin = split.begin(task), end = split.end(task), part = split.part(task);
            const int64_t first = split.first(task), last = std::min(first + split.range, p.M);
            chunk_lists.assign(end - begin, Shortlist());
            for (int64_t b = begin; b < end; ++b) {
                const int64_t place = joined ? b * split.ranges + part : b - begin;
                chunk_lists[b - begin].values = (joined ? all_values.get() : values.get()) + place * room;
                chunk_lists[b - begin].ids = (joined ? all_ids.get() : ids.get()) + place * room;
            }
            for_tiles(
                kernels, p, begin, end, first, last, [&](int64_t b) { return rows.of(b); },
                [&](int64_t b, const float* s, int64_t j, int n) {
                    chunk_lists[b - begin].add(kernels, s, n, (int32_t)j, C, capacity);
                });
            for (int64_t b = begin; b < end; ++b) {
                if (joined)
                    all[b * split.ranges + part] = chunk_lists[b - begin];
                else
                    finish(kernels, chunk_lists[b - begin], rows.of(b), C, out, keep, keys);
            }
        }
        if (joined) {
            values = array<float>(split.ranges * room);
            ids = array<int32_t>(split.ranges * room);
#pragma omp for schedule(static)
            for (int64_t b = 0; b < p.B; ++b) {
                Shortlist list;
                list.values = values.get();
                list.ids = ids.get();
                for (int64_t part = 0; part < split.ranges; ++part) {
                    const Shortlist& more = all[b * split.ranges + part];
                    std::copy(more.values, more.values + more.n, list.values + list.n);
                    std::copy(more.ids, more.ids + more.n, list.ids + list.n);
                    list.n += more.n;
                    list.floor = std::max(list.floor, more.floor);
                }
                finish(kernels, list, rows.of(b), C, out, keep, keys);
            }
        }
    }
}

bool Refiner::refine(const Kernels& kernels, const Problem& p, const float* u, float* upper, int32_t* items, int n,
                     float rest, int64_t* ids_out, float* scores_out, int K) {
    // Exact scores for those at places 0 .. exact - 1, which hold every candidate whose bound reaches t.
    int exact = 0;
    const auto score_from = [&](float t) {
        const int begin = exact;
        for (int i = begin; i < n; ++i)
            if (upper[i] >= t) {
                std::swap(upper[i], upper[exact]);
                std::swap(items[i], items[exact]);
                ++exact;
            }
        kernels.score_list(upper + begin, u, p.weight, p.bias, items + begin, exact - begin, (int)p.H);
        for (int i = begin; i < exact; ++i)
            if (!(upper[i] > -INF)) upper[i] = -INF;
    };
    float t = -INF;
    int count;
    if (n > K) t = cut(kernels, upper, n, K, K / 8, &count);
    score_from(t);
    float least = best(ids_out, scores_out, upper, items, exact, K, keys);
    if (exact < n && least < t) {
        const int before = exact;
        score_from(least);
        if (exact > before) least = best(ids_out, scores_out, upper, items, exact, K, keys);
    }
    return rest < least || rest == -INF;
}

void search(const Problem& p, const std::vector<int64_t>* chosen, Lists out, Candidates* keep, ItemCodes& codes,
            Counts& counts) {
    const Kernels& kernels = cfsfl::kernels();
    const Rows rows = chosen ? Rows(p, *chosen) : Rows(p);
    const int64_t n_rows = rows.p.B;
    // Fewer users do not pay for reading the items a second time in another form: bench_linear_topk.
    constexpr int64_t fewest = 24;
    const int C = keep ? keep->size : 2 * out.K + 64;
    if (!screening() || n_rows < fewest || out.K == 0 || C > p.M / 4) {
        full_search(rows, out, keep);
        counts.full += n_rows;
        return;
    }
    Candidates found(n_rows, C);
    coarse_search(rows, found, codes);
    std::vector<char> proved(n_rows, 0);
#pragma omp parallel num_threads(p.threads)
    {
        Refiner refiner;
#pragma omp for schedule(dynamic, 8)
        for (int64_t b = 0; b < n_rows; ++b) {
            const int64_t row = rows.of(b);
            float* upper = found.upper.get() + b * found.room;
            int32_t* items = found.ids.get() + b * found.room;
            proved[b] = refiner.refine(kernels, p, rows.p.u + b * p.H, upper, items, found.n[b], found.rest[b],
                                       out.ids + row * out.K, out.scores + row * out.K, out.K);
            if (keep && proved[b]) {
                std::copy(upper, upper + found.n[b], keep->upper.get() + row * keep->room);
                std::copy(items, items + found.n[b], keep->ids.get() + row * keep->room);
                keep->n[row] = found.n[b];
                keep->rest[row] = found.rest[b];
            }
        }
    }
    std::vector<int64_t> open;
    for (int64_t b = 0; b < n_rows; ++b)
        if (!proved[b]) open.push_back(rows.of(b));
    counts.screened += n_rows - (int64_t)open.size();
    counts.full += (int64_t)open.size();
    if (!open.empty()) full_search(Rows(p, open), out, keep);
}

void linear_topk(const Problem& p, Lists out, LoopState* state) {
    if (out.K == 0 || p.B == 0) return;
    if (state) {
        state->topk(p, out);
        return;
    }
    ItemCodes codes;
    Counts counts;
    search(p, nullptr, out, nullptr, codes, counts);
}

}  // namespace cfsfl
