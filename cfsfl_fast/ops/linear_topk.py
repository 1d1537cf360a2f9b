"""Scores of a linear layer over the items, and the best of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cfsfl_fast import library, reference
from cfsfl_fast.compiling import implementation, selected, whole
from cfsfl_fast.lookups import Lookups, Sink, Table, sink_of
from cfsfl_fast.ops.csr import CSR, bounded


class _ScoresOfList(torch.autograd.Function):
    """Gives a list's scores their gradient: du = sum_k ds_k weight[ids_k]; the table's part goes to its sink."""

    @staticmethod
    def forward(
        ctx: Any, u: Tensor, weight: Tensor, bias: Tensor, ids: Tensor, scores: Tensor, sink: Sink, impl: Any
    ) -> Tensor:
        ctx.save_for_backward(u, weight, ids)
        ctx.sink, ctx.impl = sink, impl
        return scores.view_as(scores)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dscores: Tensor) -> tuple[Tensor | None, ...]:
        u, weight, ids = ctx.saved_tensors
        lists = ids.clamp_min(0).flatten(), library.list_offsets(ids), dscores.masked_fill(ids < 0, 0).flatten()
        if ctx.sink is not None:
            ctx.sink.append(Lookups(*lists, source=u))
        du = ctx.impl.row_bag(weight, *lists) if ctx.needs_input_grad[0] else None
        return du, *(None,) * 6


def with_gradient(u: Tensor, weight: Tensor, bias: Tensor, ids: Tensor, scores: Tensor, impl: Any) -> Tensor:
    """A list's scores [B, K], found without gradient, as functions of u, weight and bias."""
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    sink = sink_of(weight)
    if not torch.is_grad_enabled() or not (u.requires_grad or sink is not None):
        return scores
    return _ScoresOfList.apply(u, weight, bias, ids, scores, sink, impl)


def loop_state(device: torch.device) -> Any:
    """What the implementation remembers from step to step of one loop; hand it to every operation of that loop."""
    backend = selected(device)
    return None if backend == "reference" else implementation(backend).loop_state()


def linear_topk(
    u: Tensor, output: Table, k: int, exclude: CSR | None = None, state: Any = None
) -> tuple[Tensor, Tensor]:
    """Equation (2): the K best items of u weight^T + bias; the scores are differentiable in u, weight and bias.

    Args:
        u: [B, H].
        output: weight [M, H] and bias [M].
        k: K >= 0; a list holds min(K, M) places.
        exclude: CSR rows of items that never enter, ascending and unique within a row.
        state: of `loop_state`, where this is one of several calls with the same users, output and exclude.

    Returns:
        ids [B, K] int64, score descending, ties to the smaller id, padded with -1; scores [B, K], padded with -inf.
    """
    u = u.to(output.weight.dtype)
    return _linear_topk(u, output.weight, output.bias, k, exclude, state, selected(u.device))


@whole
def _linear_topk(
    u: Tensor, weight: Tensor, bias: Tensor, k: int, exclude: CSR | None, state: Any, backend: str
) -> tuple[Tensor, Tensor]:
    exclude = exclude and bounded(*exclude, backend)
    if backend == "reference":
        return reference.linear_topk(u, weight, bias, k, exclude)
    impl = implementation(backend)
    with torch.no_grad():
        ids, scores = impl.linear_topk(u, weight, bias, k, exclude, state)
    return ids, with_gradient(u, weight, bias, ids, scores, impl)


def pair_scores(u: Tensor, weight: Tensor, bias: Tensor, ids: Tensor) -> Tensor:
    """< u_b, weight[ids_bk] > + bias[ids_bk], whatever precision products have. [B, K] int64 -> [B, K]; no gradient"""
    return _pair_scores(u, weight, bias, ids, selected(u.device))


@whole
def _pair_scores(u: Tensor, weight: Tensor, bias: Tensor, ids: Tensor, backend: str) -> Tensor:
    impl = library if backend == "reference" else implementation(backend)
    with torch.no_grad():
        return impl.row_dot(u, weight, ids).add_(bias[ids])


def topk(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The list of each row of scores [B, M] that exist already, without gradient: ids [B, K], scores [B, K].

    Score descending, ties to the smaller id; scores of -inf or NaN never enter, and a list that ends early is padded
    with -1 and -inf.
    """
    if torch.compiler.is_compiling() or selected(scores.device) == "reference":
        return reference.top(scores, k)
    return library.exact_topk(scores, k)
