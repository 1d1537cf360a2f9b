"""One turn of the virtual user: scores in, feedback out, in one launch.

    a  = the K best items of s                                                          (2)
    h  = hx + sum_{k in a} w_k L_k         w = 1/K or the softmax of the listed scores  (16)
    g  = MLP_R(h),  R = sigmoid(g)         ReLU between                                 (3)
    v  = MLP_F([h ; R])                                                                 (4)
    p  = hoisted + v^ Wv                   v^ = v / max(|v|, 1e-12): where the recommender's next pass begins

One program per user selects and gathers. It then takes a ticket; the last to arrive of each GROUP users runs the dense
part for all of them with `tl.dot`: 200 KB of weights are read once per group, not per user, and the ticket counter
returns to 0. A user whose code has not moved since the step before (`resting`) gets that step's answers copied, and so
does a group without anyone who has.

Shapes    s [B, M] in a scratch buffer (`scores`), hx [B, D], L [M, D]; weights [out, in] and biases [out] of four and
          three layers.
Traffic   2 B M itemsize bytes of scores from cache, B K D itemsize of L, B / GROUP times the weights; 0.3 MFLOP per
          user. Bound by the latency of one program at B = 500, by cache bandwidth above.
Numerics  Selection exact in the dtype of s. Sums in float32. The dense part multiplies as `tile.dot_precision` says.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from cfsfl_fast import library
from cfsfl_fast.kernels.linear_topk import empty_lists, list_of_user, pending, store_list
from cfsfl_fast.kernels.scores import LoopState
from cfsfl_fast.kernels.tile import (
    CSR,
    MAX_K,
    add_listed_rows,
    covers,
    dot_precision,
    on_its_device,
    power_of_two,
    row_tile,
    rows_first,
    vector,
    weights_of_list,
)

Layers = Sequence[tuple[Tensor, Tensor]]

GROUP = 16
"""Users that share one pass over the weights: the rows of one tensor-core instruction."""


@triton.jit
def multiply(
    x_ptr, in_rows, w_ptr, stride_i, stride_o, o, N_IN, N_OUT,
    BLOCK_IN: tl.constexpr, BLOCK_I: tl.constexpr, GROUP: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Rows of x [GROUP, N_IN] times a matrix of elements w[i stride_i + o stride_o]. [GROUP, len(o)] float32

    x comes from memory, BLOCK_I columns at a time: whole operands of `tl.dot` would not fit the registers.
    """
    y = tl.zeros((GROUP, o.shape[0]), tl.float32)
    r = tl.arange(0, GROUP)[:, None]
    for i0 in tl.range(0, BLOCK_IN, BLOCK_I, num_stages=1 if PREC == "ieee" else 2):
        i = i0 + tl.arange(0, BLOCK_I)
        # Written by other programs or other threads a moment ago: not from the first-level cache.
        x = tl.load(
            x_ptr + r * N_IN + i[None, :], mask=in_rows[:, None] & (i < N_IN)[None, :], other=0.0, cache_modifier=".cg"
        )
        at = i[:, None] * stride_i + o[None, :] * stride_o
        w = tl.load(w_ptr + at, mask=(i < N_IN)[:, None] & (o < N_OUT)[None, :], other=0.0)
        y = tl.dot(x.to(w.dtype), w, y, input_precision=PREC)
    return y


