"""The multinomial loss and its gradients."""

from __future__ import annotations

import pytest
import torch
from conftest import Report, race

from cfsfl_fast import backends, cpp, library, ops
from cfsfl_fast.testing import random_problem

B, M, H = 500, 20108, 600


@pytest.mark.parametrize("k", [0, 50])
def test_linear_nll(k: int, report: Report) -> None:
    p = random_problem(B, M, H, exclude=False, longest=140)
    u = p.u.tanh()
    scores = torch.empty(B, M)
    dnll = torch.rand(B)

    def forward(implementation: object) -> None:
        kept = implementation.linear_nll(u, p.weight, p.bias, p.items, p.offsets, None, k)[3]  # type: ignore[attr-defined]
        library.scratch.give(kept)

    def both(backend: str) -> list[torch.Tensor]:
        leaves = [t.detach().requires_grad_() for t in (u, p.weight, p.bias)]
        with backends.use_backend(backend):
            nll, *_ = ops.linear_nll(leaves[0], ops.Table(*leaves[1:]), p.items, p.offsets, None, k)
            (nll * dnll).sum().backward()
        return [t.grad for t in leaves if t.grad is not None]

    for a, b in zip(both("cpp"), both("torch"), strict=True):
        assert (a - b).abs().max() <= 1e-4 * b.abs().max()
    case = f"B={B} M={M} H={H} K={k}"
    product = lambda: torch.addmm(p.bias, u, p.weight.T, out=scores)  # noqa: E731
    times = race({"product": product, "cpp": lambda: forward(cpp), "torch": lambda: forward(library)})
    report(f"forward {case}", times, "product", flops=2 * B * M * H)
    times = race({"product": product, "cpp": lambda: both("cpp"), "torch": lambda: both("torch")})
    report(f"forward and backward {case}", times, "product", flops=6 * B * M * H)
