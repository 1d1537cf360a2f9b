"""The multinomial loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cfsfl_fast import reference
from cfsfl_fast.compiling import implementation, selected, whole
from cfsfl_fast.lookups import Table
from cfsfl_fast.ops.csr import CSR, bounded
from cfsfl_fast.ops.linear_topk import with_gradient


class _LinearNLL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        u: Tensor,
        weight: Tensor,
        bias: Tensor,
        items: Tensor,
        offsets: Tensor,
        exclude: CSR | None,
        k: int,
        state: Any,
        impl: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:
        nll, lse, (ids, scores), kept = impl.linear_nll(u, weight, bias, items, offsets, exclude, k, state)
        ctx.save_for_backward(u, weight, bias, lse)
        ctx.rest = items, offsets, exclude
        ctx.kept, ctx.impl = kept, impl
        ctx.mark_non_differentiable(ids, scores)
        return nll, ids, scores

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dnll: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        u, weight, bias, lse = ctx.saved_tensors
        kept, ctx.kept = ctx.kept, None
        gradients = ctx.impl.linear_nll_backward(dnll, u, weight, bias, *ctx.rest, lse, kept)
        return *gradients, *(None,) * 6


def linear_nll(
    u: Tensor, output: Table, items: Tensor, offsets: Tensor, exclude: CSR | None = None, k: int = 0, state: Any = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The multinomial loss |x| logsumexp(s) - sum_{j in x} s_j, s = u weight^T + bias, and the list of the same scores.

    Args:
        u: [B, H].
        output: weight [M, H] and bias [M].
        items, offsets: the targets x as CSR rows.
        exclude: CSR rows of items that leave the softmax and the list; none may be a target of its row.
        k: length of the list; 0 for none.
        state: of `loop_state`.

    Returns:
        loss [B] (0 where x is empty), ids [B, K], scores [B, K]; differentiable in u, weight and bias.
    """
    u = u.to(output.weight.dtype)
    return _linear_nll(u, output.weight, output.bias, items, offsets, exclude, k, state, selected(u.device))


@whole
def _linear_nll(
    u: Tensor,
    weight: Tensor,
    bias: Tensor,
    items: Tensor,
    offsets: Tensor,
    exclude: CSR | None,
    k: int,
    state: Any,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    items, offsets = bounded(items, offsets, backend)
    exclude = exclude and bounded(*exclude, backend)
    if backend == "reference":
        nll = reference.linear_nll(u, weight, bias, items, offsets, exclude)
        return nll, *reference.linear_topk(u, weight, bias, k, exclude)
    impl = implementation(backend)
    nll, ids, scores = _LinearNLL.apply(u, weight, bias, items, offsets, exclude, k, state, impl)
    return nll, ids, with_gradient(u, weight, bias, ids, scores, impl)
