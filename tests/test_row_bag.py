"""row_bag, row_dot and fuse: every backend against the specification in float64."""

from __future__ import annotations

import pytest
import torch

from cfsfl_fast import backends, library, ops, reference
from cfsfl_fast.testing import assert_as_good, backend_params, poisoned, random_problem

SHAPES = [(1, 1, 1), (0, 5, 3), (7, 30, 16), (19, 64, 33), (40, 300, 70)]  # B, M, D
DTYPES = [torch.float32, torch.float64]


@pytest.mark.parametrize("backend", backend_params())
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("strided", [False, True])
def test_row_bag(backend: str, shape: tuple[int, int, int], dtype: torch.dtype, weighted: bool, strided: bool) -> None:
    B, M, D = shape
    p = random_problem(B, M, 4, D=D, strided=strided)
    dout = torch.randn(B, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    answers = []
    for dt, run in ((dtype, backend), (torch.float64, "reference"), (dtype, "reference")):
        q = p.to(dt, grad=True)
        weights = q.weights if weighted else None
        with backends.use_backend(run), poisoned():
            table = ops.Table(q.lookup)
            out = ops.row_bag(table, q.items, q.offsets, weights)
            few = q.offsets[: B // 4 + 1]  # gradients of two look-ups are summed once
            again = ops.row_bag(table, q.items[: few[-1]], few)
            ((out * dout.to(dt)).sum() + again.sum()).backward()
        answers.append((out, q.lookup.grad))
    for what, *tensors in zip(("rows", "gradient of the table"), *answers, strict=True):
        assert_as_good(*tensors, what)
    assert (answers[0][0][p.offsets.diff() == 0] == 0).all(), "an empty row is 0"


@pytest.mark.parametrize("backend", backend_params())
@pytest.mark.parametrize("shape", SHAPES)
def test_row_dot(backend: str, shape: tuple[int, int, int]) -> None:
    B, M, D = shape
    p = random_problem(B, M, D, D=D)
    ids = torch.randint(-1, M, (B, 5), generator=torch.Generator().manual_seed(3))
    with backends.use_backend(backend), poisoned():
        found = backends.implementation(p.u.device).row_dot(p.u, p.lookup, ids)
    truth = library.row_dot(p.u.double(), p.lookup.double(), ids)
    assert_as_good(found, truth, library.row_dot(p.u, p.lookup, ids))


@pytest.mark.parametrize("backend", backend_params())
@pytest.mark.parametrize("action", ["straight_through", "topk_softmax", "hard"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_fuse(backend: str, action: str, dtype: torch.dtype) -> None:
    p = random_problem(21, 90, 8, D=19)
    ids, _ = reference.linear_topk(p.u, p.weight, p.bias, 7, p.exclude)
    ids[0], ids[1, 3:] = -1, -1  # an empty list and a short one
    g = torch.Generator().manual_seed(4)
    raw = torch.randn(ids.shape, generator=g).sort(1, descending=True).values.masked_fill(ids < 0, float("-inf"))
    dh = torch.randn(21, 19, generator=g, dtype=torch.float64)
    answers = []
    for dt, run in ((dtype, backend), (torch.float64, "reference"), (dtype, "reference")):
        q = p.to(dt, grad=True)
        scores = raw.to(dt, copy=True).requires_grad_()
        with backends.use_backend(run), poisoned():
            h = ops.fuse(q.hx, ops.Table(q.lookup), ids, scores, action)
            (h * dh.to(dt)).sum().backward()
        dscores = torch.zeros_like(scores) if scores.grad is None else scores.grad
        answers.append((h, q.hx.grad, q.lookup.grad, dscores.masked_fill(ids < 0, 0)))
    for what, *tensors in zip(("h", "hx", "lookup", "scores"), *answers, strict=True):
        assert_as_good(*tensors, what)
    assert torch.equal(answers[0][0][0], p.hx[0].to(dtype)), "an empty list adds nothing"
