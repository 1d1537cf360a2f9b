"""Which users need a full product at a step of the loop: the others' answers follow from the steps before, exactly.

    moved_b = u_b differs in a bit from the step before                                                        (1)

A user who has not moved gets the answers of the step before, to the bit: the loop has come to rest there. In a wide
catalogue a user who has moved is answered from the candidates of an earlier step, the anchor, where everything that
scored tau_b or more was kept. With d = |u_b - anchor_b|, by Cauchy and Schwarz,

    s_bj < tau_b + d max |w| + rounding        of every item j that is no candidate                            (2)

so the K best candidates, scored again, are the list if the K-th of them beats (2). Rounding: a computed score is within
slack |u| |w| of the true one. Users without such a proof are `open`: they are scored in full, and this step becomes
their anchor. Open users are numbered on the device, in any order (a score does not depend on the others of its tile);
programs for more than there are return at once.

Nothing here waits for the device, and every shape is that of all users.

Shapes    u, last, anchor [B, H]; open, moved, order [B] int32; active [1] int32: how many are open.
Traffic   (1) 2 B H itemsize bytes. (2) candidates H itemsize bytes per user who has moved, against M H for everyone.
Numerics  Candidates are scored in float32 sums, in another order than the product's.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from cfsfl_fast.kernels.scores import LoopState
from cfsfl_fast.kernels.tile import (
    CAPACITY,
    EMPTY,
    LOWEST,
    capability,
    dot_precision,
    item_of,
    merge_keys,
    pack,
    product_of_tile,
    score_of,
    scores_of_items,
    selection,
    tuned,
    vector,
    worst_of,
)

SKIP_FROM = {80: 2, 90: 2, 100: 2}
"""From which step of a loop on, by compute capability, users at rest are left out of the product of a catalogue that is
not filtered: the library's product is faster while most of them move. Of 1, 2, 4 and never, 2 was best or within 8 %
of it on an H100, for 500 users of a trained model in each precision and for 4,096 in bf16 and tf32."""

PROGRAMS = {80: 108, 90: 132, 100: 148}
"""Programs at once of a product of ours, by compute capability: one per multiprocessor."""


@triton.jit
def bits_of(x):
    """The bits of a float, as an integer of its width."""
    if x.dtype.primitive_bitwidth == 16:  # noqa: SIM108  (a constexpr: one branch is compiled)
        bits = x.to(tl.int16, bitcast=True)
    else:
        bits = x.to(tl.int32, bitcast=True)
    return bits


@triton.jit
def look_fwd_kernel(
    open_ptr, moved_ptr, order_ptr, active_ptr,                     # out [B], [B], [B], [1]; active is 0 before
    run_ptr,                                                        # out [B, 2^K_LOG]: proved lists
    last_ptr, anchor_ptr, found_ptr,                                # in and out [B, H], [B, H], [B]
    u_ptr, weight_ptr, bias_ptr, tau_ptr, norm_ptr, buffer_ptr,     # in [B, H], [M, H], [M], [B], [1], [B, CAPACITY]
    H, K, slack,
    stride_u, stride_weight, stride_tau,
    FIRST: tl.constexpr, COMPARED: tl.constexpr, WIDE: tl.constexpr,
    VEC: tl.constexpr, K_LOG: tl.constexpr, CHUNK_LOG: tl.constexpr, CAPACITY: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Equations (1) and (2). One program per user."""
    H, stride_u, stride_weight = H // VEC * VEC, stride_u // VEC * VEC, stride_weight // VEC * VEC
    b = tl.program_id(0).to(tl.int64)
    h = tl.arange(0, BLOCK_H)
    row_ptr, last_ptr, anchor_ptr = u_ptr + b * stride_u, last_ptr + b * H, anchor_ptr + b * H
    moved = tl.full((), 1, tl.int32)
    if COMPARED:
        differs = tl.zeros((BLOCK_H,), tl.int32)
        for h0 in range(0, H, BLOCK_H):
            in_h = h0 + h < H
            x = tl.load(row_ptr + h0 + h, mask=in_h, other=0.0)
            if not FIRST:
                y = tl.load(last_ptr + h0 + h, mask=in_h, other=0.0)
                differs |= (bits_of(x) != bits_of(y)).to(tl.int32)
            tl.store(last_ptr + h0 + h, x, mask=in_h)
        if not FIRST:
            moved = tl.max(differs, 0)
    open_ = moved
    if WIDE:
        if not FIRST:
            n = tl.load(found_ptr + b)
            tl.debug_barrier()  # every thread has loaded it before one stores it
            if (moved != 0) & (n >= 0):
                gone = tl.zeros((BLOCK_H,), tl.float32)
                here = tl.zeros((BLOCK_H,), tl.float32)
                there = tl.zeros((BLOCK_H,), tl.float32)
                for h0 in range(0, H, BLOCK_H):
                    in_h = h0 + h < H
                    x = tl.load(row_ptr + h0 + h, mask=in_h, other=0.0).to(tl.float32)
                    y = tl.load(anchor_ptr + h0 + h, mask=in_h, other=0.0).to(tl.float32)
                    gone += (x - y) * (x - y)
                    here += x * x
                    there += y * y
                d = tl.sqrt(tl.sum(gone, 0)) * (1 + slack) + 1e-17  # squares below the normal range are lost
                d += slack * (tl.sqrt(tl.sum(here, 0)) + tl.sqrt(tl.sum(there, 0)))
                bound = tl.load(tau_ptr + b * stride_tau).to(tl.float32) + d * tl.load(norm_ptr) * (1 + slack)
                bound += tl.abs(bound) * 1e-6

                c = tl.arange(0, 2**CHUNK_LOG)
                run = tl.full((2**K_LOG,), EMPTY, tl.int64)
                for c0 in range(0, n, 2**CHUNK_LOG):
                    key = tl.load(buffer_ptr + b * CAPACITY + c0 + c, mask=c0 + c < n, other=EMPTY)
                    m = item_of(key)
                    s = scores_of_items(row_ptr, weight_ptr, bias_ptr, m, m >= 0, H, stride_weight, 32)
                    run = merge_keys(run, tl.where((m >= 0) & (s >= LOWEST), pack(s, m), EMPTY), K_LOG, CHUNK_LOG)
                worst = worst_of(run, K, K_LOG)
                if (worst != EMPTY) & (score_of(worst) > bound):
                    open_ = 0
                    tl.store(run_ptr + b * 2**K_LOG + tl.arange(0, 2**K_LOG), run)
        if open_ != 0:
            tl.store(found_ptr + b, 0)
            for h0 in range(0, H, BLOCK_H):
                x = tl.load(row_ptr + h0 + h, mask=h0 + h < H, other=0.0)
                tl.store(anchor_ptr + h0 + h, x, mask=h0 + h < H)
    tl.store(open_ptr + b, open_)
    tl.store(moved_ptr + b, moved)
    if open_ != 0:
        tl.store(order_ptr + tl.atomic_add(active_ptr, 1, sem="relaxed"), tl.program_id(0))


