"""Sums of the table rows that CSR rows name, and the gradient of the table.

    out_b = sum_{e in row b} weights_e table[items_e]                                                  (1)
    dtable_j = sum_{e : items_e = j} weights_e dout[row of e]                                          (2)

(2) sorts the entries by item (stable) and sums segments. A hot item's segment is longer than a program should walk:
every aligned SPLIT entries that belong to one item are summed first, each by a program of its own, and the segment's
program adds those sums. Order is fixed by the sort: no atomics, the same bits on every run.

Shapes    table [M, D], items [E] int64, offsets [B + 1] int64, weights [E] or none; out [B, D], dtable [M, D].
          Entries past offsets[-1] belong to no row.
Traffic   forward E D itemsize bytes for 2 E D flops: bandwidth-bound. Backward the same, plus M D written and a sort of
          E.
Numerics  Sums in float32 for every table dtype.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cfsfl_fast import library
from cfsfl_fast.kernels.tile import covers, on_its_device, power_of_two, row_tile, rows_first, vector

SPLIT = 32
"""Entries whose sum one program makes; segments below twice that are never split."""


@triton.jit
def row_bag_fwd_kernel(
    out_ptr,                                            # out [B, D]
    table_ptr, items_ptr, offsets_ptr, weights_ptr,     # in [M, D], [E], [B + 1], [E]
    D,
    stride_table,
    HAS_WEIGHTS: tl.constexpr, VEC: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Equation (1). One program per row and BLOCK_D columns, BLOCK_E table rows in flight."""
    D, stride_table = D // VEC * VEC, stride_table // VEC * VEC
    b = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    first, last = tl.load(offsets_ptr + b), tl.load(offsets_ptr + b + 1)
    total = tl.zeros((BLOCK_E, BLOCK_D), tl.float32)
    total = add_entries(
        total, first, last, items_ptr, weights_ptr, table_ptr, stride_table, d, D, 0x7FFFFFFF, HAS_WEIGHTS, BLOCK_E
    )  # fmt: skip
    out = tl.sum(total, 0)
    tl.store(out_ptr + b * D + d, out.to(out_ptr.dtype.element_ty), mask=d < D)


