"""The multinomial loss and its gradients."""

from __future__ import annotations

import pytest
import torch
from conftest import Report, race
from operations import H, Problem, Size, compete, every_size

from cfsfl_fast import backends, cpp, library, ops
from cfsfl_fast.testing import random_problem

B, M = 500, 20108


@pytest.mark.parametrize("k", [0, 50])
def test_linear_nll(k: int, report: Report, device: torch.device) -> None:
    if device.type != "cpu":
        pytest.skip("of the CPU; test_at_every_size is the other")
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


@every_size
def test_at_every_size(size: Size, report: Report, device: torch.device, compiles: bool) -> None:
    """Forward and backward to the gradients of all three inputs."""
    p = Problem(size, device)
    items, offsets = p.rows(70)
    rows = torch.arange(size.B, device=device).repeat_interleave(70)
    leaves = [t.detach().requires_grad_() for t in (p.u, p.weight, p.bias)]

    def eager() -> tuple[torch.Tensor, ...]:
        u, weight, bias = leaves
        scores = torch.log_softmax(torch.addmm(bias, u, weight.T).float(), dim=1)
        return torch.autograd.grad(-scores[rows, items].sum(), leaves)

    def ours() -> tuple[torch.Tensor, ...]:
        u, weight, bias = leaves
        nll, *_ = ops.linear_nll(u, ops.Table(weight, bias), items, offsets)
        return torch.autograd.grad(nll.sum(), leaves)

    compete(
        report, p, "linear_nll forward and backward", eager, ours, same_gradients, compiles=compiles,
        flops=6 * size.B * size.M * H,
    )  # fmt: skip


def same_gradients(found: tuple[torch.Tensor, ...], plain: tuple[torch.Tensor, ...]) -> None:
    """To the rounding of their dtype."""
    for ours, theirs in zip(found, plain, strict=True):
        error = (ours.float() - theirs.float()).abs().max()
        assert error <= (1e-4 if ours.dtype == torch.float32 else 0.03) * theirs.float().abs().max()