@triton.jit
def linear_scores_fwd_kernel(
    scores_ptr,                                                 # out [B, N]: rows of open users
    u_ptr, weight_ptr, bias_ptr, order_ptr, active_ptr,         # in [B, H], [M, H], [M], [B], [1]
    M, H,
    stride_scores, stride_u, stride_weight, stride_bias,
    PREC: tl.constexpr, VEC: tl.constexpr, BLOCK_U: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """u O^T + o of the open users. The programs share the tiles of BLOCK_U of them and BLOCK_M items: at a step where
    nobody is open, a program per multiprocessor returns at once.
    """
    H, stride_u, stride_weight = H // VEC * VEC, stride_u // VEC * VEC, stride_weight // VEC * VEC
    stride_scores = stride_scores // 16 * 16
    active = tl.load(active_ptr)
    n_groups = tl.cdiv(active, BLOCK_U)
    for tile in range(tl.program_id(0), n_groups * tl.cdiv(M, BLOCK_M), tl.num_programs(0)):
        slot = tile % n_groups * BLOCK_U + tl.arange(0, BLOCK_U)  # those of one tile of items follow one another
        in_b = slot < active
        b = tl.load(order_ptr + slot, mask=in_b, other=0).to(tl.int64)
        m = tile // n_groups * BLOCK_M + tl.arange(0, BLOCK_M)
        in_m = m < M
        h = tl.arange(0, BLOCK_H)
        u_rows = u_ptr + b[:, None] * stride_u + h[None, :]
        w_rows = weight_ptr + m.to(tl.int64)[None, :] * stride_weight + h[:, None]
        s = product_of_tile(u_rows, w_rows, in_b, in_m, H, PREC, BLOCK_U, BLOCK_M, BLOCK_H)
        s += tl.load(bias_ptr + m.to(tl.int64) * stride_bias, mask=in_m, other=0.0).to(tl.float32)[None, :]
        # Whole vectors: the padding of a row is there to be written.
        inside = in_b[:, None] & (m < tl.cdiv(M, 16) * 16)[None, :]
        tl.store(scores_ptr + b[:, None] * stride_scores + m[None, :], s.to(scores_ptr.dtype.element_ty), mask=inside)


# Launchers


class Look(NamedTuple):
    """Who needs what at one step; the kernel that writes the step's lists sets `active` to 0 again."""

    open: Tensor  # [B] int32
    moved: Tensor  # [B] int32
    order: Tensor  # [B] int32: the open users first, in any order
    active: Tensor  # [1] int32: how many they are


class Wide(NamedTuple):
    """What a wide catalogue's proofs are made of; see linear_filter."""

    weight: Tensor
    bias: Tensor
    tau: Tensor  # [B], any stride
    norm: Tensor  # [1] float32: the largest |w|
    buffer: Tensor  # [B, CAPACITY]
    found: Tensor  # [B]
    run: Tensor  # [B, 2^K_LOG]


def look(u: Tensor, k: int, state: LoopState, *, first: bool, compared: bool, wide: Wide | None = None) -> Look:
    """Tells open users from others.

    Args:
        u: [B, H], unit stride along H.
        k: length of the lists.
        state: keeps the codes of the last `compared` step, the anchors, and the counters.
        first: there is no step before: everyone has moved and is open.
        compared: users who have not moved are not open.
        wide: a filtered catalogue; None leaves candidates out.
    """
    B, H = u.shape
    open_, moved, order = (state.empty(name, (B,), torch.int32, u) for name in ("open", "moved", "order"))
    active = state.zeros("active", (1,), torch.int32, u)
    last = state.empty("last", (B, H), u.dtype, u) if compared else u
    anchor = state.empty("anchor", (B, H), u.dtype, u) if wide else u
    weight, bias, tau, norm, buffer, found, run = wide or (u, u, u, u, open_, open_, open_)
    narrow = u.dtype == torch.float32 and dot_precision(u.dtype) == "tf32"  # halves are whole in tf32
    look_fwd_kernel[(B,)](
        open_, moved, order, active, run, last, anchor, found, u, weight, bias, tau, norm, buffer,
        H, k, (H + 16) * 2.0**-22 + (2.0**-9 if narrow else 0.0),
        u.stride(0), weight.stride(0), tau.stride(0),
        FIRST=first, COMPARED=compared, WIDE=wide is not None,
        VEC=vector(H, u.stride(0), weight.stride(0)), K_LOG=selection(k)["K_LOG"], CHUNK_LOG=selection(k)["CHUNK_LOG"],
        CAPACITY=CAPACITY, BLOCK_H=512, num_warps=4, maxnreg=128,
    )  # fmt: skip
    return Look(open_, moved, order, active)


def open_scores(u: Tensor, weight: Tensor, bias: Tensor, out: Tensor, seen: Look) -> None:
    """Scores u weight^T + bias of the open users into their rows of out [B, width]; nothing else is written."""
    (B, H), M = u.shape, len(weight)
    BLOCK_M, BLOCK_H = tile_of(u)
    n_tiles = triton.cdiv(B, 128) * triton.cdiv(M, BLOCK_M)
    linear_scores_fwd_kernel[(min(n_tiles, tuned("CFSFL_PROGRAMS", PROGRAMS, u.device)),)](
        out, u, weight, bias, seen.order, seen.active, M, H,
        out.stride(0), u.stride(0), weight.stride(0), bias.stride(0),
        PREC=dot_precision(u.dtype), VEC=vector(H, u.stride(0), weight.stride(0)),
        BLOCK_U=128, BLOCK_M=BLOCK_M, BLOCK_H=BLOCK_H, num_warps=8,
    )  # fmt: skip


def tile_of(u: Tensor) -> tuple[int, int]:
    """(BLOCK_M, BLOCK_H) of a product with 128 users: what fills the registers of eight warps; half of it where
    elements are wide, before wgmma, and where a program has no more than 99 KB of shared memory (8.6, 8.9, 12.0).
    Products without tensor cores need the registers of half the depth.
    """
    large = u.element_size() == 2 and 90 <= capability(u.device) < 120
    return 256 if large else 128, 16 if dot_precision(u.dtype) == "ieee" else 128 // u.element_size()


def skips(u: Tensor, step: int) -> bool:
    """Whether a step of the loop, counted from 0, leaves users at rest out of its product."""
    return step >= tuned("CFSFL_SKIP_FROM", SKIP_FROM, u.device)
