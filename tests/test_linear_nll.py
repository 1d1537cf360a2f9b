"""linear_nll: every backend against the specification in float64."""

from __future__ import annotations

import pytest
import torch

from cfsfl_fast import backends, ops
from cfsfl_fast.testing import assert_as_good, assert_list, backend_params, poisoned, random_problem

SHAPES = [(1, 1, 1), (0, 7, 5), (5, 60, 17), (13, 1030, 40), (31, 2100, 33)]
DTYPES = [torch.float32, torch.float64]


@pytest.mark.parametrize("backend", backend_params())
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("exclude", [False, True])
@pytest.mark.parametrize("whole_catalogue", [True, False])
def test_loss_list_and_gradients(
    backend: str,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    exclude: bool,
    whole_catalogue: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not whole_catalogue:  # scores are too many to keep: chunks, computed again in the backward pass
        monkeypatch.setattr("cfsfl_fast.library.CHUNK_SCORES", 500 * max(shape[0], 1))
        monkeypatch.setattr("cfsfl_fast.cpp.KEEP_SCORES", 0, raising=False)
        monkeypatch.setattr("cfsfl_fast.cpp.CHUNK", 700, raising=False)
    p = random_problem(*shape, exclude=exclude, strided=exclude)
    dnll = torch.rand(shape[0], dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    answers, lists = [], []
    for dt, run in ((dtype, backend), (torch.float64, "reference"), (dtype, "reference")):
        q = p.to(dt, grad=True)
        with backends.use_backend(run), poisoned():
            nll, ids, scores = ops.linear_nll(
                q.u, ops.Table(q.weight, q.bias), q.items, q.offsets, q.exclude, min(6, shape[1])
            )
            (nll * dnll.to(dt)).sum().backward()
        answers.append((nll, q.u.grad, q.weight.grad, q.bias.grad))
        lists.append((ids, scores))
    for what, *tensors in zip(("loss", "u", "weight", "bias"), *answers, strict=True):
        assert_as_good(*tensors, what)
    assert (answers[0][0][p.offsets.diff() == 0] == 0).all(), "no targets, no loss"
    assert_list(*lists[0], p.exclude, shape[1])
    assert_as_good(lists[0][1], lists[1][1], lists[2][1], "scores of the list")


@pytest.mark.parametrize("backend", backend_params())
def test_far_scores(backend: str) -> None:
    """Scores hundreds apart: no overflow, and what underflows is 0 in loss and gradient."""
    p = random_problem(9, 300, 8, exclude=False)
    answers = []
    for dt, run in ((torch.float32, backend), (torch.float64, "reference"), (torch.float32, "reference")):
        q = p.to(dt, grad=True)
        with backends.use_backend(run), poisoned():
            nll, *_ = ops.linear_nll(q.u * 100, ops.Table(q.weight, q.bias), q.items, q.offsets)
            nll.sum().backward()
        answers.append((nll, q.u.grad, q.weight.grad, q.bias.grad))
    for what, *tensors in zip(("loss", "u", "weight", "bias"), *answers, strict=True):
        assert_as_good(*tensors, what)
