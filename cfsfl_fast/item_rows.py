"""Which rows of an item table are drawn, where several processes share its rows: the same numbers as in one process.

torch's generator gives the numbers of a table in order, so a process draws the whole table block by block, keeps its
own rows, and never holds more than a block of the others.
"""

from __future__ import annotations

import contextlib
import contextvars
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

BLOCK = 1 << 14
"""Rows that are drawn at once. A multiple of 16: normal numbers come in sixteens."""

_span: contextvars.ContextVar[tuple[int, int] | None] = contextvars.ContextVar("cfsfl_rows", default=None)


@contextlib.contextmanager
def kept(span: tuple[int, int]) -> Iterator[None]:
    """Tables that are made inside have the rows span[0] .. span[1] - 1 alone."""
    token = _span.set(span)
    try:
        yield
    finally:
        _span.reset(token)


_dtype: contextvars.ContextVar[torch.dtype] = contextvars.ContextVar("cfsfl_table_dtype", default=torch.float32)


@contextlib.contextmanager
def stored_as(dtype: torch.dtype) -> Iterator[None]:
    """Glorot tables that are made inside have this dtype: the numbers of float32, rounded."""
    token = _dtype.set(dtype)
    try:
        yield
    finally:
        _dtype.reset(token)


def glorot(n_items: int, width: int) -> Tensor:
    """A table's first weights: uniform within sqrt(6 / (M + H)) (Glorot and Bengio 2010). [rows, H]"""
    bound = math.sqrt(3.0) * math.sqrt(2.0 / float(n_items + width))
    return _drawn(n_items, width, lambda block: block.uniform_(-bound, bound), _dtype.get())


def normal(n_items: int, width: int, scale: float) -> Tensor:
    """A table's first weights: normal, of a standard deviation. [rows, D]"""
    return _drawn(n_items, width, lambda block: block.normal_()).mul_(scale)


def own(whole: Tensor) -> Tensor:
    """The rows that are kept of a tensor that is drawn whole."""
    span = _span.get()
    return whole if span is None else whole[span[0] : span[1]].clone()


def _drawn(n_items: int, width: int, draw: Callable[[Tensor], Tensor], dtype: torch.dtype = torch.float32) -> Tensor:
    span = _span.get()
    if span is None and dtype == torch.float32:
        return draw(torch.empty(n_items, width))
    first, last = span or (0, n_items)
    table = torch.empty(last - first, width, dtype=dtype)
    begin = 0
    while begin < n_items:
        # The last block takes what is left: of fewer than 16 numbers, normal ones come another way.
        end = n_items if n_items - begin < 2 * BLOCK else begin + BLOCK
        block = draw(torch.empty(end - begin, width))
        low, high = max(first, begin), min(last, end)
        if low < high:
            table[low - first : high - first] = block[low - begin : high - begin]
        begin = end
    return table
