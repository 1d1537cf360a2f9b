"""linear_topk: every backend against the specification in float64."""

from __future__ import annotations

import pytest
import torch

from cfsfl_fast import backends, library, ops, reference
from cfsfl_fast.testing import assert_as_good, assert_list, backend_params, poisoned, random_problem

SHAPES = [(1, 1, 1), (0, 7, 5), (3, 7, 5), (1, 4100, 37), (13, 130, 33), (26, 1100, 40), (30, 2500, 17)]
DTYPES = [torch.float32, torch.float64]


@pytest.mark.parametrize("backend", backend_params())
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("strided", [False, True])
def test_lists_of_equal_scores(backend: str, shape: tuple[int, int, int], strided: bool) -> None:
    """Whole numbers: scores are exact in float32, so ids must be the specification's to the last tie."""
    p = random_problem(*shape, whole=True, strided=strided, exclude=not strided)
    for k in (0, 1, 5, 50, shape[1]):
        expected = reference.linear_topk(p.u.double(), p.weight.double(), p.bias.double(), k, p.exclude)
        with backends.use_backend(backend), poisoned():
            ids, scores = ops.linear_topk(p.u, ops.Table(p.weight, p.bias), k, p.exclude)
        assert ids.dtype == torch.int64
        assert torch.equal(ids, expected[0])
        assert torch.equal(scores.double(), expected[1])


@pytest.mark.parametrize("backend", backend_params())
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_and_gradients(backend: str, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    p = random_problem(*shape)
    k = min(9, shape[1])
    truth, plain, found = p.to(torch.float64, grad=True), p.to(dtype, grad=True), p.to(dtype, grad=True)
    with backends.use_backend(backend), poisoned():
        ids, scores = ops.linear_topk(found.u, ops.Table(found.weight, found.bias), k, p.exclude)
    assert_list(ids, scores, p.exclude, shape[1])

    # The same ids everywhere: a near tie may be broken either way by a rounding.
    def scores_of(q: object) -> torch.Tensor:
        s = reference.linear(q.u, q.weight, q.bias).gather(1, ids.clamp_min(0))  # type: ignore[attr-defined]
        return s.masked_fill(ids < 0, float("-inf"))

    best = reference.linear_topk(truth.u, truth.weight, truth.bias, k, p.exclude)[1]
    best_plain = reference.linear_topk(plain.u, plain.weight, plain.bias, k, p.exclude)[1]
    assert_as_good(scores, best, best_plain, "scores")
    all_scores = [scores, scores_of(truth), scores_of(plain)]
    assert_as_good(*all_scores, "scores of these ids")
    dscores = torch.randn(scores.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for s in all_scores:
        s.masked_fill(ids < 0, 0).mul(dscores.to(s.dtype)).sum().backward()
    for name in ("u", "weight", "bias"):
        leaves = [q.leaves()[name] for q in (found, truth, plain)]
        grads = [torch.zeros_like(t) if t.grad is None else t.grad for t in leaves]
        assert_as_good(*grads, f"gradient of {name}")


@pytest.mark.parametrize("backend", backend_params())
def test_nothing_that_is_no_score(backend: str) -> None:
    """-inf and NaN never enter, +inf does, everything excluded gives an empty list."""
    p = random_problem(27, 700, 24, exclude=False)
    bias = p.bias.clone()
    bias[3], bias[5], bias[699], bias[0] = float("inf"), float("nan"), float("-inf"), float("inf")
    everything = torch.arange(700).repeat(27), torch.arange(28) * 700
    with backends.use_backend(backend), poisoned():
        ids, scores = ops.linear_topk(p.u, ops.Table(p.weight, bias), 700)
        none, none_scores = ops.linear_topk(p.u, ops.Table(p.weight, p.bias), 5, everything)
    assert torch.equal(ids[:, :2], torch.tensor([[0, 3]]).expand(27, 2))
    assert not torch.isin(ids, torch.tensor([5, 699])).any()
    assert (ids[:, -2:] == -1).all()
    assert (scores[:, -2:] == float("-inf")).all()
    assert_list(ids, scores, None, 700)
    assert (none == -1).all()
    assert (none_scores == float("-inf")).all()


@pytest.mark.parametrize("backend", backend_params())
def test_permuting_users_permutes_lists(backend: str) -> None:
    p = random_problem(40, 900, 33, exclude=False)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(2))
    with backends.use_backend(backend):
        ids, scores = ops.linear_topk(p.u, ops.Table(p.weight, p.bias), 20)
        moved_ids, moved_scores = ops.linear_topk(p.u[order], ops.Table(p.weight, p.bias), 20)
    assert torch.equal(moved_ids, ids[order])
    assert torch.equal(moved_scores, scores[order])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_lists_without_a_look_at_ties(dtype: torch.dtype) -> None:
    """What a device runs, where to count ties would be to wait."""
    scores = torch.randint(-3, 4, (40, 300), generator=torch.Generator().manual_seed(3)).to(dtype) / 2
    scores[0], scores[1] = float("nan"), float("-inf")
    scores[2, ::3], scores[3, 7], scores[4, 9] = -0.0, float("inf"), float("nan")
    for k in (0, 1, 50, 300, 999):
        found, expected = library.keyed_topk(scores, k), reference.top(scores, k)
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1], expected[1])
    assert library.keyed_topk(scores[:, :0], 5)[0].shape == (40, 0)
