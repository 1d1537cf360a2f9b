"""linear_logistic: the logistic loss of every item, against NumPy and the specification in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cfsfl_fast import backends, ops
from cfsfl_fast.testing import Problem, assert_as_good, backend_params, loss_and_gradients, random_problem

SHAPES = [(1, 1, 1), (0, 7, 5), (5, 60, 17), (13, 1030, 40), (40, 300, 8)]


@pytest.mark.parametrize("backend", backend_params())
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("exclude", [False, True])
@pytest.mark.parametrize("whole_catalogue", [True, False])
def test_loss_and_gradients(
    backend: str,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    exclude: bool,
    whole_catalogue: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not whole_catalogue:
        monkeypatch.setattr("cfsfl_fast.library.CHUNK_SCORES", 200 * max(shape[0], 1))
    p = random_problem(*shape, exclude=exclude, strided=exclude)

    def loss(q: Problem) -> torch.Tensor:
        return ops.linear_logistic(q.u, ops.Table(q.weight, q.bias), q.items, q.offsets, q.exclude)

    answers = loss_and_gradients(p, loss, backend, dtype)
    for what, *tensors in zip(("loss", "u", "weight", "bias"), *answers, strict=True):
        assert_as_good(*tensors, what)


@pytest.mark.parametrize("backend", [*backend_params(), "reference"])
@pytest.mark.parametrize("size", [1.0, 1000.0])
def test_it_is_the_log_likelihood_of_bernoulli_variables(backend: str, size: float) -> None:
    """Also where a probability is 0 or 1 in every floating-point number."""
    p = random_problem(5, 60, 17).to(torch.float64)
    with backends.use_backend(backend):
        found = ops.linear_logistic(p.u * size, ops.Table(p.weight, p.bias), p.items, p.offsets, p.exclude)
    scores = (p.u.numpy() * size) @ p.weight.numpy().T + p.bias.numpy()
    assert p.exclude is not None
    for b, loss in enumerate(found.tolist()):
        own, left_out = (
            set(items[offsets[b] : offsets[b + 1]].tolist()) for items, offsets in ((p.items, p.offsets), p.exclude)
        )
        # -log sigmoid(s) = log(1 + e^-s) of what the user has, -log(1 - sigmoid(s)) = log(1 + e^s) of the rest
        parts = [np.logaddexp(0, -s if j in own else s) for j, s in enumerate(scores[b]) if j not in left_out]
        assert loss == pytest.approx(sum(parts), rel=1e-12)
