"""The operations as PyTorch operators, `torch.ops.cfsfl_fast.*`: torch.compile calls them without looking inside.

An operator takes the backend's name last, where backends differ, and calls that implementation; its fake kernel gives
shapes and dtypes. Gradients are the border's business (`ops`), which calls forward and backward by name. `Operators`
has the functions of an implementation, so that the border does not know which of the two it calls.

What operators cannot take is put into tensors: optional CSR rows are two optional tensors, the layers of both networks
one list. What a loop's steps remember of each other (backend "cpp") is a number, drawn while the loop runs.
"""

from __future__ import annotations

import itertools
import weakref
from typing import Any

import torch
from torch import Tensor

from cfsfl_fast import backends, library

CSR = tuple[Tensor, Tensor]
Layers = list[tuple[Tensor, Tensor]]


class Operators:
    """A backend's functions, each a call of an operator."""

    def __init__(self, backend: str) -> None:
        self.backend = backend

    def loop_state(self) -> Tensor | None:
        """The number of a state; None where steps remember nothing of one another but buffers."""
        return torch.ops.cfsfl_fast.loop_state(self.backend) if self.backend == "cpp" else None

    def row_bag(self, table: Tensor, items: Tensor, offsets: Tensor, weights: Tensor | None = None) -> Tensor:
        """As every implementation's; so are the others."""
        return torch.ops.cfsfl_fast.row_bag(table, items, offsets, weights, self.backend)

    def row_bag_backward(
        self, dout: Tensor, items: Tensor, offsets: Tensor, weights: Tensor | None, n_items: int
    ) -> Tensor:
        return torch.ops.cfsfl_fast.row_bag_backward(dout, items, offsets, weights, n_items, self.backend)

    def row_dot(self, x: Tensor, table: Tensor, ids: Tensor) -> Tensor:
        return torch.ops.cfsfl_fast.row_dot(x, table, ids, self.backend)

    def fuse(self, hx: Tensor, lookup: Tensor, ids: Tensor, scores: Tensor, action: str) -> tuple[Tensor, Tensor]:
        return torch.ops.cfsfl_fast.fuse(hx, lookup, ids, scores, action, self.backend)

    def fuse_softmax(
        self, u: Tensor, weight: Tensor, bias: Tensor, lookup: Tensor, exclude: CSR | None
    ) -> tuple[Tensor, Tensor]:
        rows = exclude or (None, None)
        return torch.ops.cfsfl_fast.fuse_softmax(u, weight, bias, lookup, *rows)

    def fuse_softmax_backward(
        self,
        dmean: Tensor,
        u: Tensor,
        weight: Tensor,
        bias: Tensor,
        lookup: Tensor,
        exclude: CSR | None,
        mean: Tensor,
        lse: Tensor,
    ) -> tuple[Tensor, ...]:
        inputs = dmean, u, weight, bias, lookup, *(exclude or (None, None)), mean, lse
        return torch.ops.cfsfl_fast.fuse_softmax_backward(*inputs)

    def linear_topk(
        self, u: Tensor, weight: Tensor, bias: Tensor, k: int, exclude: CSR | None = None, state: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return torch.ops.cfsfl_fast.linear_topk(u, weight, bias, k, *(exclude or (None, None)), state, self.backend)

    def feedback_step(
        self,
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
        state: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        layers = [t for layer in (*reward, *feedback) for t in layer]
        tensors = u, weight, bias, hx, lookup, layers, len(reward), hoisted, wv
        rows = exclude or (None, None)
        return torch.ops.cfsfl_fast.feedback_step(*tensors, k, action, *rows, state, self.backend)

    def linear_nll(
        self,
        u: Tensor,
        weight: Tensor,
        bias: Tensor,
        items: Tensor,
        offsets: Tensor,
        exclude: CSR | None,
        k: int,
        state: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor], None]:
        inputs = u, weight, bias, items, offsets, *(exclude or (None, None)), k, state
        nll, lse, ids, scores = torch.ops.cfsfl_fast.linear_nll(*inputs, self.backend)
        return nll, lse, (ids, scores), None

    def linear_nll_backward(
        self,
        dnll: Tensor,
        u: Tensor,
        weight: Tensor,
        bias: Tensor,
        items: Tensor,
        offsets: Tensor,
        exclude: CSR | None,
        lse: Tensor,
        kept: None,
    ) -> tuple[Tensor, ...]:
        inputs = dnll, u, weight, bias, items, offsets, *(exclude or (None, None)), lse
        return torch.ops.cfsfl_fast.linear_nll_backward(*inputs, self.backend)


def _rows(items: Tensor | None, offsets: Tensor | None) -> CSR | None:
    return None if items is None or offsets is None else library.without_room(items, offsets)


# A loop's state

_states: dict[int, Any] = {}
_numbers = itertools.count()


@torch.library.custom_op("cfsfl_fast::loop_state", mutates_args=())
def loop_state(backend: str) -> Tensor:
    """The number of a new state, which is kept as long as the number is. [] int64, on the CPU"""
    key = next(_numbers)
    number = torch.tensor(key)
    _states[key] = backends.implementation(backend).loop_state()
    weakref.finalize(number, _states.pop, key, None)
    return number


@loop_state.register_fake
def _(backend: str) -> Tensor:
    return torch.empty((), dtype=torch.int64)


def _state(number: Tensor | None) -> Any:
    """The state of a number; without it answers are the same."""
    return None if number is None else _states.get(int(number))


# Look-ups


@torch.library.custom_op("cfsfl_fast::row_bag", mutates_args=())
def row_bag(table: Tensor, items: Tensor, offsets: Tensor, weights: Tensor | None, backend: str) -> Tensor:
    """Every implementation's `row_bag`."""
    items, offsets = library.without_room(items, offsets)
    return backends.implementation(backend).row_bag(
        table, items, offsets, None if weights is None else weights[: len(items)]
    )


@row_bag.register_fake
def _(table: Tensor, items: Tensor, offsets: Tensor, weights: Tensor | None, backend: str) -> Tensor:
    return table.new_empty(offsets.shape[0] - 1, table.shape[1])


@torch.library.custom_op("cfsfl_fast::row_bag_backward", mutates_args=())
def row_bag_backward(
    dout: Tensor, items: Tensor, offsets: Tensor, weights: Tensor | None, n_items: int, backend: str
) -> Tensor:
    """Every implementation's `row_bag_backward`."""
    if not items.is_cuda and len(items) and int(items.max()) == n_items:  # room, between rows too
        kept = items < n_items
        ends = torch.cat([kept.new_zeros(1, dtype=torch.int64), kept.cumsum(0)])
        items, offsets, weights = items[kept], ends[offsets], None if weights is None else weights[kept]
    return backends.implementation(backend).row_bag_backward(dout, items, offsets, weights, n_items)


@row_bag_backward.register_fake
def _(dout: Tensor, items: Tensor, offsets: Tensor, weights: Tensor | None, n_items: int, backend: str) -> Tensor:
    return dout.new_empty(n_items, dout.shape[1])


@torch.library.custom_op("cfsfl_fast::row_dot", mutates_args=())
def row_dot(x: Tensor, table: Tensor, ids: Tensor, backend: str) -> Tensor:
    """Every implementation's `row_dot`."""
    return backends.implementation(backend).row_dot(x, table, ids)


@row_dot.register_fake
def _(x: Tensor, table: Tensor, ids: Tensor, backend: str) -> Tensor:
    return x.new_empty(ids.shape)


@torch.library.custom_op("cfsfl_fast::fuse", mutates_args=())
def fuse(hx: Tensor, lookup: Tensor, ids: Tensor, scores: Tensor, action: str, backend: str) -> tuple[Tensor, Tensor]:
    """Every implementation's `fuse`."""
    return backends.implementation(backend).fuse(hx, lookup, ids, scores, action)


@fuse.register_fake
def _(hx: Tensor, lookup: Tensor, ids: Tensor, scores: Tensor, action: str, backend: str) -> tuple[Tensor, Tensor]:
    return hx.new_empty(hx.shape), hx.new_empty(ids.shape)


@torch.library.custom_op("cfsfl_fast::fuse_softmax", mutates_args=())
def fuse_softmax(
    u: Tensor,
    weight: Tensor,
    bias: Tensor,
    lookup: Tensor,
    out_items: Tensor | None,
    out_offsets: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`library.fuse_softmax`, of every backend."""
    exclude = _rows(out_items, out_offsets)
    return library.fuse_softmax(u, weight, bias, lookup, exclude)


@fuse_softmax.register_fake
def _(
    u: Tensor,
    weight: Tensor,
    bias: Tensor,
    lookup: Tensor,
    out_items: Tensor | None,
    out_offsets: Tensor | None,
) -> tuple[Tensor, Tensor]:
    return lookup.new_empty(u.shape[0], lookup.shape[1]), u.new_empty(u.shape[0], dtype=_wide(u.dtype))


@torch.library.custom_op("cfsfl_fast::fuse_softmax_backward", mutates_args=())
def fuse_softmax_backward(
    dmean: Tensor,
    u: Tensor,
    weight: Tensor,
    bias: Tensor,
    lookup: Tensor,
    out_items: Tensor | None,
    out_offsets: Tensor | None,
    mean: Tensor,
    lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`library.fuse_softmax_backward`, of every backend."""
    exclude = _rows(out_items, out_offsets)
    return library.fuse_softmax_backward(dmean, u, weight, bias, lookup, exclude, mean, lse)


@fuse_softmax_backward.register_fake
def _(
    dmean: Tensor,
    u: Tensor,
    weight: Tensor,
    bias: Tensor,
    lookup: Tensor,
    out_items: Tensor | None,
    out_offsets: Tensor | None,
    mean: Tensor,
    lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    du, dweight, dbias, dlookup = map(torch.empty_like, (u, weight, bias, lookup))
    return du, dweight, dbias, dlookup


# The product with the output layer


@torch.library.custom_op("cfsfl_fast::linear_topk", mutates_args=())
def linear_topk(
    u: Tensor,
    weight: Tensor,
    bias: Tensor,
    k: int,
    out_items: Tensor | None,
    out_offsets: Tensor | None,
    state: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Every implementation's `linear_topk`."""
    exclude = _rows(out_items, out_offsets)
    ids, scores = backends.implementation(backend).linear_topk(u, weight, bias, k, exclude, _state(state))
    return ids, scores.to(_wide(u.dtype))


@linear_topk.register_fake
def _(
    u: Tensor,
    weight: Tensor,
    bias: Tensor,
    k: int,
    out_items: Tensor | None,
    out_offsets: Tensor | None,
    state: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return _list_like(u, weight, k)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """Of scores and losses, which backends may give as narrow as the product."""
    return torch.promote_types(dtype, torch.float32)


def _list_like(u: Tensor, weight: Tensor, k: int) -> tuple[Tensor, Tensor]:
    shape = u.shape[0], min(k, weight.shape[0])
    return u.new_empty(shape, dtype=torch.int64), u.new_empty(shape, dtype=_wide(u.dtype))


@torch.library.custom_op("cfsfl_fast::feedback_step", mutates_args=())
def feedback_step(
    u: Tensor,
    weight: Tensor,
    bias: Tensor,
    hx: Tensor,
    lookup: Tensor,
    layers: list[Tensor],
    depth: int,
    hoisted: Tensor,
    wv: Tensor,
    k: int,
    action: str,
    out_items: Tensor | None,
    out_offsets: Tensor | None,
    state: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Every implementation's `feedback_step`; layers: weight, bias, weight, bias ..., the reward's `depth` first."""
    pairs = list(zip(layers[::2], layers[1::2], strict=True))
    rest = k, action, _rows(out_items, out_offsets), _state(state)
    v, logit, ids, scores, *more = backends.implementation(backend).feedback_step(
        u, weight, bias, hx, lookup, pairs[:depth], pairs[depth:], hoisted, wv, *rest
    )
    return v, logit, ids, scores.to(_wide(u.dtype)), *more


@feedback_step.register_fake
def _(
    u: Tensor,
    weight: Tensor,
    bias: Tensor,
    hx: Tensor,
    lookup: Tensor,
    layers: list[Tensor],
    depth: int,
    hoisted: Tensor,
    wv: Tensor,
    k: int,
    action: str,
    out_items: Tensor | None,
    out_offsets: Tensor | None,
    state: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    B = u.shape[0]
    ids, scores = _list_like(u, weight, k)
    v, logit, following = hx.new_empty(B, wv.shape[0]), hx.new_empty(B), hx.new_empty(hoisted.shape)
    return v, logit, ids, scores, following, hx.new_empty(hx.shape), hx.new_empty(ids.shape)


@torch.library.custom_op("cfsfl_fast::linear_nll", mutates_args=())
def linear_nll(
    u: Tensor,
    weight: Tensor,
    bias: Tensor,
    items: Tensor,
    offsets: Tensor,
    out_items: Tensor | None,
    out_offsets: Tensor | None,
    k: int,
    state: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Every implementation's `linear_nll`, less the scores that a backward pass could use again."""
    rest = *library.without_room(items, offsets), _rows(out_items, out_offsets), k, _state(state)
    nll, lse, (ids, scores), kept = backends.implementation(backend).linear_nll(u, weight, bias, *rest)
    if kept is not None:
        library.scratch.give(kept)
    return nll.to(_wide(u.dtype)), lse.clone(), ids, scores.to(_wide(u.dtype))  # lse may be a view of a buffer


@linear_nll.register_fake
def _(
    u: Tensor,
    weight: Tensor,
    bias: Tensor,
    items: Tensor,
    offsets: Tensor,
    out_items: Tensor | None,
    out_offsets: Tensor | None,
    k: int,
    state: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wide = u.new_empty(u.shape[0], dtype=torch.float32 if backend == "triton" else _wide(u.dtype))
    return u.new_empty(u.shape[0], dtype=_wide(u.dtype)), wide, *_list_like(u, weight, k)


@torch.library.custom_op("cfsfl_fast::linear_nll_backward", mutates_args=())
def linear_nll_backward(
    dnll: Tensor,
    u: Tensor,
    weight: Tensor,
    bias: Tensor,
    items: Tensor,
    offsets: Tensor,
    out_items: Tensor | None,
    out_offsets: Tensor | None,
    lse: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Every implementation's `linear_nll_backward`, scoring again."""
    rest = *library.without_room(items, offsets), _rows(out_items, out_offsets), lse, None
    return backends.implementation(backend).linear_nll_backward(dnll, u, weight, bias, *rest)


@linear_nll_backward.register_fake
def _(
    dnll: Tensor,
    u: Tensor,
    weight: Tensor,
    bias: Tensor,
    items: Tensor,
    offsets: Tensor,
    out_items: Tensor | None,
    out_offsets: Tensor | None,
    lse: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(u), weight.new_empty(weight.shape), bias.new_empty(bias.shape)
