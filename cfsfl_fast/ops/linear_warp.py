"""The rank-weighted loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cfsfl_fast import library, reference
from cfsfl_fast.compiling import selected, whole
from cfsfl_fast.lookups import Table
from cfsfl_fast.ops.csr import CSR, bounded


class _LinearWARP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, u: Tensor, weight: Tensor, bias: Tensor, items: Tensor, offsets: Tensor, exclude: CSR | None
    ) -> Tensor:
        loss, ctx.ds = library.linear_warp(u, weight, bias, items, offsets, exclude)
        ctx.save_for_backward(u, weight)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        u, weight = ctx.saved_tensors
        ds, ctx.ds = ctx.ds, None
        du = torch.mm(ds, weight).mul_(dloss[:, None])
        dweight, dbias = torch.mm(ds.T, u * dloss[:, None]), dloss @ ds
        library.scratch.give(ds)
        return du, dweight, dbias, None, None, None


def linear_warp(u: Tensor, output: Table, items: Tensor, offsets: Tensor, exclude: CSR | None = None) -> Tensor:
    """The rank-weighted loss (WARP, Weston et al. 2011) of s = u weight^T + bias, every negative counted:

        sum_{i in x} Phi(rank_i) sum_{j not in x, s_j > s_i} (s_j - s_i),  Phi(r) = sum_{k <= r} 1 / k,

    rank_i the number of those j; Phi is constant in the gradient. One sort per user instead of |x| M comparisons.

    Args:
        u: [B, H].
        output: weight [M, H] and bias [M].
        items, offsets: the targets x as CSR rows.
        exclude: CSR rows of items that are no negatives; none may be a target of its row.

    Returns:
        loss [B]; differentiable in u, weight and bias.
    """
    return _linear_warp(u, output.weight, output.bias, items, offsets, exclude, selected(u.device))


@whole
def _linear_warp(
    u: Tensor, weight: Tensor, bias: Tensor, items: Tensor, offsets: Tensor, exclude: CSR | None, backend: str
) -> Tensor:
    items, offsets = bounded(items, offsets, backend)
    exclude = exclude and bounded(*exclude, backend)
    if backend == "reference":
        return reference.linear_warp(u, weight, bias, items, offsets, exclude)
    return _LinearWARP.apply(u, weight, bias, items, offsets, exclude)
