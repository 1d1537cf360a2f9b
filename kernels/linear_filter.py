"""A product that keeps only the scores that reach a threshold: the top of a wide catalogue without storing [B, M].

    kept_b = { j : s_bj >= tau_b },     s = u O^T + o,    appended as keys in any order                        (1)
    certificate: K <= |kept_b less the excluded| and |kept_b| <= CAPACITY  =>  the K best are among kept_b       (2)
    a user without one is scored again, exactly, by CAPACITY / 2^K_LOG programs that each keep their best        (3)

tau is the r-th best score of every SAMPLE-th item: about r SAMPLE items pass, and K is 4.5 deviations below that.
In a loop only open users take part (`resting`); the others keep their kept_b as candidates of later steps.

Shapes    u [B, H], weight [M, H], bias [M], tau [B]; buffer [B, CAPACITY] int64, found [B] int32: the count, or
          -1 after (3).
Traffic   2 B M H flops; weight once per BLOCK_U users. Per score of the epilogue: one comparison and one branch.
Numerics  Scores are float32 sums and are compared before any rounding to the dtype of u; (3) sums them in another
          order.
"""

from __future__ import annotations

import math
import os

import triton
import triton.language as tl
from torch import Tensor

from cfsfl_fast.kernels.resting import PROGRAMS, Look, tile_of
from cfsfl_fast.kernels.tile import (
    CAPACITY,
    CSR,
    EMPTY,
    LOWEST,
    dot_precision,
    interpreted,
    is_listed,
    merge_keys,
    pack,
    product_of_tile,
    scores_of_items,
    selection,
    tuned,
    vector,
    worst_of,
)

SAMPLE = 16
"""One item in so many is scored to find a threshold."""

FILTER_FROM = {80: 200_000, 90: 200_000, 100: 200_000}
"""Catalogues from this size on are filtered, by compute capability. Not yet measured."""

APPEND = tl.constexpr("""{
    .reg .pred pass, fits, zero;
    .reg .b32 slot, bits, sign, item;
    .reg .b64 at, key;
    setp.ge.f32 pass, $1, $2;
    @!pass bra KEPT_${:uid};
    atom.relaxed.gpu.global.add.u32 slot, [$3], 1;
    setp.lt.u32 fits, slot, $6;
    setp.eq.f32 zero, $1, 0f00000000;
    mov.b32 bits, $1;
    selp.b32 bits, 0, bits, zero;
    shr.s32 sign, bits, 31;
    and.b32 sign, sign, 0x7fffffff;
    xor.b32 bits, bits, sign;
    sub.u32 item, 0x7fffffff, $5;
    mov.b64 key, {item, bits};
    mad.wide.u32 at, slot, 8, $4;
    @fits st.global.b64 [at], key;
    KEPT_${:uid}:
    mov.b32 $0, 0;
}""")
"""Appends one key: `tile.pack` and a counter, behind a branch that nearly every score takes."""


