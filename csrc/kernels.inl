// The kernels of kernels.h that are the same text for every instruction set, on the lanes of lanes_*.h.

// e^x for x <= 0 (and a little above): 2^n p(r), |r| <= ln 2 / 2; 0 where the result would be denormal.
INLINE V exp(V x) {
    const V least = set1(-87.3f);
    V y = max(least, x);
    V n = round_even(mul(y, set1(1.44269504f)));
    V r = fma(n, set1(-0.693359375f), y);
    r = fma(n, set1(2.12194440e-4f), r);
    V p = set1(1.9875691500e-4f);
    p = fma(p, r, set1(1.3981999507e-3f));
    p = fma(p, r, set1(8.3334519073e-3f));
    p = fma(p, r, set1(4.1665795894e-2f));
    p = fma(p, r, set1(1.6666665459e-1f));
    p = fma(p, r, set1(5.0000001201e-1f));
    p = add(fma(p, mul(r, r), r), set1(1.0f));
    return zero_below(scale2(p, n), x, least);
}

FUNCTION float dot(const float* x, const float* y, int H) {
    V lanes = set1(0.0f);
    int h = 0;
    for (; h + LANES <= H; h += LANES) lanes = fma(load(x + h), load(y + h), lanes);
    if (h < H) lanes = fma(load_head(x + h, H - h), load_head(y + h, H - h), lanes);
    return sum(lanes);
}

FUNCTION float norm2(const float* x, int H) {
    V a = set1(0.0f), b = a;
    int h = 0;
    for (; h + 2 * LANES <= H; h += 2 * LANES) {
        V p = load(x + h), q = load(x + h + LANES);
        a = fma(p, p, a);
        b = fma(q, q, b);
    }
    for (; h < H; h += LANES) {
        V p = load_head(x + h, H - h < LANES ? H - h : LANES);
        a = fma(p, p, a);
    }
    return sum(add(a, b));
}

FUNCTION float distance2(const float* x, const float* y, int H) {
    V a = set1(0.0f);
    int h = 0;
    for (; h + LANES <= H; h += LANES) {
        V d = sub(load(x + h), load(y + h));
        a = fma(d, d, a);
    }
    if (h < H) {
        V d = sub(load_head(x + h, H - h), load_head(y + h, H - h));
        a = fma(d, d, a);
    }
    return sum(a);
}

FUNCTION int filter(float* values, int32_t* ids, const float* s, int n, int32_t first, float floor) {
    const V t = set1(floor);
    int kept = 0, j = 0;
    for (; j + LANES <= n; j += LANES) {
        V x = load(s + j);
        unsigned mask = gt(x, t);
        if (mask) kept += append_from(values + kept, ids + kept, x, first + j, mask);
    }
    if (j < n) {
        V x = load_head(s + j, n - j);
        unsigned mask = gt(x, t) & ((1u << (n - j)) - 1);
        if (mask) kept += append_from(values + kept, ids + kept, x, first + j, mask);
    }
    return kept;
}

FUNCTION int count_ge(const float* values, int n, float t) {
    const V least = set1(t);
    int count = 0, i = 0;
    for (; i + LANES <= n; i += LANES) count += __builtin_popcount(ge(load(values + i), least));
    if (i < n) count += __builtin_popcount(ge(load_head(values + i, n - i), least) & ((1u << (n - i)) - 1));
    return count;
}

FUNCTION int keep_ge(float* values, int32_t* ids, int n, float t) {
    const V least = set1(t);
    int kept = 0;
    // The writes never pass the reads: what is stored ends at kept + LANES <= i + LANES.
    for (int i = 0; i < n; i += LANES) {
        int in = n - i < LANES ? n - i : LANES;
        V x = in == LANES ? load(values + i) : load_head(values + i, in);
        unsigned mask = ge(x, least) & (in == LANES ? 0xffffu : (1u << in) - 1);
        if (mask) kept += append_listed(values + kept, ids + kept, x, ids + i, mask);
    }
    return kept;
}

