"""The fusion h(x, a) of a history and a list."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cfsfl_fast import library, reference
from cfsfl_fast.compiling import implementation, selected, whole
from cfsfl_fast.lookups import Lookups, Sink, Table, sink_of
from cfsfl_fast.ops.csr import CSR, bounded


class Fuse(torch.autograd.Function):
    """Gives h = hx + sum_k w_k lookup[ids_k] (16) its gradient, which touches only the listed rows."""

    @staticmethod
    def forward(
        ctx: Any,
        hx: Tensor,
        lookup: Tensor,
        ids: Tensor,
        scores: Tensor,
        ready: tuple[Tensor, Tensor],
        action: str,
        sink: Sink,
        impl: Any,
    ) -> Tensor:
        h, w = ready
        ctx.save_for_backward(lookup, ids, scores, w)
        ctx.action, ctx.sink, ctx.impl = action, sink, impl
        return h

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dh: Tensor) -> tuple[Tensor | None, ...]:
        lookup, ids, scores, w = ctx.saved_tensors
        if ctx.sink is not None:
            ctx.sink.append(Lookups(ids.clamp_min(0).flatten(), library.list_offsets(ids), w.flatten(), dh))
        dscores = None
        if ctx.needs_input_grad[3] and ctx.action != "hard":
            dw = ctx.impl.row_dot(dh, lookup, ids)
            soft = library.list_softmax(ids, scores)
            dscores = soft * (dw - (soft * dw).sum(1, keepdim=True))
        return dh, None, None, dscores, *(None,) * 4


def fuse(hx: Tensor, lookup: Table, ids: Tensor, scores: Tensor, action: str) -> Tensor:
    """Equation (16): h(x, a) = hx + sum_k w_k lookup[ids_k]; differentiable in hx, lookup and scores.

    Args:
        hx: mean lookup row of the history. [B, D]
        lookup: [M, D].
        ids: the list, -1 where it ends. [B, K] int64
        scores: their scores. [B, K]
        action: how the list is weighted, forward and backward: "straight_through", "topk_softmax" or "hard".

    Returns:
        [B, D].
    """
    return _fuse(hx, lookup.weight, ids, scores, action, selected(hx.device))


@whole
def _fuse(hx: Tensor, lookup: Tensor, ids: Tensor, scores: Tensor, action: str, backend: str) -> Tensor:
    if backend == "reference":
        return reference.fuse(hx, lookup, ids, scores, action)
    impl = implementation(backend)
    with torch.no_grad():
        ready = impl.fuse(hx, lookup, ids, scores, action)
    return Fuse.apply(hx, lookup, ids, scores, ready, action, sink_of(lookup), impl)


class _FuseSoftmax(torch.autograd.Function):
    """softmax(s) lookup over the whole catalogue, streamed: [B, M] is never stored."""

    @staticmethod
    def forward(
        ctx: Any, u: Tensor, weight: Tensor, bias: Tensor, lookup: Tensor, exclude: CSR | None, impl: Any
    ) -> Tensor:
        mean, lse = impl.fuse_softmax(u, weight, bias, lookup, exclude)
        ctx.save_for_backward(u, weight, bias, lookup, mean, lse)
        ctx.exclude, ctx.impl = exclude, impl
        return mean

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dmean: Tensor) -> tuple[Tensor | None, ...]:
        u, weight, bias, lookup, mean, lse = ctx.saved_tensors
        return *ctx.impl.fuse_softmax_backward(dmean, u, weight, bias, lookup, ctx.exclude, mean, lse), None, None


def fuse_softmax(u: Tensor, output: Table, hx: Tensor, lookup: Table, exclude: CSR | None = None) -> Tensor:
    """Equation (16) with the whole policy as the list, h = hx + softmax(u weight^T + bias) lookup. [B, D]

    Differentiable in everything; excluded items have probability 0. Arguments as in `feedback_step`.
    """
    u = u.to(output.weight.dtype)
    return _fuse_softmax(u, output.weight, output.bias, hx, lookup.weight, exclude, selected(u.device))


@whole
def _fuse_softmax(
    u: Tensor, weight: Tensor, bias: Tensor, hx: Tensor, lookup: Tensor, exclude: CSR | None, backend: str
) -> Tensor:
    exclude = exclude and bounded(*exclude, backend)
    if backend == "reference":
        return reference.fuse_softmax(u, weight, bias, hx, lookup, exclude)
    impl = implementation(backend)
    if not hasattr(impl, "fuse_softmax"):
        impl = library  # no backend has its own
    return hx + _FuseSoftmax.apply(u, weight, bias, lookup, exclude, impl)
