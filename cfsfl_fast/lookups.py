"""Tables whose looked-up rows get sparse gradients.

A `Table` collects its look-ups from every step of the loop and sums them once, so that no dense gradient of a table
exists for a step t < T.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cfsfl_fast import library
from cfsfl_fast.compiling import implementation, selected, whole
from cfsfl_fast.sharded import Sharded


class Lookups(NamedTuple):
    """One look-up's part of a table's gradient: row items_e gains weights_e source[row of e]."""

    items: Tensor  # [E]
    offsets: Tensor  # [B + 1]
    weights: Tensor | None  # [E]
    source: Tensor  # [B, D]
    bias: Tensor | None = None  # what the bias gains, where not weights_e. [E]


Sink = list[Lookups] | None


def sink_of(weight: Tensor) -> Sink:
    """Where the look-ups of a table's rows are left for its gradient; None of one that has no gradient."""
    return getattr(weight.grad_fn, "sink", None)


class _Collect(torch.autograd.Function):
    """Hands a table out and, after every user of it, adds the look-ups they left in `sink` to their dense gradient."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, bias: Tensor | None, impl: Any) -> tuple[Tensor, Tensor | None]:
        ctx.sink, ctx.impl, ctx.by_rows = [], impl, _by_rows.get() and weight.is_leaf
        ctx.set_materialize_grads(False)
        ctx.shapes = weight.shape, None if bias is None else bias.shape
        return weight.view_as(weight), None if bias is None else bias.view_as(bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dweight: Tensor | None, dbias: Tensor | None) -> tuple[Tensor | None, ...]:
        if not ctx.sink:
            return dweight, dbias, None
        (n_items, _), bias_shape = ctx.shapes
        parts, ctx.sink[:] = list(ctx.sink), []
        items = torch.cat([p.items for p in parts])
        each = [p.source.new_ones(p.items.shape[0]) if p.weights is None else p.weights for p in parts]
        weights = gains = torch.cat(each)
        if any(p.bias is not None for p in parts):
            gains = torch.cat([w if p.bias is None else p.bias for p, w in zip(parts, each, strict=True)])
        # Behind each part's rows one more, of zeros, owns its room.
        starts = accumulate(p.items.shape[0] for p in parts)
        offsets = torch.cat([parts[0].offsets, *(p.offsets + s for p, s in zip(parts[1:], starts, strict=False))])
        offsets = library.ended(offsets, items.shape[0])
        zeros = parts[0].source.new_zeros(1, parts[0].source.shape[1])
        source = torch.cat([rows for p in parts for rows in (p.source, zeros)])
        if isinstance(ctx.impl, Sharded):
            items, offsets, weights, gains = ctx.impl.own(items, offsets, weights, gains)
        if dweight is None and ctx.by_rows:
            dweight = _rows_gradient(ctx.impl, source, items, offsets, weights, ctx.shapes[0])
        else:
            looked_up = ctx.impl.row_bag_backward(source, items, offsets, weights, n_items)
            dweight = looked_up if dweight is None else looked_up.add_(dweight)
        if bias_shape is not None:
            looked_up = weights.new_zeros(n_items + 1).index_add_(0, items, gains)[:n_items]
            dbias = looked_up if dbias is None else looked_up.add_(dbias)
        return dweight, dbias, None


_by_rows: contextvars.ContextVar[bool] = contextvars.ContextVar("cfsfl_by_rows", default=False)


@contextlib.contextmanager
def gradients_by_rows(wanted: bool = True) -> Iterator[None]:
    """Tables made inside have gradients that are sparse in their rows, where nothing but look-ups gives them one."""
    token = _by_rows.set(wanted)
    try:
        yield
    finally:
        _by_rows.reset(token)


@whole
def _collected(weight: Tensor, bias: Tensor | None, backend: str) -> tuple[Tensor, Tensor | None]:
    return _Collect.apply(weight, bias, implementation(backend))


def _rows_gradient(
    impl: Any, source: Tensor, items: Tensor, offsets: Tensor, weights: Tensor, shape: torch.Size
) -> Tensor:
    """The gradient of a table [M, D], sparse in its rows: those that were looked up, each once."""
    rows, places = items.unique(return_inverse=True)
    there = rows < shape[0]  # room has no row
    values = impl.row_bag_backward(source, places, offsets, weights, len(rows))
    if not bool(there.all()):
        rows, values = rows[there], values[there]
    return torch.sparse_coo_tensor(rows[None], values, shape, is_coalesced=True, check_invariants=False)


class Table:
    """A table [M, D], and a bias [M] where it has one, whose rows one graph looks up many times.

    Make one per forward pass and hand it to every operation of the pass.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.weight, self._bias = weight, bias
        if torch.is_grad_enabled() and (weight.requires_grad or (bias is not None and bias.requires_grad)):
            self.weight, self._bias = _collected(weight, bias, selected(weight.device))

    @property
    def bias(self) -> Tensor:
        """[M], of a table that has one."""
        assert self._bias is not None, "this table has no bias"
        return self._bias

    @property
    def sink(self) -> Sink:
        """Of `sink_of`."""
        return sink_of(self.weight)

    def detached(self) -> Table:
        """The same rows, out of reach of gradients."""
        return Table(self.weight.detach(), None if self._bias is None else self._bias.detach())

    def rows(self, ids: Tensor) -> Table:
        """A table of some of the rows, in the order given, out of reach of gradients. ids: [M'] int64"""
        return Table(self.weight.detach()[ids], None if self._bias is None else self._bias.detach()[ids])
