"""The multinomial loss, estimated from drawn items."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cfsfl_fast import library
from cfsfl_fast.compiling import implementation, selected
from cfsfl_fast.lookups import Lookups, Table, sink_of
from cfsfl_fast.ops.csr import CSR


class _SampledScores(torch.autograd.Function):
    """Scores of items that all users share [B, n] and of single pairs [E]; gradients of rows go to the table's sink."""

    @staticmethod
    def forward(
        ctx: Any, u: Tensor, weight: Tensor, bias: Tensor, shared: Tensor, items: Tensor, offsets: Tensor, impl: Any
    ) -> tuple[Tensor, Tensor]:
        each = torch.arange(len(shared) + 1, device=u.device)
        ctx.rest, ctx.sink, ctx.impl = (shared, each, items, offsets), sink_of(weight), impl
        if weight.dtype == torch.bfloat16:
            ids, weight, places = library.widened(weight, torch.cat([shared, items]))
            bias = bias[ids].float()
            shared, items = places.split([len(shared), len(items)])
        rows = impl.row_bag(weight, shared, each)
        biases = impl.row_bag(bias[:, None].contiguous(), shared, each).squeeze(1)
        pick = getattr(impl, "linear_pick", library.linear_pick)
        found = pick(u, weight, bias, items, library.rows_of(offsets, items.shape[0]))
        ctx.save_for_backward(u, weight, rows, items)
        return torch.addmm(biases, u, rows.T), found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dmany: Tensor, dfound: Tensor) -> tuple[Tensor | None, ...]:
        u, weight, rows, places = ctx.saved_tensors
        shared, each, items, offsets = ctx.rest
        if ctx.sink is not None:
            ctx.sink.append(Lookups(shared, each, None, dmany.T @ u, dmany.sum(0)))
            ctx.sink.append(Lookups(items, offsets, dfound, u))
        du = torch.addmm(ctx.impl.row_bag(weight, places, offsets, dfound), dmany, rows)
        return du, *(None,) * 6


def sampled_nll(
    u: Tensor, output: Table, items: Tensor, offsets: Tensor, exclude: CSR | None, shared: Tensor, n_items: int
) -> Tensor:
    """An estimate of the multinomial loss of `linear_nll` from n items drawn uniformly with replacement, for all users
    the same: |x| log Z^ - sum_{j in x} s_j with

        Z^ = sum_{j in x} e^(s_j) + (M - |x| - |excluded|) / n' sum_{k drawn, not in x, not excluded} e^(s_k)

    over the n' drawn items that count for the user. Bias: Z^ has the mean Z (where n' > 0), log Z^ has not: the loss is
    too small by about |x| Var(Z^) / (2 Z^2), which falls as 1 / n, and so is too small the gradient of the few items
    that a user nearly chose and no draw met. With every other item drawn once it is the loss itself.

    Args:
        u: [B, H].
        output: weight [M, H] and bias [M]. Of a bfloat16 table the rows that are looked up are widened.
        items, offsets: the targets x as CSR rows, ascending within a row.
        exclude: CSR rows of items that leave the softmax, ascending within a row; none may be a target of its row.
        shared: the drawn items. [n] int64
        n_items: M, also where the table is a part.

    Returns:
        [B], 0 where x is empty; differentiable in u, weight and bias. Only rows of targets and of drawn items have
        gradients.
    """
    if output.weight.dtype != torch.bfloat16:
        u = u.to(output.weight.dtype)
    backend = selected(u.device)
    items, offsets = library.without_room(items, offsets)
    impl = library if backend == "reference" else implementation(backend)
    many, found = _SampledScores.apply(u, output.weight, output.bias, shared, items, offsets, impl)
    counted, counts = ~_among(shared, items, offsets, n_items), offsets.diff()
    others = n_items - counts
    if exclude is not None:
        exclude = library.without_room(*exclude)
        counted &= ~_among(shared, *exclude, n_items)
        others = others - exclude[1].diff()
    rows = library.rows_of(offsets, items.shape[0])
    many = many.masked_fill(~counted, float("-inf"))
    with torch.no_grad():
        peak = many.amax(1) if len(shared) else u.new_full((len(u),), float("-inf"))
        peak = peak.scatter_reduce(0, rows, found, "amax").nan_to_num_(neginf=0.0)
    share = others / counted.sum(1).clamp_min(1)
    total = (many - peak[:, None]).exp().sum(1) * share
    total = total.index_add(0, rows, (found - peak[rows]).exp())
    lse = torch.where(counts > 0, peak + total.clamp_min(torch.finfo(u.dtype).tiny).log(), 0)
    return counts * lse - torch.zeros_like(lse).index_add(0, rows, found)


def _among(shared: Tensor, items: Tensor, offsets: Tensor, n_items: int) -> Tensor:
    """Which of the shared items each CSR row holds. [B, n] bool"""
    n_users = offsets.shape[0] - 1
    if items.shape[0] == 0:
        return torch.zeros(n_users, len(shared), dtype=torch.bool, device=shared.device)
    keys = library.rows_of(offsets, items.shape[0]) * n_items + items
    asked = torch.arange(n_users, device=shared.device)[:, None] * n_items + shared
    return keys[torch.searchsorted(keys, asked).clamp_max_(len(keys) - 1)] == asked
