"""The weighted squared loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cfsfl_fast import library, reference
from cfsfl_fast.compiling import implementation, selected, whole
from cfsfl_fast.lookups import Lookups, Sink, Table, sink_of
from cfsfl_fast.ops.csr import CSR, bounded


class _LinearSquares(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        u: Tensor,
        weight: Tensor,
        bias: Tensor,
        items: Tensor,
        offsets: Tensor,
        exclude: CSR | None,
        positive: float,
        sink: Sink,
        impl: Any,
    ) -> Tensor:
        loss, ctx.kept = library.linear_squares(u, weight, bias, items, offsets, exclude, positive)
        ctx.save_for_backward(u, weight, bias)
        ctx.rest = items, offsets, exclude, positive
        ctx.sink, ctx.impl = sink, impl
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        u, weight, bias = ctx.saved_tensors
        items, offsets, exclude, positive = ctx.rest
        kept, ctx.kept = ctx.kept, None
        du, dweight, dbias, single = library.linear_squares_backward(
            dloss, u, weight, bias, items, offsets, exclude, positive, kept
        )
        for (ids, ends), ds in zip(((items, offsets), exclude), single, strict=False):
            du += ctx.impl.row_bag(weight, ids, ends, ds)
            if ctx.sink is not None:
                ctx.sink.append(Lookups(ids, ends, ds, u))
        return du, dweight, dbias, *(None,) * 6


def linear_squares(
    u: Tensor, output: Table, items: Tensor, offsets: Tensor, exclude: CSR | None = None, *, positive: float
) -> Tensor:
    """The weighted squared loss sum_j c_j (x_j - s_j)^2, s = u weight^T + bias; c_j = positive where x_j = 1, else 1.

    Exact; for many users by the Gram matrix of the output layer, so that scores [B, M] never exist.

    Args:
        u: [B, H].
        output: weight [M, H] and bias [M].
        items, offsets: the targets x as CSR rows.
        exclude: CSR rows of items that leave the sum; none may be a target of its row.
        positive: c_j of a target.

    Returns:
        loss [B]; differentiable in u, weight and bias.
    """
    return _linear_squares(u, output.weight, output.bias, items, offsets, exclude, positive, selected(u.device))


@whole
def _linear_squares(
    u: Tensor,
    weight: Tensor,
    bias: Tensor,
    items: Tensor,
    offsets: Tensor,
    exclude: CSR | None,
    positive: float,
    backend: str,
) -> Tensor:
    items, offsets = bounded(items, offsets, backend)
    exclude = exclude and bounded(*exclude, backend)
    if backend == "reference":
        return reference.linear_squares(u, weight, bias, items, offsets, exclude, positive)
    rest = exclude, positive, sink_of(weight), implementation(backend)
    return _LinearSquares.apply(u, weight, bias, items, offsets, *rest)
