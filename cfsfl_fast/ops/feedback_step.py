"""One turn of the virtual user."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cfsfl_fast import library, reference
from cfsfl_fast.compiling import implementation, selected, whole
from cfsfl_fast.lookups import Table, sink_of
from cfsfl_fast.ops.csr import CSR, bounded
from cfsfl_fast.ops.fuse import Fuse, fuse_softmax
from cfsfl_fast.ops.linear_topk import linear_topk, with_gradient

Layers = list[tuple[Tensor, Tensor]]
"""weight [out, in] and bias [out] of each layer, ReLU between."""

ACTIONS = reference.ACTIONS


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
            logit, v = library.respond(h, *_paired(flat, ctx.depth))
            unit = library.unit(v)
        wanted = [t for t in (h, *flat) if t.requires_grad]
        found = iter(torch.autograd.grad((logit, v, unit), wanted, (dlogit, dv, dfollowing @ wv.T)) if wanted else ())
        dh, *dflat = (next(found) if need else None for need in needed)
        dwv = unit.detach().T @ dfollowing if need_wv else None
        return dh, None, None, dfollowing if need_hoisted else None, dwv, *dflat


def _paired(flat: list[Tensor], depth: int) -> tuple[Layers, Layers]:
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
        return FeedbackStep(v, logit, ids, scores, library.follow(v, hoisted, wv))
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
    exclude = exclude and bounded(*exclude, backend)
    rest = hx, lookup, reward, feedback, hoisted, wv, k, action, exclude
    if backend == "reference":
        return reference.feedback_step(u, weight, bias, *rest)
    impl = implementation(backend)
    with torch.no_grad():
        v, logit, ids, scores, following, h, w = impl.feedback_step(u, weight, bias, *rest, state)
    scores = with_gradient(u, weight, bias, ids, scores, impl)
    h = Fuse.apply(hx, lookup, ids, scores, (h, w), action, sink_of(lookup), impl)
    flat = (t for layer in (*reward, *feedback) for t in layer)
    logit, v, following = _Respond.apply(h, (logit, v, following), len(reward), hoisted, wv, *flat)
    return v, logit, ids, scores, following
