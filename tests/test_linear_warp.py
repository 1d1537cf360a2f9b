"""linear_warp: the rank-weighted loss by one sort, against every pair of a target and a negative."""

from __future__ import annotations

import pytest
import torch

from cfsfl_fast import backends, ops
from cfsfl_fast.testing import Problem, assert_as_good, backend_params, loss_and_gradients, random_problem

SHAPES = [(1, 1, 1), (0, 7, 5), (5, 60, 17), (13, 730, 40), (31, 900, 33)]


@pytest.mark.parametrize("backend", backend_params())
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("exclude", [False, True])
def test_loss_and_gradients(
    backend: str, shape: tuple[int, int, int], dtype: torch.dtype, exclude: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cfsfl_fast.library.WARP_SCORES", 2 * shape[1])
    p = random_problem(*shape, exclude=exclude, strided=exclude)

    def loss(q: Problem) -> torch.Tensor:
        return ops.linear_warp(q.u, ops.Table(q.weight, q.bias), q.items, q.offsets, q.exclude)

    answers = loss_and_gradients(p, loss, backend, dtype)
    for what, *tensors in zip(("loss", "u", "weight", "bias"), *answers, strict=True):
        assert_as_good(*tensors, what)


def pairs(scores: list[float], targets: set[int], left_out: set[int]) -> tuple[float, list[float]]:
    """The statement, pair by pair: the loss of one user and its gradient in the scores."""
    loss, gradient = 0.0, [0.0] * len(scores)
    for i in targets:
        above = [j for j in range(len(scores)) if j not in targets and j not in left_out and scores[j] > scores[i]]
        phi = sum(1 / k for k in range(1, len(above) + 1))
        for j in above:
            loss += phi * (scores[j] - scores[i])
            gradient[j] += phi
            gradient[i] -= phi
    return loss, gradient


@pytest.mark.parametrize("backend", ["reference", *backend_params()])
def test_ties_are_above_nobody(backend: str) -> None:
    """Scores from five values, so that most are equal to others, targets to negatives too."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        scores = torch.randint(-2, 3, (40,), generator=generator).double()
        kind = torch.randint(0, 4, (40,), generator=generator)
        targets, left_out = (kind == 0).nonzero().squeeze(1), (kind == 1).nonzero().squeeze(1)
        u = torch.ones(1, 1, dtype=torch.float64)
        weight = scores[:, None].clone().requires_grad_()
        rows = [(ids, torch.tensor([0, len(ids)])) for ids in (targets, left_out)]
        with backends.use_backend(backend):
            output = ops.Table(weight, weight.new_zeros(40))
            loss = ops.linear_warp(u, output, *rows[0], rows[1])
            loss.sum().backward()
        expected, gradient = pairs(scores.tolist(), set(targets.tolist()), set(left_out.tolist()))
        assert loss.item() == pytest.approx(expected)
        assert weight.grad is not None
        assert weight.grad.squeeze(1).tolist() == pytest.approx(gradient)
