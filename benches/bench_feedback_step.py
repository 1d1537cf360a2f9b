"""T turns of the virtual user: codes that come to rest as those of a trained loop do, and codes that drift."""

from __future__ import annotations

import pytest
import torch
from conftest import Report, race
from torch import Tensor

from cfsfl_fast import cpp, library
from cfsfl_fast.testing import random_problem

B, M, H, T, K = 500, 20108, 600, 8, 50

# Lengths of u_t - u_(t-1), as shares of ||u||. "rest": of a trained model (gowalla, 20,108 items).
MOVES = {"rest": [0.03, 2e-4, 0, 0, 0, 0, 0], "drift": [0.3] * 7}


@pytest.mark.parametrize("moves", MOVES)
def test_turns(moves: str, report: Report) -> None:
    p = random_problem(B, M, H, D=64, V=128, exclude=False, longest=70)
    g = torch.Generator().manual_seed(1)
    u = p.u.tanh()
    codes = [u]
    for size in MOVES[moves]:
        u = u + size * u.norm(dim=1, keepdim=True) / H**0.5 * torch.randn(u.shape, generator=g) if size else u.clone()
        codes.append(u)
    rest = (p.hx, p.lookup, p.reward, p.feedback, K, "straight_through", None)
    scores = torch.empty(B, M)

    def turns(implementation: object, screening: bool = True, remember: bool = True) -> list[tuple[Tensor, ...]]:
        old = cpp._cpp.set_screening(screening)
        state = implementation.loop_state()  # type: ignore[attr-defined]
        found = []
        for code in codes:
            step = implementation.feedback_step  # type: ignore[attr-defined]
            found.append(step(code, p.weight, p.bias, *rest, state if remember else None))
        cpp._cpp.set_screening(old)
        return found

    def products() -> None:
        for code in codes:
            torch.addmm(p.bias, code, p.weight.T, out=scores)

    for fast, plain in zip(turns(cpp), turns(cpp, screening=False, remember=False), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(fast, plain, strict=True))
    rivals = {
        "products": products,
        "cpp": lambda: turns(cpp),
        "cpp, no state": lambda: turns(cpp, remember=False),
        "cpp, every score": lambda: turns(cpp, screening=False, remember=False),
        "torch": lambda: turns(library),
    }
    report(f"{moves} B={B} M={M} H={H} T={T} K={K}", race(rivals), "products", flops=2 * T * B * M * H)
