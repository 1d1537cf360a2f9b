"""The kernels as PyTorch operators, `torch.ops.cfsfl_fast.*`: `torch.compile` calls them without looking inside.

Import this module before compiling a model; eager calls go to the launchers themselves and pay nothing. Each operator
has a fake kernel (shapes and dtypes of its results). Gradients are the border's business (`ops`), which calls forward
and backward by name.

Optional CSR rows are two optional tensors here, and a loop's state, which an operator cannot take, is left out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cfsfl_fast import kernels


def _pair(items: Tensor | None, offsets: Tensor | None) -> tuple[Tensor, Tensor] | None:
    return None if items is None or offsets is None else (items, offsets)


@torch.library.custom_op("cfsfl_fast::row_bag", mutates_args=())
def row_bag(table: Tensor, items: Tensor, offsets: Tensor, weights: Tensor | None) -> Tensor:
    """`kernels.row_bag`."""
    return kernels.row_bag(table, items, offsets, weights)


@row_bag.register_fake
def _(table: Tensor, items: Tensor, offsets: Tensor, weights: Tensor | None) -> Tensor:
    return table.new_empty(offsets.shape[0] - 1, table.shape[1])


@torch.library.custom_op("cfsfl_fast::row_bag_backward", mutates_args=())
def row_bag_backward(dout: Tensor, items: Tensor, offsets: Tensor, weights: Tensor | None, n_items: int) -> Tensor:
    """`kernels.row_bag_backward`."""
    return kernels.row_bag_backward(dout, items, offsets, weights, n_items)


@row_bag_backward.register_fake
def _(dout: Tensor, items: Tensor, offsets: Tensor, weights: Tensor | None, n_items: int) -> Tensor:
    return dout.new_empty(n_items, dout.shape[1])


@torch.library.custom_op("cfsfl_fast::row_dot", mutates_args=())
def row_dot(x: Tensor, table: Tensor, ids: Tensor) -> Tensor:
    """`kernels.row_dot`."""
    return kernels.row_dot(x, table, ids)


@row_dot.register_fake
def _(x: Tensor, table: Tensor, ids: Tensor) -> Tensor:
    return x.new_empty(ids.shape)


@torch.library.custom_op("cfsfl_fast::fuse", mutates_args=())
def fuse(hx: Tensor, lookup: Tensor, ids: Tensor, scores: Tensor, action: str) -> tuple[Tensor, Tensor]:
    """`kernels.fuse`."""
    return kernels.fuse(hx, lookup, ids, scores, action)


@fuse.register_fake
def _(hx: Tensor, lookup: Tensor, ids: Tensor, scores: Tensor, action: str) -> tuple[Tensor, Tensor]:
    return hx.new_empty(hx.shape), hx.new_empty(ids.shape)


@torch.library.custom_op("cfsfl_fast::linear_topk", mutates_args=())
def linear_topk(
    u: Tensor, weight: Tensor, bias: Tensor, k: int, out_items: Tensor | None, out_offsets: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`kernels.linear_topk`."""
    return kernels.linear_topk(u, weight, bias, k, _pair(out_items, out_offsets))


@linear_topk.register_fake
def _(
    u: Tensor, weight: Tensor, bias: Tensor, k: int, out_items: Tensor | None, out_offsets: Tensor | None
) -> tuple[Tensor, Tensor]:
    shape = u.shape[0], min(k, weight.shape[0])
    return u.new_empty(shape, dtype=torch.int64), u.new_empty(shape)


@torch.library.custom_op("cfsfl_fast::feedback_step", mutates_args=())
def feedback_step(
    u: Tensor,
    weight: Tensor,
    bias: Tensor,
    hx: Tensor,
    lookup: Tensor,
    layers: list[Tensor],
    depth: int,
    k: int,
    action: str,
    out_items: Tensor | None,
    out_offsets: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`kernels.feedback_step`; layers: weight, bias, weight, bias ..., the first `depth` pairs the reward's."""
    pairs = list(zip(layers[::2], layers[1::2], strict=True))
    exclude = _pair(out_items, out_offsets)
    out = kernels.feedback_step(u, weight, bias, hx, lookup, pairs[:depth], pairs[depth:], k, action, exclude)
    return out[0], out[1], out[2], out[3], out[4], out[5]


@feedback_step.register_fake
def _(
    u: Tensor,
    weight: Tensor,
    bias: Tensor,
    hx: Tensor,
    lookup: Tensor,
    layers: list[Tensor],
    depth: int,
    k: int,
    action: str,
    out_items: Tensor | None,
    out_offsets: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    B = u.shape[0]
    shape = B, min(k, weight.shape[0])
    v, logit, h = hx.new_empty(B, layers[-2].shape[0]), hx.new_empty(B), hx.new_empty(hx.shape)
    return v, logit, h, u.new_empty(shape, dtype=torch.int64), u.new_empty(shape), hx.new_empty(shape)


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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`kernels.linear_nll` less what backward can use again: loss, logsumexp, ids, scores."""
    exclude = _pair(out_items, out_offsets)
    nll, lse, (ids, scores), _ = kernels.linear_nll(u, weight, bias, items, offsets, exclude, k)
    return nll, lse.clone(), ids, scores


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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    B = u.shape[0]
    shape = B, min(k, weight.shape[0])
    ids = u.new_empty(shape, dtype=torch.int64)
    per_user = u.new_empty(B, dtype=torch.float32)
    return per_user, torch.empty_like(per_user), ids, u.new_empty(shape)


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
) -> tuple[Tensor, Tensor, Tensor]:
    """`kernels.linear_nll_backward`, scoring again."""
    exclude = _pair(out_items, out_offsets)
    return kernels.linear_nll_backward(dnll, u, weight, bias, items, offsets, exclude, lse, None)


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
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(u), weight.new_empty(weight.shape), bias.new_empty(bias.shape)