@triton.jit
def linear_filter_fwd_kernel(
    buffer_ptr, found_ptr,                          # out [B, CAPACITY], [B]
    u_ptr, weight_ptr, bias_ptr, tau_ptr,           # in [B, H], [M, H], [M], [B]
    order_ptr, active_ptr,                          # [B], [1]: the open users, and how many they are
    M, H,
    stride_u, stride_weight, stride_tau,
    PREC: tl.constexpr, ASM: tl.constexpr, VEC: tl.constexpr, CAPACITY: tl.constexpr,
    BLOCK_U: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Equation (1). The programs share the groups of BLOCK_U open users, and each group's tiles of BLOCK_M items."""
    H, stride_u, stride_weight = H // VEC * VEC, stride_u // VEC * VEC, stride_weight // VEC * VEC
    active = tl.load(active_ptr)
    n_groups = tl.maximum(tl.cdiv(active, BLOCK_U), 1)
    splits = tl.maximum(tl.num_programs(0) // n_groups, 1)
    group = tl.program_id(0) // splits
    if group * BLOCK_U < active:
        slot = group * BLOCK_U + tl.arange(0, BLOCK_U)  # [BLOCK_U]
        in_b = slot < active
        b = tl.load(order_ptr + slot, mask=in_b, other=0).to(tl.int64)
        h = tl.arange(0, BLOCK_H)
        tau = tl.load(tau_ptr + b * stride_tau, mask=in_b, other=0.0).to(tl.float32)
        tau = tl.where(in_b, tl.maximum(tau, LOWEST), float("nan"))[:, None]  # NaN: reached by no score
        u_rows = u_ptr + b[:, None] * stride_u + h[None, :]
        buffers = buffer_ptr + b[:, None] * CAPACITY
        n_items = tl.cdiv(tl.cdiv(M, BLOCK_M), splits) * BLOCK_M
        first = tl.program_id(0) % splits * n_items
        for m0 in range(first, tl.minimum(first + n_items, M), BLOCK_M):
            m = m0 + tl.arange(0, BLOCK_M)
            in_m = m < M
            w_rows = weight_ptr + m.to(tl.int64)[None, :] * stride_weight + h[:, None]
            s = product_of_tile(u_rows, w_rows, in_b, in_m, H, PREC, BLOCK_U, BLOCK_M, BLOCK_H)
            s += tl.load(bias_ptr + m, mask=in_m, other=float("-inf")).to(tl.float32)[None, :]
            items = tl.broadcast_to(m[None, :], (BLOCK_U, BLOCK_M))
            if ASM:
                tl.inline_asm_elementwise(
                    APPEND, "=r,f,f,l,l,r,r",
                    [
                        s, tl.broadcast_to(tau, (BLOCK_U, BLOCK_M)),
                        tl.broadcast_to((found_ptr + b)[:, None], (BLOCK_U, BLOCK_M)).to(tl.uint64),
                        tl.broadcast_to(buffers, (BLOCK_U, BLOCK_M)).to(tl.uint64),
                        items, tl.full((BLOCK_U, BLOCK_M), CAPACITY, tl.int32),
                    ],
                    dtype=tl.int32, is_pure=False, pack=1,
                )  # fmt: skip
            else:
                hit = s >= tau
                one = tl.full((BLOCK_U, BLOCK_M), 1, tl.int32)
                slots = tl.atomic_add((found_ptr + b)[:, None] + tl.zeros_like(items), one, mask=hit, sem="relaxed")
                tl.store(buffers + slots, pack(s, items), mask=hit & (slots < CAPACITY))


@triton.jit
def linear_filter_check_kernel(
    found_ptr, buffer_ptr,                  # in and out [B], [B, CAPACITY]
    open_ptr, items_ptr, offsets_ptr,       # in [B], excluded [E], [B + 1]
    K,
    HAS_EXCLUDE: tl.constexpr, CAPACITY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Equation (2). One program per user: empties the excluded keys; found becomes -1 where there is no certificate."""
    b = tl.program_id(0)
    if tl.load(open_ptr + b) != 0:
        found = tl.load(found_ptr + b)
        tl.debug_barrier()  # every thread has loaded it before one stores it
        keys_ptr = buffer_ptr + b.to(tl.int64) * CAPACITY
        left = found
        if HAS_EXCLUDE:
            first, last = tl.load(offsets_ptr + b), tl.load(offsets_ptr + b + 1)
            for c0 in range(0, tl.minimum(found, CAPACITY), BLOCK):
                c = c0 + tl.arange(0, BLOCK)
                inside = c < tl.minimum(found, CAPACITY)
                key = tl.load(keys_ptr + c, mask=inside, other=EMPTY)
                gone = inside & is_listed(items_ptr, first, last, 0x7FFFFFFF - (key & 0x7FFFFFFF))
                tl.store(keys_ptr + c, tl.full((BLOCK,), EMPTY, tl.int64), mask=gone)
                left -= tl.sum(gone.to(tl.int32), 0)
        if (left < K) | (found > CAPACITY):
            tl.store(found_ptr + b, -1)


@triton.jit
def linear_filter_rescue_kernel(
    buffer_ptr,                                     # out [B, CAPACITY]
    found_ptr, open_ptr,                            # in [B], [B]
    u_ptr, weight_ptr, bias_ptr,                    # [B, H], [M, H], [M]
    items_ptr, offsets_ptr,                         # excluded [E], [B + 1]
    M, H, K,
    stride_u, stride_weight,
    HAS_EXCLUDE: tl.constexpr, VEC: tl.constexpr, CAPACITY: tl.constexpr,
    K_LOG: tl.constexpr, CHUNK_LOG: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Equation (3). One program per user and share of the items; those of users with a certificate stop at once."""
    H, stride_u, stride_weight = H // VEC * VEC, stride_u // VEC * VEC, stride_weight // VEC * VEC
    b = tl.program_id(0).to(tl.int64)
    if (tl.load(found_ptr + b) < 0) & (tl.load(open_ptr + b) != 0):
        share = tl.cdiv(M, tl.num_programs(1))
        start = tl.program_id(1) * share
        stop = tl.minimum(start + share, M)
        first = tl.load(offsets_ptr + b) if HAS_EXCLUDE else 0
        last = tl.load(offsets_ptr + b + 1) if HAS_EXCLUDE else 0
        run = tl.full((2**K_LOG,), EMPTY, tl.int64)
        for m0 in range(start, stop, 2**CHUNK_LOG):
            m = m0 + tl.arange(0, 2**CHUNK_LOG)
            in_m = m < stop
            s = scores_of_items(u_ptr + b * stride_u, weight_ptr, bias_ptr, m, in_m, H, stride_weight, BLOCK_H)
            able = in_m & (s >= LOWEST)
            if HAS_EXCLUDE:
                able &= ~is_listed(items_ptr, first, last, m)
            keys = tl.where(able, pack(s, m), EMPTY)
            if tl.max(keys, 0) > worst_of(run, K, K_LOG):
                run = merge_keys(run, keys, K_LOG, CHUNK_LOG)
        at = b * CAPACITY + tl.program_id(1) * 2**K_LOG + tl.arange(0, 2**K_LOG)
        tl.store(buffer_ptr + at, run)


# Launchers


def wanted(u: Tensor, n_items: int) -> bool:
    """Whether a catalogue is filtered rather than scored chunk by chunk: wide, and multiplied by tensor cores."""
    asked = "CFSFL_FILTER_FROM" in os.environ
    return n_items >= tuned("CFSFL_FILTER_FROM", FILTER_FROM, u.device) and (asked or dot_precision(u.dtype) != "ieee")


def rank(k: int, n_items: int) -> tuple[int, int]:
    """(step, r): the r-th best of every step-th item lets about r step items pass, and fewer than k once in 10^5."""
    step = max(1, min(SAMPLE, n_items // (8 * k)))
    return step, math.ceil(((4.5 + math.sqrt(20.25 + 4 * k / step)) / 2) ** 2)


def survivors(
    u: Tensor,
    weight: Tensor,
    bias: Tensor,
    k: int,
    exclude: CSR | None,
    tau: Tensor,
    buffer: Tensor,
    found: Tensor,
    seen: Look,
) -> None:
    """Fills open users' rows of buffer [B, CAPACITY] with keys among which are the k best, and their found [B], which
    is zero before.
    """
    (B, H), M = u.shape, len(weight)
    BLOCK_M, BLOCK_H = tile_of(u)
    sizes = selection(k)
    vec = vector(H, u.stride(0), weight.stride(0))
    items, offsets = exclude or (found, found)
    programs = max(triton.cdiv(B, 128), tuned("CFSFL_PROGRAMS", PROGRAMS, u.device))
    linear_filter_fwd_kernel[(programs,)](
        buffer, found, u, weight, bias, tau, seen.order, seen.active, M, H, u.stride(0), weight.stride(0),
        tau.stride(0),
        PREC=dot_precision(u.dtype), ASM=not interpreted(), VEC=vec, CAPACITY=CAPACITY,
        BLOCK_U=128, BLOCK_M=BLOCK_M, BLOCK_H=BLOCK_H, num_warps=8,
    )  # fmt: skip
    linear_filter_check_kernel[(B,)](
        found, buffer, seen.open, items, offsets, k,
        HAS_EXCLUDE=exclude is not None, CAPACITY=CAPACITY, BLOCK=512, num_warps=4,
    )  # fmt: skip
    linear_filter_rescue_kernel[(B, CAPACITY >> sizes["K_LOG"])](
        buffer, found, seen.open, u, weight, bias, items, offsets, M, H, k, u.stride(0), weight.stride(0),
        HAS_EXCLUDE=exclude is not None, VEC=vec, CAPACITY=CAPACITY,
        K_LOG=sizes["K_LOG"], CHUNK_LOG=sizes["CHUNK_LOG"], BLOCK_H=32, num_warps=4,
    )  # fmt: skip