@triton.jit
def add_entries(
    total, first, last, rows_ptr, weights_ptr, source_ptr, stride, d, D, n_rows,
    HAS_WEIGHTS: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """total [BLOCK_E, BLOCK_D] with weights_e source[rows_e] of first <= e < last in its rows; rows from n_rows on are
    left out.

    The rows of `total` are summed once, after every loop: they live in different warps.
    """
    e = tl.arange(0, BLOCK_E)
    for e0 in range(first, last, BLOCK_E):
        inside = e0 + e < last
        row = tl.load(rows_ptr + e0 + e, mask=inside, other=0)
        inside &= row < n_rows
        x = row_tile(source_ptr, row, stride, d, inside[:, None] & (d < D)[None, :])
        if HAS_WEIGHTS:
            x *= tl.load(weights_ptr + e0 + e, mask=inside, other=0.0).to(tl.float32)[:, None]
        total += x
    return total


@triton.jit
def row_bag_split_bwd_kernel(
    partial_ptr,                                        # out [E / SPLIT, D]
    dout_ptr, items_ptr, rows_ptr, weights_ptr,         # in [B, D], sorted [E], [E], [E]
    B, D,
    stride_dout,
    HAS_WEIGHTS: tl.constexpr, VEC: tl.constexpr, SPLIT: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Equation (2) over SPLIT aligned entries, where all of them are one item's."""
    D, stride_dout = D // VEC * VEC, stride_dout // VEC * VEC
    split = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    first = split * SPLIT
    if tl.load(items_ptr + first) == tl.load(items_ptr + first + SPLIT - 1):
        total = tl.zeros((BLOCK_E, BLOCK_D), tl.float32)
        total = add_entries(
            total, first, first + SPLIT, rows_ptr, weights_ptr, dout_ptr, stride_dout, d, D, B, HAS_WEIGHTS, BLOCK_E
        )  # fmt: skip
        tl.store(partial_ptr + split * D + d, tl.sum(total, 0), mask=d < D)


@triton.jit
def row_bag_bwd_kernel(
    dtable_ptr,                                                 # out [M, D]
    dout_ptr, ends_ptr, rows_ptr, weights_ptr, partial_ptr,     # in [B, D], [M + 1], sorted [E], [E], [E / SPLIT, D]
    B, D,
    stride_dout,
    HAS_WEIGHTS: tl.constexpr, VEC: tl.constexpr, SPLIT: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Equation (2). One program per item and BLOCK_D columns: its head, its whole splits, its tail. Most segments are a
    few entries long: what counts is how many programs there are, and that each has few things to wait for.
    """
    D, stride_dout = D // VEC * VEC, stride_dout // VEC * VEC
    j = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    first, last = tl.load(ends_ptr + j), tl.load(ends_ptr + j + 1)
    split, stop = (first + SPLIT - 1) // SPLIT, last // SPLIT
    head = tl.where(split < stop, split * SPLIT, last)
    total = tl.zeros((BLOCK_E, BLOCK_D), tl.float32)
    total = add_entries(
        total, first, head, rows_ptr, weights_ptr, dout_ptr, stride_dout, d, D, B, HAS_WEIGHTS, BLOCK_E
    )  # fmt: skip
    if split < stop:
        s = tl.arange(0, BLOCK_E)
        for s0 in range(split, stop, BLOCK_E):
            inside = s0 + s < stop
            total += row_tile(partial_ptr, s0 + s, D, d, inside[:, None] & (d < D)[None, :])
        total = add_entries(
            total, stop * SPLIT, last, rows_ptr, weights_ptr, dout_ptr, stride_dout, d, D, B, HAS_WEIGHTS, BLOCK_E
        )  # fmt: skip
    tl.store(dtable_ptr + j * D + d, tl.sum(total, 0).to(dtable_ptr.dtype.element_ty), mask=d < D)


# Launchers


def blocks(D: int) -> dict[str, int]:
    """Forward tiles for rows of D columns: 128 columns of 16 rows, or 64 of 32, in the registers of four warps."""
    width = min(128, power_of_two(D))
    return {"BLOCK_E": 2048 // width, "BLOCK_D": width, "num_warps": 4}


def backward_blocks(D: int) -> dict[str, int]:
    """Backward tiles: whole rows, up to 1024 columns, of four entries; a warp for every 256 columns."""
    width = min(1024, power_of_two(D))
    return {"BLOCK_E": 2, "BLOCK_D": width, "num_warps": max(1, width // 256)}


@on_its_device
def row_bag(table: Tensor, items: Tensor, offsets: Tensor, weights: Tensor | None = None) -> Tensor:
    """sum_{e in row b} weights_e table[items_e]. [B, D]"""
    if not covers(table) or not (weights is None or covers(weights)):
        return library.row_bag(table, items, offsets, weights)
    B, D = len(offsets) - 1, table.shape[1]
    out = table.new_empty(B, D)
    if out.numel():
        table, items, offsets, tiles = rows_first(table), rows_first(items), rows_first(offsets), blocks(D)
        weights = None if weights is None else rows_first(weights)
        row_bag_fwd_kernel[(B, triton.cdiv(D, tiles["BLOCK_D"]))](
            out, table, items, offsets, items if weights is None else weights, D, table.stride(0),
            HAS_WEIGHTS=weights is not None, VEC=vector(D, table.stride(0)), **tiles,
        )  # fmt: skip
    return out


@on_its_device
def row_bag_backward(dout: Tensor, items: Tensor, offsets: Tensor, weights: Tensor | None, n_items: int) -> Tensor:
    """The gradient of `row_bag` for its table [M, D]: segment sums in item order."""
    if not covers(dout) or not (weights is None or covers(weights)):
        return library.row_bag_backward(dout, items, offsets, weights, n_items)
    (B, D), E = dout.shape, len(items)
    dtable = dout.new_empty(n_items, D)
    if E == 0 or dtable.numel() == 0:
        return dtable.zero_()
    dout, offsets, tiles = rows_first(dout), rows_first(offsets), backward_blocks(D)
    # 32-bit keys halve the passes of the sort; searchsorted, unlike bincount, never waits for the device.
    items, order = items.to(torch.int32).sort(stable=True)
    rows = torch.searchsorted(offsets, order, right=True) - 1
    weights = rows if weights is None else weights[order]
    ends = torch.searchsorted(items, torch.arange(n_items + 1, dtype=torch.int32, device=items.device))
    n_splits = E // SPLIT
    partial = dout.new_empty(max(1, n_splits), D, dtype=torch.float32)
    columns = triton.cdiv(D, tiles["BLOCK_D"])
    flags = {"HAS_WEIGHTS": weights is not rows, "VEC": vector(D, dout.stride(0)), "SPLIT": SPLIT, **tiles}
    if n_splits:
        row_bag_split_bwd_kernel[(n_splits, columns)](
            partial, dout, items, rows, weights, B, D, dout.stride(0), **flags
        )  # fmt: skip
    row_bag_bwd_kernel[(n_items, columns)](
        dtable, dout, ends, rows, weights, partial, B, D, dout.stride(0), **flags
    )  # fmt: skip
    return dtable
