"""feedback_step: every backend against the specification in float64."""

from __future__ import annotations

import pytest
import torch

from cfsfl_fast import backends, ops, reference
from cfsfl_fast.testing import assert_as_good, assert_list, backend_params, poisoned, random_problem

SHAPES = [(1, 3, 2), (0, 7, 5), (7, 40, 9), (33, 1300, 40)]
DTYPES = [torch.float32, torch.float64]


@pytest.mark.parametrize("backend", backend_params())
@pytest.mark.parametrize("action", reference.ACTIONS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("exclude", [False, True])
def test_feedback_step(
    backend: str, action: str, shape: tuple[int, int, int], dtype: torch.dtype, exclude: bool
) -> None:
    p = random_problem(*shape, exclude=exclude, strided=exclude)
    g = torch.Generator().manual_seed(1)
    dv = torch.randn(shape[0], 5, generator=g, dtype=torch.float64)
    dlogit = torch.randn(shape[0], generator=g, dtype=torch.float64)
    dfollowing = torch.randn(shape[0], 7, generator=g, dtype=torch.float64) * 0.1
    answers, lists = [], []
    for dt, run in ((dtype, backend), (torch.float64, "reference"), (dtype, "reference")):
        q = p.to(dt, grad=True)
        with backends.use_backend(run), poisoned():
            output, lookup = ops.Table(q.weight, q.bias), ops.Table(q.lookup)
            step = ops.feedback_step(
                q.u,
                output,
                q.hx,
                lookup,
                q.reward,
                q.feedback,
                q.hoisted,
                q.wv,
                4,
                action,
                q.exclude,
                ops.loop_state(q.u.device),
            )
            parts = (step.feedback, dv), (step.logit, dlogit), (step.following, dfollowing)
            sum((t * dt_out.to(dt)).sum() for t, dt_out in parts).backward()
        grads = {n: t.new_zeros(t.shape) if t.grad is None else t.grad for n, t in q.leaves().items()}
        answers.append({"v": step.feedback, "logit": step.logit, "following": step.following, **grads})
        lists.append((step.ids, step.scores))
    assert_list(*lists[0], p.exclude, shape[1])
    assert torch.equal(lists[0][0], lists[1][0]), "no ties in this problem"
    for what in answers[0]:
        assert_as_good(*(a[what] for a in answers), what)


@pytest.mark.parametrize("backend", backend_params())
def test_steps_of_one_state(backend: str) -> None:
    """A state changes no answer: the same bits as a call without one, whether codes repeat, drift or jump."""
    p = random_problem(30, 1500, 24)
    output, lookup = ops.Table(p.weight, p.bias), ops.Table(p.lookup)
    g = torch.Generator().manual_seed(5)
    u = p.u
    with backends.use_backend(backend), torch.no_grad():
        state = ops.loop_state(u.device)
        for size in (0, 1e-4, 0, 0.3, 1e-3, 2.0, 0):
            u = u + size * torch.randn(u.shape, generator=g)
            rest = (p.hx, lookup, p.reward, p.feedback, p.hoisted, p.wv, 10, "hard", p.exclude)
            with_state = ops.feedback_step(u, output, *rest, state)
            without = ops.feedback_step(u, output, *rest, ops.loop_state(u.device))
            for a, b in zip(with_state, without, strict=True):
                assert torch.equal(a, b)
