"""The border between models and kernels: checks and autograd bindings.

Every operation is one function here and one of the same name in each implementation: `reference` (the specification),
`library` (backend "torch"), `cpp` (backend "cpp") and `kernels` (backend "triton"). `backends` chooses among them.

Gradients of looked-up rows are sparse (`lookups`). The functions marked `whole` are what `torch.compile` sees
(`compiling`).

CSR rows may have room: entries behind offsets[-1], which belong to no row, hold the item id M and any finite weight.
No operation looks at them (`tests/test_room.py`). On a CPU they are cut off here; on a device that would mean waiting
for it, and the implementations step over them.

The code u is rounded to the dtype of its output layer, in which the two are multiplied; scores, losses and all that
follows are float32 or wider.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cfsfl_fast import library, reference
from cfsfl_fast.compiling import implementation, selected, through_operators, whole
from cfsfl_fast.library import exact_topk as exact_topk
from cfsfl_fast.library import follow as follow
from cfsfl_fast.library import mlp as mlp
from cfsfl_fast.lookups import Lookups, Sink, sink_of
from cfsfl_fast.lookups import Table as Table

CSR = tuple[Tensor, Tensor]
Layers = list[tuple[Tensor, Tensor]]

ACTIONS = reference.ACTIONS

# The operations


def _bounded(items: Tensor, offsets: Tensor, backend: str) -> CSR:
    """CSR rows as implementations take them: on a CPU, entries behind the last row are cut off."""
    if through_operators(backend) or torch.compiler.is_compiling():  # no data, or operators see to it
        return items, offsets
    return library.without_room(items, offsets)


class _RowBag(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, table: Tensor, items: Tensor, offsets: Tensor, weights: Tensor | None, sink: Sink, impl: Any
    ) -> Tensor:
        ctx.rows, ctx.sink = (items, offsets, weights), sink
        return impl.row_bag(table, items, offsets, weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[None, ...]:
        if ctx.sink is not None:
            items, offsets, weights = ctx.rows
            ctx.sink.append(Lookups(items, offsets, weights, dout))
        return (None,) * 6


def row_bag(table: Table, items: Tensor, offsets: Tensor, weights: Tensor | None = None) -> Tensor:
    """sum_{e in row b} weights_e table[items_e] for each CSR row b; differentiable in the table.

    Args:
        table: [M, D].
        items: [E] int64 in 0..M-1.
        offsets: [B + 1] int64, ascending from 0 to E, or to less where the rows have room.
        weights: [E] of any float dtype, None for ones; no gradient.

    Returns:
        [B, D]; an empty row gives 0.
    """
    return _row_bag(table.weight, items, offsets, weights, selected(table.weight.device))


@whole
def _row_bag(table: Tensor, items: Tensor, offsets: Tensor, weights: Tensor | None, backend: str) -> Tensor:
    items, offsets = _bounded(items, offsets, backend)
    weights = None if weights is None else weights[: items.shape[0]].to(table.dtype)
    if backend == "reference":
        return reference.row_bag(table, items, offsets, weights)
    return _RowBag.apply(table, items, offsets, weights, sink_of(table), implementation(backend))


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


def _with_gradient(u: Tensor, weight: Tensor, bias: Tensor, ids: Tensor, scores: Tensor, impl: Any) -> Tensor:
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
    exclude = exclude and _bounded(*exclude, backend)
    if backend == "reference":
        return reference.linear_topk(u, weight, bias, k, exclude)
    impl = implementation(backend)
    with torch.no_grad():
        ids, scores = impl.linear_topk(u, weight, bias, k, exclude, state)
    return ids, _with_gradient(u, weight, bias, ids, scores, impl)


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


class _Fuse(torch.autograd.Function):
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
    return _Fuse.apply(hx, lookup, ids, scores, ready, action, sink_of(lookup), impl)


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
    exclude = exclude and _bounded(*exclude, backend)
    if backend == "reference":
        return reference.fuse_softmax(u, weight, bias, hx, lookup, exclude)
    impl = implementation(backend)
    if not hasattr(impl, "fuse_softmax"):
        impl = library  # no backend has its own
    return hx + _FuseSoftmax.apply(u, weight, bias, lookup, exclude, impl)


class _Respond(torch.autograd.Function):
    """Gives the virtual user's answer its gradient; the hidden layers are computed again."""

    @staticmethod
    def forward(
        ctx: Any, h: Tensor, ready: tuple[Tensor, ...], depth: int, hoisted: Tensor, wv: Tensor, *flat: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(h, wv, *flat)
        ctx.depth = depth
        return ready

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dlogit: Tensor, dv: Tensor, dfollowing: Tensor) -> tuple[Tensor | None, ...]:
        need_h, _, _, need_hoisted, need_wv, *need_flat = ctx.needs_input_grad
        h, wv, *flat = ctx.saved_tensors
        needed = need_h, *need_flat
        h, *flat = (t.detach().requires_grad_(need) for t, need in zip((h, *flat), needed, strict=True))
        with torch.enable_grad():
            logit, v = library.respond(h, *_layers(flat, ctx.depth))
            unit = library.unit(v)
        wanted = [t for t in (h, *flat) if t.requires_grad]
        found = iter(torch.autograd.grad((logit, v, unit), wanted, (dlogit, dv, dfollowing @ wv.T)) if wanted else ())
        dh, *dflat = (next(found) if need else None for need in needed)
        dwv = unit.detach().T @ dfollowing if need_wv else None
        return dh, None, None, dfollowing if need_hoisted else None, dwv, *dflat


