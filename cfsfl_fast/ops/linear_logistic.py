"""The logistic loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cfsfl_fast import library, reference
from cfsfl_fast.compiling import selected, whole
from cfsfl_fast.lookups import Table
from cfsfl_fast.ops.csr import CSR, bounded


class _LinearLogistic(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, u: Tensor, weight: Tensor, bias: Tensor, items: Tensor, offsets: Tensor, exclude: CSR | None
    ) -> Tensor:
        loss, ctx.kept = library.linear_logistic(u, weight, bias, items, offsets, exclude)
        ctx.save_for_backward(u, weight, bias)
        ctx.rest = items, offsets, exclude
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        u, weight, bias = ctx.saved_tensors
        items, offsets, exclude = ctx.rest
        kept, ctx.kept = ctx.kept, None
        gradients = library.linear_logistic_backward(dloss, u, weight, bias, items, offsets, exclude, kept)
        return *gradients, None, None, None


def linear_logistic(u: Tensor, output: Table, items: Tensor, offsets: Tensor, exclude: CSR | None = None) -> Tensor:
    """The logistic loss sum_j softplus(s_j) - sum_{j in x} s_j, s = u weight^T + bias: of every item, whether x has it.

    Args:
        u: [B, H].
        output: weight [M, H] and bias [M].
        items, offsets: the targets x as CSR rows.
        exclude: CSR rows of items that leave the sum; none may be a target of its row.

    Returns:
        loss [B]; differentiable in u, weight and bias.
    """
    return _linear_logistic(u, output.weight, output.bias, items, offsets, exclude, selected(u.device))


@whole
def _linear_logistic(
    u: Tensor, weight: Tensor, bias: Tensor, items: Tensor, offsets: Tensor, exclude: CSR | None, backend: str
) -> Tensor:
    items, offsets = bounded(items, offsets, backend)
    exclude = exclude and bounded(*exclude, backend)
    if backend == "reference":
        return reference.linear_logistic(u, weight, bias, items, offsets, exclude)
    return _LinearLogistic.apply(u, weight, bias, items, offsets, exclude)
