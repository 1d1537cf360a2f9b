"""linear_squares: the weighted squared loss without scores, against the specification in float64."""

from __future__ import annotations

import pytest
import torch

from cfsfl_fast import ops
from cfsfl_fast.testing import Problem, assert_as_good, backend_params, loss_and_gradients, random_problem

SHAPES = [(1, 1, 1), (0, 7, 5), (5, 60, 17), (13, 1030, 40), (31, 2100, 33), (40, 300, 8)]


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
    monkeypatch.setattr("cfsfl_fast.library.PICKED", 7)
    if not whole_catalogue:
        monkeypatch.setattr("cfsfl_fast.library.CHUNK_SCORES", 200 * max(shape[0], 1))
    p = random_problem(*shape, exclude=exclude, strided=exclude)

    def loss(q: Problem) -> torch.Tensor:
        return ops.linear_squares(q.u, ops.Table(q.weight, q.bias), q.items, q.offsets, q.exclude, positive=5.0)

    answers = loss_and_gradients(p, loss, backend, dtype)
    found, truth, _ = (answer[0].detach() for answer in answers)
    rounding = 32 * torch.finfo(dtype).eps  # the Gram matrix sums in another order than plain PyTorch, twice over
    assert torch.allclose(found.double(), truth, rtol=rounding, atol=rounding)
    for what, *tensors in zip(("u", "weight", "bias"), *(answer[1:] for answer in answers), strict=True):
        assert_as_good(*tensors, what)