def _layers(flat: list[Tensor], depth: int) -> tuple[Layers, Layers]:
    layers = list(zip(flat[::2], flat[1::2], strict=True))
    return layers[:depth], layers[depth:]


class FeedbackStep(NamedTuple):
    """What one turn of the virtual user gives."""

    feedback: Tensor  # v [B, V]
    logit: Tensor  # g(h) [B]; the reward is its sigmoid
    ids: Tensor  # a [B, K]
    scores: Tensor  # [B, K]
    following: Tensor  # hoisted + v^ Wv [B, P]: where the recommender's next pass begins


def feedback_step(
    u: Tensor,
    output: Table,
    hx: Tensor,
    lookup: Table,
    reward: Layers,
    feedback: Layers,
    hoisted: Tensor,
    wv: Tensor,
    k: int,
    action: str,
    exclude: CSR | None = None,
    state: Any = None,
) -> FeedbackStep:
    """Equations (2), (16), (3), (4): the recommender's code in, the virtual user's feedback out.

    Args:
        u: the recommender's code. [B, H]
        output: the recommender's output layer, weight [M, H] and bias [M].
        hx: mean lookup row of the history. [B, D]
        lookup: [M, D].
        reward, feedback: (weight [out, in], bias [out]) of each layer, ReLU between.
        hoisted: what the recommender's first pre-activation is without feedback. [B, P]
        wv: how feedback enters it. [V, P]
        k: length of the list that the virtual user sees.
        action: one of ACTIONS.
        exclude: CSR rows of items that never enter the list.
        state: of `loop_state`.
    """
    if action not in ACTIONS:
        raise ValueError(f"action must be one of {', '.join(ACTIONS)}; got {action!r}")
    u, backend = u.to(output.weight.dtype), selected(u.device)
    if action == "softmax" and backend != "reference":
        ids, scores = linear_topk(u, output, k, exclude, state)
        h = fuse_softmax(u, output, hx, lookup, exclude)
        logit, v = library.respond(h, reward, feedback)
        return FeedbackStep(v, logit, ids, scores, follow(v, hoisted, wv))
    inputs = u, output.weight, output.bias, hx, lookup.weight, reward, feedback, hoisted, wv
    return FeedbackStep(*_feedback_step(*inputs, k, action, exclude, state, backend))


@whole
def _feedback_step(
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
    exclude: CSR | None,
    state: Any,
    backend: str,
) -> tuple[Tensor, ...]:
    exclude = exclude and _bounded(*exclude, backend)
    rest = hx, lookup, reward, feedback, hoisted, wv, k, action, exclude
    if backend == "reference":
        return reference.feedback_step(u, weight, bias, *rest)
    impl = implementation(backend)
    with torch.no_grad():
        v, logit, ids, scores, following, h, w = impl.feedback_step(u, weight, bias, *rest, state)
    scores = _with_gradient(u, weight, bias, ids, scores, impl)
    h = _Fuse.apply(hx, lookup, ids, scores, (h, w), action, sink_of(lookup), impl)
    flat = (t for layer in (*reward, *feedback) for t in layer)
    logit, v, following = _Respond.apply(h, (logit, v, following), len(reward), hoisted, wv, *flat)
    return v, logit, ids, scores, following


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
    items, offsets = _bounded(items, offsets, backend)
    exclude = exclude and _bounded(*exclude, backend)
    if backend == "reference":
        nll = reference.linear_nll(u, weight, bias, items, offsets, exclude)
        return nll, *reference.linear_topk(u, weight, bias, k, exclude)
    impl = implementation(backend)
    nll, ids, scores = _LinearNLL.apply(u, weight, bias, items, offsets, exclude, k, state, impl)
    return nll, ids, _with_gradient(u, weight, bias, ids, scores, impl)


