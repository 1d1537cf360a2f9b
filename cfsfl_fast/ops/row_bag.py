"""Weighted sums of table rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cfsfl_fast import library, reference
from cfsfl_fast.compiling import implementation, selected, whole
from cfsfl_fast.lookups import Lookups, Sink, Table, sink_of
from cfsfl_fast.ops.csr import bounded


class _RowBag(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, table: Tensor, items: Tensor, offsets: Tensor, weights: Tensor | None, sink: Sink, impl: Any
    ) -> Tensor:
        ctx.rows, ctx.sink = (items, offsets, weights), sink
        if table.dtype == torch.bfloat16:
            _, table, items = library.widened(table, items)
        return impl.row_bag(table, items, offsets, weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[None, ...]:
        if ctx.sink is not None:
            items, offsets, weights = ctx.rows
            ctx.sink.append(Lookups(items, offsets, weights, dout))
        return (None,) * 6


def row_bag(table: Table, items: Tensor, offsets: Tensor, weights: Tensor | None = None) -> Tensor:
    """sum_{e in row b} weights_e table[items_e] for each CSR row b; differentiable in the table.

    Args:
        table: [M, D]. Of a bfloat16 table the rows that are looked up are widened: products and sums are float32.
        items: [E] int64 in 0..M-1.
        offsets: [B + 1] int64, ascending from 0 to E, or to less where the rows have room.
        weights: [E] of any float dtype, None for ones; no gradient.

    Returns:
        [B, D]; an empty row gives 0.
    """
    return _row_bag(table.weight, items, offsets, weights, selected(table.weight.device))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype == torch.bfloat16 else dtype


@whole
def _row_bag(table: Tensor, items: Tensor, offsets: Tensor, weights: Tensor | None, backend: str) -> Tensor:
    items, offsets = bounded(items, offsets, backend)
    weights = None if weights is None else weights[: items.shape[0]].to(_wide(table.dtype))
    if backend == "reference":
        return reference.row_bag(table, items, offsets, weights)
    return _RowBag.apply(table, items, offsets, weights, sink_of(table), implementation(backend))
