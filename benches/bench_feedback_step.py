"""T turns of the virtual user: codes that come to rest as those of a trained loop do, and codes that drift."""

from __future__ import annotations

import pytest
import torch
from conftest import Report, race
from operations import D, H, K, Problem, Size, V, compete, every_size, kernels_of
from torch import Tensor

from cfsfl_fast import cpp, library
from cfsfl_fast.testing import random_problem

B, M, T = 500, 20108, 8

# Lengths of u_t - u_(t-1), as shares of ||u||. "rest": of a trained model (gowalla, 20,108 items).
MOVES = {"rest": [0.03, 2e-4, 0, 0, 0, 0, 0], "drift": [0.3] * 7}


def codes_of(u: Tensor, moves: str) -> list[Tensor]:
    """u and the codes of the steps after it."""
    g = torch.Generator(u.device).manual_seed(1)
    codes = [u]
    for size in MOVES[moves]:
        drawn = torch.randn(u.shape, generator=g, device=u.device)
        by = size * u.float().norm(dim=1, keepdim=True) / u.shape[1] ** 0.5 * drawn
        u = (u + by).to(u.dtype) if size else u.clone()
        codes.append(u)
    return codes


@pytest.mark.parametrize("moves", MOVES)
def test_turns(moves: str, report: Report, device: torch.device) -> None:
    if device.type != "cpu":
        pytest.skip("of the CPU; test_at_every_size is the other")
    p = random_problem(B, M, H, D=D, V=V, exclude=False, longest=70)
    codes = codes_of(p.u.tanh(), moves)
    rest = (p.hx, p.lookup, p.reward, p.feedback, p.hoisted, p.wv, K, "straight_through", None)
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


@pytest.mark.parametrize("moves", MOVES)
@every_size
def test_at_every_size(size: Size, moves: str, report: Report, device: torch.device, compiles: bool) -> None:
    """All T steps of a loop whose codes are given."""
    p = Problem(size, device)
    impl = kernels_of(device)
    codes = codes_of(p.u, moves)
    hx, lookup, hoisted, wv = p.normal(size.B, D), p.normal(size.M, D), p.normal(size.B, H), p.normal(V, H)
    reward, feedback = p.layers(D, 128, 128, 128, 1), p.layers(D + 1, 128, 128, V)

    def eager() -> list[tuple[Tensor, Tensor]]:
        found = []
        for u in codes:
            scores, ids = torch.addmm(p.bias, u, p.weight.T).topk(K, dim=1)
            _, v = library.respond(hx + lookup[ids].mean(1), reward, feedback)
            found.append((scores, library.follow(v, hoisted, wv)))
        return found

    def ours() -> list[tuple[Tensor, Tensor]]:
        state = impl.loop_state()
        rest = hx, lookup, reward, feedback, hoisted, wv, K, "straight_through", None, state
        steps = (impl.feedback_step(u, p.weight, p.bias, *rest) for u in codes)
        return [(step[3], step[4]) for step in steps]

    compete(
        report, p, f"{T} steps, {moves},", eager, ours, same_steps, compiles=compiles,
        flops=2 * T * size.B * size.M * H,
    )  # fmt: skip


def same_steps(found: list[tuple[Tensor, Tensor]], plain: list[tuple[Tensor, Tensor]]) -> None:
    """The lists' scores agree. In float32 so does what is handed on, but for near-ties at the end of a list, which may
    fall the other way in another order of summation; bfloat16 is full of ties.
    """
    for (scores, following), (their_scores, theirs) in zip(found, plain, strict=True):
        half = scores.dtype != torch.float32
        assert (scores.float() - their_scores.float()).abs().max() < (0.05 if half else 1e-4)
        agree = (following - theirs).abs().amax(1) < 0.02
        assert agree.double().mean() > (0.0 if half else 0.98), float(agree.double().mean())
