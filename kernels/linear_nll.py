"""The multinomial loss of a linear layer against CSR targets, and its gradient.

    s     = u O^T + o, -inf where excluded
    lse_b = logsumexp(s_b)                                     streamed over chunks of items            (1)
    nll_b = |x_b| lse_b - sum_{j in x_b} s_bj                  0 where x is empty                       (2)
    ds_bj = dnll_b (|x_b| exp(s_bj - lse_b) - [j in x_b])                                               (3)
    du = ds O,    dO = ds^T u,    do = sum_b ds_b                                           library products, per chunk

Shapes    u [B, H], weight [M, H], bias [M], items [E], offsets [B + 1]; nll, lse [B]. Targets are unique within a row.
Traffic   A chunk of scores is written by the library's product and read twice from cache (1); backward rewrites it in
          place (3) and two products read it. Where the catalogue is one chunk its scores are kept for backward: one
          product in four is saved.
Numerics  float32 sums. ds has the dtype of u, which the products need; du is summed over chunks in float32.
          No atomics: one program per user writes its row, and then corrects its targets.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cfsfl_fast import library
from cfsfl_fast.kernels.linear_topk import Pending, empty_lists, launch, scratch
from cfsfl_fast.kernels.scores import LoopState, chunk_width, chunks, product
from cfsfl_fast.kernels.tile import (
    ALIGN,
    CSR,
    LOWEST,
    MAX_K,
    covers,
    leave_out,
    on_its_device,
    packed,
    round_up,
    rows_first,
)


@triton.jit
def linear_nll_fwd_kernel(
    nll_ptr, lse_ptr,                                               # out [B], [B]
    peak_ptr, total_ptr, hit_ptr,                                   # scratch [B] each: carried from chunk to chunk
    scores_ptr,                                                     # in [B, N]
    items_ptr, offsets_ptr, out_items_ptr, out_offsets_ptr,         # targets, excluded
    start, M, N,
    stride_scores,
    FIRST: tl.constexpr, LAST: tl.constexpr, HAS_EXCLUDE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Equations (1) and (2) over one chunk. One program per user."""
    b = tl.program_id(0)
    row_ptr = scores_ptr + b.to(tl.int64) * stride_scores
    gone = tl.load(out_offsets_ptr + b) if HAS_EXCLUDE else 0
    gone_end = tl.load(out_offsets_ptr + b + 1) if HAS_EXCLUDE else 0
    leave_out(row_ptr, out_items_ptr, gone, gone_end, start, M, N, 1, HAS_EXCLUDE, 128, 64)

    n = tl.arange(0, TILE)
    peaks = tl.full((TILE,), float("-inf"), tl.float32)
    for n0 in range(0, N, TILE):
        peaks = tl.maximum(peaks, tl.load(row_ptr + n0 + n, mask=n0 + n < N, other=float("-inf")).to(tl.float32))
    peak = tl.max(peaks, 0)
    if not FIRST:
        peak = tl.maximum(peak, tl.load(peak_ptr + b))
    base = tl.maximum(peak, LOWEST)  # -inf - LOWEST is -inf, -inf - -inf is not
    totals = tl.zeros((TILE,), tl.float32)
    for n0 in range(0, N, TILE):
        totals += tl.exp(tl.load(row_ptr + n0 + n, mask=n0 + n < N, other=float("-inf")).to(tl.float32) - base)
    total = tl.sum(totals, 0)

    first, last = tl.load(offsets_ptr + b), tl.load(offsets_ptr + b + 1)
    e = tl.arange(0, 128)
    hits = tl.zeros((128,), tl.float32)
    for e0 in range(first, last, 128):
        item = tl.load(items_ptr + e0 + e, mask=e0 + e < last, other=-1) - start
        inside = (e0 + e < last) & (item >= 0) & (item < M)
        hits += tl.load(row_ptr + item, mask=inside, other=0.0).to(tl.float32)
    hit = tl.sum(hits, 0)

    if not FIRST:
        total += tl.load(total_ptr + b) * tl.exp(tl.load(peak_ptr + b) - base)
        hit += tl.load(hit_ptr + b)
    if LAST:
        lse = base + tl.log(total)
        count = (last - first).to(tl.float32)
        nll = tl.where(last > first, lse * count, 0.0) - hit
        tl.store(nll_ptr + b, nll.to(nll_ptr.dtype.element_ty))
        tl.store(lse_ptr + b, lse)
    else:
        tl.debug_barrier()  # all threads have read the carried values
        tl.store(peak_ptr + b, peak)
        tl.store(total_ptr + b, total)
        tl.store(hit_ptr + b, hit)


