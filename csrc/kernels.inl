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

FUNCTION void bag(float* out, const float* add_row, const float* table, int64_t D, const int64_t* items,
                  const float* weights, int64_t n) {
    const V zero = set1(0.0f);
    for (int64_t d = 0; d < D; d += LANES) {
        int in = D - d < LANES ? (int)(D - d) : LANES;
        V x = !add_row ? zero : in == LANES ? load(add_row + d) : load_head(add_row + d, in);
        in == LANES ? store(out + d, x) : store_head(out + d, x, in);
    }
    const int64_t whole = D / LANES * LANES;
    int64_t e = 0;
    while (e < n) {
        // Four entries at a time, so that the output is read and written once for four rows.
        const float* row[4];
        V w[4];
        int taken = 0;
        for (; e < n && taken < 4; ++e) {
            if (items[e] < 0) continue;
            row[taken] = table + items[e] * D;
            w[taken++] = set1(weights ? weights[e] : 1.0f);
        }
        for (int64_t a = e; a < n && a < e + 4; ++a)
            if (items[a] >= 0)
                for (int64_t d = 0; d < D; d += LANES) __builtin_prefetch(table + items[a] * D + d);
        if (taken == 4) {
            for (int64_t d = 0; d < whole; d += LANES) {
                V x = load(out + d);
                x = fma(w[0], load(row[0] + d), x);
                x = fma(w[1], load(row[1] + d), x);
                x = fma(w[2], load(row[2] + d), x);
                x = fma(w[3], load(row[3] + d), x);
                store(out + d, x);
            }
        } else {
            for (int i = 0; i < taken; ++i)
                for (int64_t d = 0; d < whole; d += LANES) store(out + d, fma(w[i], load(row[i] + d), load(out + d)));
        }
        if (whole < D) {
            int in = (int)(D - whole);
            V x = load_head(out + whole, in);
            for (int i = 0; i < taken; ++i) x = fma(w[i], load_head(row[i] + whole, in), x);
            store_head(out + whole, x, in);
        }
    }
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