@triton.jit
def layer(
    x_ptr, in_rows, w_ptr, b_ptr, N_IN, N_OUT, stride,
    BLOCK_IN: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_I: tl.constexpr, GROUP: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """A linear layer with weight [N_OUT, N_IN] and bias [N_OUT]. [GROUP, BLOCK_OUT] float32"""
    o = tl.arange(0, BLOCK_OUT)
    y = multiply(x_ptr, in_rows, w_ptr, 1, stride, o, N_IN, N_OUT, BLOCK_IN, BLOCK_I, GROUP, PREC)
    return y + tl.load(b_ptr + o, mask=o < N_OUT, other=0.0).to(tl.float32)[None, :]


@triton.jit
def hand_on(x_ptr, x, N, BLOCK: tl.constexpr, GROUP: tl.constexpr):
    """Writes relu(x) [GROUP, N] for the next layer; NaN stays NaN."""
    c = tl.arange(0, BLOCK)
    tl.store(x_ptr + tl.arange(0, GROUP)[:, None] * N + c[None, :], tl.where(x < 0, 0.0, x), mask=(c < N)[None, :])
    tl.debug_barrier()


@triton.jit
def feedback_step_fwd_kernel(
    v_ptr, logit_ptr, h_ptr, ids_ptr, best_ptr, w_ptr, next_ptr,    # out [B, V], [B], [B, D], [B, K] x 3, [B, H]
    scores_ptr, buffer_ptr, found_ptr, run_ptr,                     # scratch: the pending lists
    ticket_ptr, one_ptr, two_ptr,                                   # scratch [B / G], [B / G, G, BLOCK_F] twice
    old_v_ptr, old_logit_ptr, old_h_ptr, old_ids_ptr, old_best_ptr, old_w_ptr, old_next_ptr,    # in: the step before's
    moved_ptr, active_ptr, open_ptr,                                # [B], [1], [B]; active becomes 0
    items_ptr, offsets_ptr,                                         # excluded [E], [B + 1]
    hx_ptr, lookup_ptr,                                             # [B, D], [M, D]
    r0_ptr, q0_ptr, r1_ptr, q1_ptr, r2_ptr, q2_ptr, r3_ptr, q3_ptr, # reward: weights r, biases q
    f0_ptr, c0_ptr, f1_ptr, c1_ptr, f2_ptr, c2_ptr,                 # feedback: weights f, biases c
    hoisted_ptr, wv_ptr,                                            # [B, H], [V, H]
    start, M, N, K, step, stride_scores,
    B, D, R0, R1, R2, F0, F1, V, H,
    stride_hx, stride_lookup,
    stride_r0, stride_r1, stride_r2, stride_f0, stride_f1, stride_f2,
    stride_hoisted, stride_wv,
    VEC: tl.constexpr, VEC_H: tl.constexpr, UNIFORM: tl.constexpr, DENSE: tl.constexpr,
    LOOKED: tl.constexpr, RESTING: tl.constexpr,
    CARRIED: tl.constexpr, FILTERED: tl.constexpr, HAS_EXCLUDE: tl.constexpr,
    K_LOG: tl.constexpr, CHUNK_LOG: tl.constexpr, LANES: tl.constexpr, CAPACITY: tl.constexpr, ASM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_I: tl.constexpr, GROUP: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Equations (2), (16), (3), (4). One program per user; the last of GROUP users runs the layers for all of them."""
    D, stride_hx, stride_lookup = D // VEC * VEC, stride_hx // VEC * VEC, stride_lookup // VEC * VEC
    H, stride_hoisted, stride_wv = H // VEC_H * VEC_H, stride_hoisted // VEC_H * VEC_H, stride_wv // VEC_H * VEC_H
    b = tl.program_id(0)
    list_at, h_at = b.to(tl.int64) * K, b.to(tl.int64) * D
    if LOOKED:  # noqa: SIM102  (a constexpr: one branch is compiled)
        if b == 0:
            tl.store(active_ptr, 0)
    moved = True
    if RESTING:
        moved = tl.load(moved_ptr + b) != 0
    if moved:
        run = list_of_user(
            b, scores_ptr, buffer_ptr, found_ptr, run_ptr, open_ptr, items_ptr, offsets_ptr,
            start, M, N, K, step, stride_scores,
            CARRIED, FILTERED, HAS_EXCLUDE, K_LOG, CHUNK_LOG, LANES, CAPACITY, ASM,
        )  # fmt: skip
        item, s, k = store_list(ids_ptr + list_at, best_ptr + list_at, run, K, K_LOG)
        w = weights_of_list(item, s, K, UNIFORM)
        tl.store(w_ptr + list_at + k, w.to(w_ptr.dtype.element_ty), mask=k < K)
        tl.debug_barrier()

        for d0 in range(0, D, BLOCK_D):
            d = d0 + tl.arange(0, BLOCK_D)
            h = tl.load(hx_ptr + b.to(tl.int64) * stride_hx + d, mask=d < D, other=0.0).to(tl.float32)
            h = add_listed_rows(h, lookup_ptr, ids_ptr + list_at, w_ptr + list_at, K, d, D, stride_lookup, 32)
            tl.store(h_ptr + h_at + d, h.to(h_ptr.dtype.element_ty), mask=d < D)
    elif RESTING:
        copy(ids_ptr + list_at, old_ids_ptr + list_at, K, 2**K_LOG)
        copy(best_ptr + list_at, old_best_ptr + list_at, K, 2**K_LOG)
        copy(w_ptr + list_at, old_w_ptr + list_at, K, 2**K_LOG)
        copy(h_ptr + h_at, old_h_ptr + h_at, D, BLOCK_D)

    if DENSE:
        group = b // GROUP
        tl.debug_barrier()  # every thread's part of h is written before one thread publishes it
        ticket = tl.atomic_add(ticket_ptr + group, 1, sem="acq_rel", scope="gpu")
        size = tl.minimum(B - group * GROUP, GROUP)
        if ticket == size - 1:
            tl.store(ticket_ptr + group, 0)
            anyone = True
            if RESTING:
                g = tl.arange(0, GROUP)
                anyone = tl.max(tl.load(moved_ptr + group * GROUP + g, mask=g < size, other=0), 0) != 0
            if anyone:
                respond(
                    v_ptr, logit_ptr, next_ptr, one_ptr, two_ptr, h_ptr,
                    r0_ptr, q0_ptr, r1_ptr, q1_ptr, r2_ptr, q2_ptr, r3_ptr, q3_ptr,
                    f0_ptr, c0_ptr, f1_ptr, c1_ptr, f2_ptr, c2_ptr, hoisted_ptr, wv_ptr,
                    group, B, D, R0, R1, R2, F0, F1, V, H,
                    stride_r0, stride_r1, stride_r2, stride_f0, stride_f1, stride_f2, stride_hoisted, stride_wv,
                    BLOCK_D, BLOCK_F, BLOCK_V, BLOCK_H, BLOCK_I, GROUP, PREC,
                )  # fmt: skip
            elif RESTING:
                first = group.to(tl.int64) * GROUP
                copy(logit_ptr + first, old_logit_ptr + first, size, GROUP)
                copy(v_ptr + first * V, old_v_ptr + first * V, size * V, 1024)
                copy(next_ptr + first * H, old_next_ptr + first * H, size * H, 1024)


@triton.jit
def copy(to_ptr, from_ptr, n, BLOCK: tl.constexpr):
    """n elements."""
    i = tl.arange(0, BLOCK)
    for i0 in range(0, n, BLOCK):
        tl.store(to_ptr + i0 + i, tl.load(from_ptr + i0 + i, mask=i0 + i < n, other=0), mask=i0 + i < n)


@triton.jit
def respond(
    v_ptr, logit_ptr, next_ptr, one_ptr, two_ptr,
    h_ptr,
    r0_ptr, q0_ptr, r1_ptr, q1_ptr, r2_ptr, q2_ptr, r3_ptr, q3_ptr,
    f0_ptr, c0_ptr, f1_ptr, c1_ptr, f2_ptr, c2_ptr,
    hoisted_ptr, wv_ptr,
    group, B, D, R0, R1, R2, F0, F1, V, H,
    stride_r0, stride_r1, stride_r2, stride_f0, stride_f1, stride_f2, stride_hoisted, stride_wv,
    BLOCK_D: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_I: tl.constexpr, GROUP: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Equations (3) and (4), and p, for one group of users."""
    g = group * GROUP + tl.arange(0, GROUP)  # [GROUP]
    in_b = g < B
    every = tl.full((GROUP,), 1, tl.int1)
    g = g.to(tl.int64)
    h_ptr += group.to(tl.int64) * GROUP * D
    one = one_ptr + group.to(tl.int64) * GROUP * BLOCK_F
    two = two_ptr + group.to(tl.int64) * GROUP * BLOCK_F

    f = tl.arange(0, BLOCK_F)
    x = layer(h_ptr, in_b, r0_ptr, q0_ptr, D, R0, stride_r0, BLOCK_D, BLOCK_F, BLOCK_I, GROUP, PREC)
    hand_on(one, x, R0, BLOCK_F, GROUP)
    x = layer(one, every, r1_ptr, q1_ptr, R0, R1, stride_r1, BLOCK_F, BLOCK_F, BLOCK_I, GROUP, PREC)
    hand_on(two, x, R1, BLOCK_F, GROUP)
    x = layer(two, every, r2_ptr, q2_ptr, R1, R2, stride_r2, BLOCK_F, BLOCK_F, BLOCK_I, GROUP, PREC)
    last = tl.load(r3_ptr + f, mask=f < R2, other=0.0).to(tl.float32)
    logit = tl.sum(tl.where(x < 0, 0.0, x) * last[None, :], 1) + tl.load(q3_ptr).to(tl.float32)
    tl.store(logit_ptr + g, logit.to(logit_ptr.dtype.element_ty), mask=in_b)

    # The input [h ; R] has D + 1 columns: a product over h, and R times the last column.
    x = layer(h_ptr, in_b, f0_ptr, c0_ptr, D, F0, stride_f0, BLOCK_D, BLOCK_F, BLOCK_I, GROUP, PREC)
    last = tl.load(f0_ptr + f * stride_f0 + D, mask=f < F0, other=0.0).to(tl.float32)
    hand_on(one, x + tl.sigmoid(logit)[:, None] * last[None, :], F0, BLOCK_F, GROUP)
    x = layer(one, every, f1_ptr, c1_ptr, F0, F1, stride_f1, BLOCK_F, BLOCK_F, BLOCK_I, GROUP, PREC)
    hand_on(two, x, F1, BLOCK_F, GROUP)
    v = layer(two, every, f2_ptr, c2_ptr, F1, V, stride_f2, BLOCK_F, BLOCK_V, BLOCK_I, GROUP, PREC)
    j = tl.arange(0, BLOCK_V)
    in_v = (j < V)[None, :]
    tl.store(v_ptr + g[:, None] * V + j[None, :], v.to(v_ptr.dtype.element_ty), mask=in_b[:, None] & in_v)

    unit = v / tl.maximum(tl.sqrt(tl.sum(v * v, 1)), 1e-12)[:, None]
    tl.store(one + tl.arange(0, GROUP)[:, None] * V + j[None, :], unit, mask=in_v)
    tl.debug_barrier()
    for h0 in range(0, H, BLOCK_H):
        c = h0 + tl.arange(0, BLOCK_H)
        p = multiply(one, every, wv_ptr, stride_wv, 1, c, V, H, BLOCK_V, BLOCK_I, GROUP, PREC)
        inside = in_b[:, None] & (c < H)[None, :]
        p += tl.load(hoisted_ptr + g[:, None] * stride_hoisted + c[None, :], mask=inside, other=0.0).to(tl.float32)
        tl.store(next_ptr + g[:, None] * H + c[None, :], p.to(next_ptr.dtype.element_ty), mask=inside)


@triton.jit
def fuse_fwd_kernel(
    h_ptr, w_ptr,                               # out [B, D], [B, K]
    hx_ptr, lookup_ptr, ids_ptr, scores_ptr,    # in [B, D], [M, D], [B, K], [B, K]
    K, D,
    stride_hx, stride_lookup, stride_ids, stride_scores,
    UNIFORM: tl.constexpr, VEC: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Equation (16). One program per user."""
    D, stride_hx, stride_lookup = D // VEC * VEC, stride_hx // VEC * VEC, stride_lookup // VEC * VEC
    b = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    item = tl.load(ids_ptr + b * stride_ids + k, mask=k < K, other=-1)
    s = tl.load(scores_ptr + b * stride_scores + k, mask=k < K, other=0.0).to(tl.float32)
    tl.store(w_ptr + b * K + k, weights_of_list(item, s, K, UNIFORM).to(w_ptr.dtype.element_ty), mask=k < K)
    tl.debug_barrier()
    for d0 in range(0, D, BLOCK_D):
        d = d0 + tl.arange(0, BLOCK_D)
        h = tl.load(hx_ptr + b * stride_hx + d, mask=d < D, other=0.0).to(tl.float32)
        h = add_listed_rows(h, lookup_ptr, ids_ptr + b * stride_ids, w_ptr + b * K, K, d, D, stride_lookup, 32)
        tl.store(h_ptr + b * D + d, h.to(h_ptr.dtype.element_ty), mask=d < D)


@triton.jit
def row_dot_fwd_kernel(
    dots_ptr,                       # out [B, K]
    x_ptr, table_ptr, ids_ptr,      # in [B, D], [M, D], [B, K]
    K, D,
    stride_x, stride_table, stride_ids,
    VEC: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """< x_b, table[ids_bk] >, 0 at the padding. One program per user and BLOCK_K places of its list."""
    D, stride_x, stride_table = D // VEC * VEC, stride_x // VEC * VEC, stride_table // VEC * VEC
    b = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    item = tl.load(ids_ptr + b * stride_ids + k, mask=k < K, other=-1)
    products = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    for d0 in range(0, D, BLOCK_D):
        d = d0 + tl.arange(0, BLOCK_D)
        x = tl.load(x_ptr + b * stride_x + d, mask=d < D, other=0.0).to(tl.float32)
        rows = row_tile(table_ptr, item, stride_table, d, (item >= 0)[:, None] & (d < D)[None, :])
        products += rows * x[None, :]
    dots = tl.sum(products, 1)
    tl.store(dots_ptr + b * K + k, dots.to(dots_ptr.dtype.element_ty), mask=k < K)


# Launchers


@on_its_device
def feedback_step(
    u: Tensor,
    weight: Tensor,
    bias: Tensor,
    hx: Tensor,
    lookup: Tensor,
    reward: Layers,
    feedback: Layers,
    hoisted: Tensor,
    wv: Tensor,
    k: int,
    action: str,
    exclude: CSR | None = None,
    state: LoopState | None = None,
) -> tuple[Tensor, ...]:
    """v [B, V], the reward's logit [B], ids, scores [B, K], hoisted + v^ Wv [B, P], h [B, D], list weights [B, K]."""
    B, D = hx.shape
    k = min(k, len(weight))
    layers = [t for layer in (*reward, *feedback) for t in layer]
    if k > MAX_K or k == 0 or B == 0 or not covers(u, weight, bias, hx, lookup, hoisted, wv, *layers):
        return library.feedback_step(u, weight, bias, hx, lookup, reward, feedback, hoisted, wv, k, action, exclude)
    dense = len(reward) == 4 and len(feedback) == 3 and D <= 256
    shapes = [w.shape[0] for w, _ in (*reward, *feedback)]
    V, H = wv.shape
    ids, best = empty_lists(u, k)
    w, h = hx.new_empty(B, k), hx.new_empty(B, D)
    v, logit = hx.new_empty(B, V), hx.new_empty(B)
    following = hx.new_empty(B, H)
    turn = None
    if state is not None:
        inputs = weight, bias, hx, lookup, *layers, hoisted, wv, *(exclude or ())
        turn = k, action, *((t.data_ptr(), t.shape, t.dtype) for t in inputs)
    else:
        state = LoopState()
    block, resting = pending(u, weight, bias, k, exclude, state, turn)
    out = v, logit, h, ids, best, w, following
    old = state.answers if resting and state.answers is not None else out
    moved = block.found if block.seen is None else block.seen.moved
    BLOCK_F, precision = power_of_two(max(shapes[:3] + shapes[4:])), dot_precision(u.dtype)
    hidden = state.empty("hidden", (2, triton.cdiv(B, GROUP), GROUP, BLOCK_F), torch.float32, u)
    ticket = state.zeros("ticket", (triton.cdiv(B, GROUP),), torch.int32, u)
    hx, lookup = rows_first(hx), rows_first(lookup)
    pairs = [(rows_first(a), rows_first(b)) for a, b in (*reward, *feedback)] if dense else [(h, h)] * 7
    hoisted, wv = rows_first(hoisted), rows_first(wv)
    r0, r1, r2, _, f0, f1, f2 = (a for a, _ in pairs)
    feedback_step_fwd_kernel[(B,)](
        *out, *block.scratch(), ticket, *hidden, *old, moved, *block.inputs(),
        hx, lookup, *(t for pair in pairs for t in pair), hoisted, wv,
        *block.sizes(k),
        B, D, *((*shapes[:3], *shapes[4:6]) if dense else (1,) * 5), V, H,
        hx.stride(0), lookup.stride(0),
        *(a.stride(0) for a in (r0, r1, r2, f0, f1, f2)),
        hoisted.stride(0), wv.stride(0),
        VEC=vector(D, hx.stride(0), lookup.stride(0)), VEC_H=vector(H, hoisted.stride(0), wv.stride(0)),
        UNIFORM=action != "topk_softmax", DENSE=dense,
        LOOKED=block.seen is not None, RESTING=resting,
        **block.flags(k),
        BLOCK_D=min(256, power_of_two(D)), BLOCK_F=BLOCK_F, BLOCK_V=power_of_two(V), BLOCK_H=128,
        BLOCK_I=16 if precision == "ieee" else 32, GROUP=GROUP, PREC=precision, num_warps=4,
        maxnreg=128,  # four programs per multiprocessor; left alone, the compiler spills to get five
    )  # fmt: skip
    if turn is not None:
        state.answers = out
    if not dense:
        logit, v = library.respond(h, reward, feedback)
        following = library.follow(v, hoisted, wv)
    return v, logit, ids, best, following, h, w


@on_its_device
def fuse(hx: Tensor, lookup: Tensor, ids: Tensor, scores: Tensor, action: str) -> tuple[Tensor, Tensor]:
    """Equation (16): h = hx + sum_k w_k lookup[ids_k] [B, D], and the weights w [B, K]."""
    if not covers(hx, lookup, scores):
        return library.fuse(hx, lookup, ids, scores, action)
    (B, D), K = hx.shape, ids.shape[1]
    h, w = hx.new_empty(B, D), hx.new_empty(B, K)
    if B == 0 or K == 0:
        return h.copy_(hx), w
    hx, lookup, ids, scores = map(rows_first, (hx, lookup, ids, scores))
    fuse_fwd_kernel[(B,)](
        h, w, hx, lookup, ids, scores, K, D, hx.stride(0), lookup.stride(0), ids.stride(0), scores.stride(0),
        UNIFORM=action != "topk_softmax", VEC=vector(D, hx.stride(0), lookup.stride(0)),
        BLOCK_K=power_of_two(K), BLOCK_D=min(256, power_of_two(D)), num_warps=4,
    )  # fmt: skip
    return h, w


@on_its_device
def row_dot(x: Tensor, table: Tensor, ids: Tensor) -> Tensor:
    """< x_b, table[ids_bk] >; padding ids (-1) give 0. [B, K]"""
    if not covers(x, table):
        return library.row_dot(x, table, ids)
    (B, D), K = x.shape, ids.shape[1]
    dots = x.new_empty(B, K)
    if dots.numel():
        x, table, ids = map(rows_first, (x, table, ids))
        row_dot_fwd_kernel[(B, triton.cdiv(K, 32))](
            dots, x, table, ids, K, D, x.stride(0), table.stride(0), ids.stride(0),
            VEC=vector(D, x.stride(0), table.stride(0)), BLOCK_K=32, BLOCK_D=min(128, power_of_two(D)), num_warps=4,
        )  # fmt: skip
    return dots