@triton.jit
def linear_nll_bwd_kernel(
    ds_ptr,                                                         # out [B, N]
    scores_ptr, dnll_ptr, lse_ptr,                                  # in [B, N], [B], [B]
    items_ptr, offsets_ptr, out_items_ptr, out_offsets_ptr,         # targets, excluded
    start, M, N,
    stride_scores,
    HAS_EXCLUDE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Equation (3) over one chunk; ds may be the scores' own buffer. One program per user."""
    b = tl.program_id(0)
    row_ptr = scores_ptr + b.to(tl.int64) * stride_scores
    ds_row_ptr = ds_ptr + b.to(tl.int64) * stride_scores
    gone = tl.load(out_offsets_ptr + b) if HAS_EXCLUDE else 0
    gone_end = tl.load(out_offsets_ptr + b + 1) if HAS_EXCLUDE else 0
    leave_out(row_ptr, out_items_ptr, gone, gone_end, start, M, N, 1, HAS_EXCLUDE, 128, 64)

    first, last = tl.load(offsets_ptr + b), tl.load(offsets_ptr + b + 1)
    dnll = tl.load(dnll_ptr + b).to(tl.float32)
    scale = dnll * (last - first).to(tl.float32)
    lse = tl.maximum(tl.load(lse_ptr + b), LOWEST)
    n = tl.arange(0, TILE)
    for n0 in range(0, N, TILE):
        s = tl.load(row_ptr + n0 + n, mask=n0 + n < N, other=float("-inf")).to(tl.float32)
        ds = tl.exp(s - lse) * scale
        tl.store(ds_row_ptr + n0 + n, ds.to(ds_ptr.dtype.element_ty), mask=n0 + n < N)

    tl.debug_barrier()  # the whole row is written before its targets are corrected
    e = tl.arange(0, 128)
    for e0 in range(first, last, 128):
        item = tl.load(items_ptr + e0 + e, mask=e0 + e < last, other=-1) - start
        inside = (e0 + e < last) & (item >= 0) & (item < M)
        ds = tl.load(ds_row_ptr + item, mask=inside, other=0.0).to(tl.float32) - dnll
        tl.store(ds_row_ptr + item, ds.to(ds_ptr.dtype.element_ty), mask=inside)


# Launchers


@on_its_device
def linear_nll(
    u: Tensor,
    weight: Tensor,
    bias: Tensor,
    items: Tensor,
    offsets: Tensor,
    exclude: CSR | None,
    k: int,
    state: LoopState | None = None,
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor], Tensor | None]:
    """The multinomial loss [B], its logsumexp [B], the list of the K best, and what backward can use again.

    The last is the scores [B, width] where the catalogue is one chunk, else None.
    """
    if not covers(u, weight, bias):
        return library.linear_nll(u, weight, bias, items, offsets, exclude, k)
    B, M = len(u), len(weight)
    k = min(k, M)
    nll = u.new_empty(B, dtype=torch.float32)
    lse, peak, total, hit = u.new_empty(4, B, dtype=torch.float32).unbind()
    ids, best = empty_lists(u, min(k, MAX_K))
    if B == 0:
        return nll, lse, empty_lists(u, k), None
    state, u, bias = state or LoopState(), rows_first(u), rows_first(bias)
    items, offsets, exclude = rows_first(items), rows_first(offsets), packed(exclude)
    width = chunk_width(u, M)
    whole = width >= M
    scores = u.new_empty(B, width) if whole else state.empty("scores", (B, width), u.dtype, u)
    gone = exclude or (items, offsets)
    select = 0 < k <= MAX_K
    buffer, found, run = scratch(state, u, k) if select else (lse,) * 3
    state.wide = None  # its candidates were in that buffer
    for start, stop in chunks(M, width):
        product(u, weight, bias, start, stop, scores, state)
        linear_nll_fwd_kernel[(B,)](
            nll, lse, peak, total, hit, scores, items, offsets, *gone,
            start, stop - start, round_up(stop - start, ALIGN), scores.stride(0),
            FIRST=start == 0, LAST=stop == M, HAS_EXCLUDE=exclude is not None, TILE=2048, num_warps=4, maxnreg=64,
        )  # fmt: skip
        if select:
            block = Pending(scores, buffer, found, run, None, start, stop - start, start > 0)
            launch(block, ids if stop == M else None, best, k)
    if k > MAX_K:
        ids, best = library.linear_topk(u, weight, bias, k, exclude)
    return nll, lse, (ids, best), scores if whole else None


@on_its_device
def linear_nll_backward(
    dnll: Tensor,
    u: Tensor,
    weight: Tensor,
    bias: Tensor,
    items: Tensor,
    offsets: Tensor,
    exclude: CSR | None,
    lse: Tensor,
    kept: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of u [B, H], weight [M, H] and bias [M]: ds = dnll (|x| softmax(s) - x), a chunk of items at a time."""
    if not covers(u, weight, bias):
        return library.linear_nll_backward(dnll, u, weight, bias, items, offsets, exclude, lse, kept)
    B, M = len(u), len(weight)
    u, lse, dnll = rows_first(u), rows_first(lse), rows_first(dnll)
    items, offsets, exclude = rows_first(items), rows_first(offsets), packed(exclude)
    du = torch.zeros_like(u, dtype=torch.float32)
    dweight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    dbias = torch.empty_like(bias, memory_format=torch.contiguous_format)
    if B == 0:
        return du.to(u.dtype), dweight.zero_(), dbias.zero_()
    width = chunk_width(u, M) if kept is None else kept.shape[1]
    scores = u.new_empty(B, width) if kept is None else kept
    state = LoopState() if kept is None and M % ALIGN else None
    gone = exclude or (items, offsets)
    for start, stop in chunks(M, width):
        if kept is None:
            product(u, weight, bias, start, stop, scores, state)
        linear_nll_bwd_kernel[(B,)](
            scores, scores, dnll, lse, items, offsets, *gone,
            start, stop - start, round_up(stop - start, ALIGN), scores.stride(0),
            HAS_EXCLUDE=exclude is not None, TILE=2048, num_warps=4, maxnreg=64,
        )  # fmt: skip
        ds = scores[:, : stop - start]
        du = _accumulate(du, ds, weight[start:stop])
        torch.mm(ds.T, u, out=dweight[start:stop])
        torch.sum(ds, 0, out=dbias[start:stop])
    return du.to(u.dtype), dweight, dbias


def _accumulate(du: Tensor, ds: Tensor, weight: Tensor) -> Tensor:
    return du.addmm_(ds, weight) if ds.dtype == du.dtype else du.add_(ds @ weight)