// N vectors of columns of `bag`, kept in registers while the entries pass; the last vector has `tail` if > 0.
template <int N>
FUNCTION void bag_columns(float* out, const float* add_row, const float* table, int64_t D, const int64_t* items,
                          const float* weights, int64_t n, int tail) {
    V x[N];
    for (int i = 0; i < N; ++i) {
        const bool whole = i + 1 < N || !tail;
        x[i] = !add_row ? set1(0.0f) : whole ? load(add_row + i * LANES) : load_head(add_row + i * LANES, tail);
    }
    for (int64_t e = 0; e < n; ++e) {
        if (e + 4 < n && items[e + 4] >= 0)
            for (int i = 0; i < N; ++i) __builtin_prefetch(table + items[e + 4] * D + i * LANES);
        if (items[e] < 0) continue;
        const float* row = table + items[e] * D;
        const V w = set1(weights ? weights[e] : 1.0f);
        for (int i = 0; i + 1 < N; ++i) x[i] = fma(w, load(row + i * LANES), x[i]);
        x[N - 1] = fma(w, tail ? load_head(row + (N - 1) * LANES, tail) : load(row + (N - 1) * LANES), x[N - 1]);
    }
    for (int i = 0; i + 1 < N; ++i) store(out + i * LANES, x[i]);
    tail ? store_head(out + (N - 1) * LANES, x[N - 1], tail) : store(out + (N - 1) * LANES, x[N - 1]);
}

FUNCTION void bag(float* out, const float* add_row, const float* table, int64_t D, const int64_t* items,
                  const float* weights, int64_t n) {
    // As many columns at a time as there are registers, then halves of that.
    int64_t d = 0;
    const auto sweep = [&](int N, decltype(&bag_columns<1>) columns) {
        for (; D - d > (int64_t)(N / 2) * LANES; d += N * LANES) {
            const int64_t left = D - d - (int64_t)(N - 1) * LANES;  // in the last vector
            if (left <= 0) return;
            columns(out + d, add_row ? add_row + d : nullptr, table + d, D, items, weights, n,
                    left < LANES ? (int)left : 0);
        }
    };
    if (BAG_VECTORS >= 16) sweep(16, bag_columns<16>);
    if (BAG_VECTORS >= 8) sweep(8, bag_columns<8>);
    sweep(4, bag_columns<4>);
    sweep(2, bag_columns<2>);
    sweep(1, bag_columns<1>);
}

FUNCTION float peak(const float* s, int n) {
    V best = set1(-__builtin_inff());
    int j = 0;
    for (; j + LANES <= n; j += LANES) best = max(best, load(s + j));
    float top = largest(best);
    for (; j < n; ++j) top = s[j] > top ? s[j] : top;
    return top;
}

FUNCTION float exp_sum(const float* s, int n, float shift) {
    const V m = set1(shift);
    V total = set1(0.0f);
    int j = 0;
    for (; j + LANES <= n; j += LANES) total = add(total, exp(sub(load(s + j), m)));
    float lanes[LANES], rest = 0.0f;
    if (j < n) {
        store(lanes, exp(sub(load_head(s + j, n - j), m)));
        for (int l = 0; l < n - j; ++l) rest += lanes[l];
    }
    return sum(total) + rest;
}

FUNCTION void softmax_grad(float* ds, float* total, const float* s, int n, float shift, float scale) {
    const V m = set1(shift), w = set1(scale);
    for (int j = 0; j < n; j += LANES) {
        int in = n - j < LANES ? n - j : LANES;
        if (in == LANES) {
            V d = mul(exp(sub(load(s + j), m)), w);
            store(ds + j, d);
            store(total + j, add(load(total + j), d));
        } else {
            V d = mul(exp(sub(load_head(s + j, in), m)), w);
            store_head(ds + j, d, in);
            store_head(total + j, add(load_head(total + j, in), d), in);
        }
    }
}