class _SampledScores(torch.autograd.Function):
    """Scores of items that all users share [B, n] and of single pairs [E]; gradients of rows go to the table's sink."""

    @staticmethod
    def forward(
        ctx: Any, u: Tensor, weight: Tensor, bias: Tensor, shared: Tensor, items: Tensor, offsets: Tensor, impl: Any
    ) -> tuple[Tensor, Tensor]:
        each = torch.arange(len(shared) + 1, device=u.device)
        rows = impl.row_bag(weight, shared, each)
        biases = impl.row_bag(bias[:, None].contiguous(), shared, each).squeeze(1)
        pick = getattr(impl, "linear_pick", library.linear_pick)
        found = pick(u, weight, bias, items, library.rows_of(offsets, items.shape[0]))
        ctx.save_for_backward(u, weight, rows)
        ctx.rest, ctx.sink, ctx.impl = (shared, each, items, offsets), sink_of(weight), impl
        return torch.addmm(biases, u, rows.T), found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dmany: Tensor, dfound: Tensor) -> tuple[Tensor | None, ...]:
        u, weight, rows = ctx.saved_tensors
        shared, each, items, offsets = ctx.rest
        if ctx.sink is not None:
            ctx.sink.append(Lookups(shared, each, None, dmany.T @ u, dmany.sum(0)))
            ctx.sink.append(Lookups(items, offsets, dfound, u))
        du = torch.addmm(ctx.impl.row_bag(weight, items, offsets, dfound), dmany, rows)
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
        output: weight [M, H] and bias [M].
        items, offsets: the targets x as CSR rows, ascending within a row.
        exclude: CSR rows of items that leave the softmax, ascending within a row; none may be a target of its row.
        shared: the drawn items. [n] int64
        n_items: M, also where the table is a part.

    Returns:
        [B], 0 where x is empty; differentiable in u, weight and bias. Only rows of targets and of drawn items have
        gradients.
    """
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
    items, offsets = _bounded(items, offsets, backend)
    exclude = exclude and _bounded(*exclude, backend)
    if backend == "reference":
        return reference.linear_squares(u, weight, bias, items, offsets, exclude, positive)
    rest = exclude, positive, sink_of(weight), implementation(backend)
    return _LinearSquares.apply(u, weight, bias, items, offsets, *rest)


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
    items, offsets = _bounded(items, offsets, backend)
    exclude = exclude and _bounded(*exclude, backend)
    if backend == "reference":
        return reference.linear_logistic(u, weight, bias, items, offsets, exclude)
    return _LinearLogistic.apply(u, weight, bias, items, offsets, exclude)


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
    items, offsets = _bounded(items, offsets, backend)
    exclude = exclude and _bounded(*exclude, backend)
    if backend == "reference":
        return reference.linear_warp(u, weight, bias, items, offsets, exclude)
    return _LinearWARP.apply(u, weight, bias, items, offsets, exclude)


def slim(gram: Tensor, first: int, last: int, l1: float, l2: float) -> tuple[Tensor, int]:
    """Columns of SLIM (Ning and Karypis 2011): argmin over w >= 0, w_j = 0 of

        1/2 |X_j - X w|^2 + l2 / 2 |w|^2 + l1 sum w,    j = first .. last - 1.

    Args:
        gram: X^T X of X >= 0, on the CPU. [M, M]
        first, last: which columns.
        l1, l2: penalties; l1 >= 0, l2 >= 0.

    Returns:
        the weights, one item's in a row [last - first, M], and how many items did not converge.
    """
    found: tuple[Tensor, int] = implementation(selected(gram.device)).slim(gram, first, last, l1, l2)
    return found
