"""The Triton kernels on a CUDA device: everything of `triton_cases` and its like, bf16 included, and what only a device
can show. `triton_device` runs the same here, small and in the interpreter.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

if torch.cuda.is_available():
    from .triton_cases import kernels, reference, step_inputs

DEVICE, HALF = "cuda", torch.bfloat16
B, M, H = 500, 20_108, 600
WIDE = 300_000
"""Items of a catalogue that is filtered."""


def production(M: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    u, weight, bias = (torch.randn(*shape, device=DEVICE, dtype=dtype) for shape in ((B, H), (M, H), (M,)))
    return u, weight.div_(H**0.5), bias


@pytest.mark.parametrize(
    ("M", "dtype"),
    [
        *((M, dtype) for M in (20_108, 41_140, 1_000_000) for dtype in (torch.float32, torch.bfloat16)),
        (4_000_000, torch.bfloat16),  # more than 2^31 weights
    ],
)
def test_lists_at_production_sizes(M: int, dtype: torch.dtype) -> None:
    """The K-th score is the library's, to rounding; every run gives the same bits."""
    u, weight, bias = production(M, dtype)
    ids, scores = kernels.linear_topk(u, weight, bias, 100, None, kernels.loop_state())
    truth = torch.addmm(bias.float(), u.float(), weight.float().T)
    assert (ids.sort(1).values.diff(dim=1) > 0).all()
    error = (scores.float() - truth.gather(1, ids)).abs().max()
    assert error <= (1e-4 if dtype == torch.float32 else 0.05)
    torch.testing.assert_close(scores.float(), truth.topk(100).values, atol=max(1e-4, 2 * error.item()), rtol=0)
    for _ in range(5):
        again = kernels.linear_topk(u, weight, bias, 100, None, kernels.loop_state())
        assert torch.equal(ids, again[0])
        assert torch.equal(scores, again[1])


def test_the_filter_finds_the_same_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    """On integers, where every way of multiplying is exact."""
    u, weight = (torch.randint(-2, 3, (n, 64), device=DEVICE).to(HALF) for n in (B, M))
    bias = torch.randint(-2, 3, (M,), device=DEVICE).to(HALF)
    monkeypatch.setenv("CFSFL_FILTER_FROM", "1")
    for _ in range(3):
        ids, scores = kernels.linear_topk(u, weight, bias, 100)
        true_ids, true_scores = reference.linear_topk(u.float(), weight.float(), bias.float(), 100)
        assert torch.equal(ids, true_ids)
        assert torch.equal(scores.float(), true_scores)


def test_a_captured_graph_replays_what_ran() -> None:
    u, weight, bias = production(M, HALF)
    state = kernels.loop_state()
    expected = kernels.linear_topk(u, weight, bias, 50, None, state)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = kernels.linear_topk(u, weight, bias, 50, None, state)
    for _ in range(3):
        graph.replay()
        assert torch.equal(got[0], expected[0])
        assert torch.equal(got[1], expected[1])


@pytest.mark.parametrize("wide", [False, True])
def test_a_captured_loop_knows_who_rests(wide: bool) -> None:
    """One graph for codes that rest, drift and jump: who is open is decided on the device, at every replay."""
    n_items = WIDE if wide else M
    u, weight, bias = production(n_items, HALF)
    _, _, _, hx, lookup, reward, feedback, hoisted, wv = (
        t.to(DEVICE) if isinstance(t, torch.Tensor) else [(w.to(DEVICE), b.to(DEVICE)) for w, b in t]
        for t in step_inputs(B, n_items, 1, 64, 128, 128)
    )
    codes = [u.clone() for _ in range(4)]

    def loop(remember: bool) -> list[torch.Tensor]:
        state = kernels.loop_state() if remember else None
        rest = hx, lookup, reward, feedback, hoisted, wv, 50, "hard", None, state
        return [t for code in codes for t in kernels.feedback_step(code, weight, bias, *rest)[:5]]

    for _ in range(2):  # which compiles every kernel
        loop(True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = loop(True)
    for sizes in ((0, 0, 0), (0.01, 0, 0), (1, 0.01, 1), (0, 1, 0)):
        for last, code, size in zip(codes[:-1], codes[1:], sizes, strict=True):
            code.copy_(last + size * torch.randn_like(last) * (torch.arange(B, device=DEVICE) % 3 > 0)[:, None])
        graph.replay()
        alone = loop(False)
        for found, expected in zip(got[3::5], alone[3::5], strict=True):  # scores: near-ties may change places
            torch.testing.assert_close(found.float(), expected.float(), atol=0.05, rtol=0)


SANITIZED = (
    "test_step_at_the_papers_widths_over_two_groups", "test_row_bag_gradient", "test_nll_by_chunks",
    "test_topk_by_filter", "test_users_at_rest", "test_candidates_of_an_earlier_step",
)  # fmt: skip
"""Tests that launch every kernel, the waiting tickets and the appending filter among them."""


@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="compute-sanitizer is not installed")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
def test_under_the_sanitizer(tool: str) -> None:
    """Accesses out of bounds, races in shared memory, and threads that wait for others at a barrier in vain."""
    checker = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9"]
    tests = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", " or ".join(SANITIZED), __file__]
    # Without its cache every tensor of torch is an allocation of its own, whose bounds the checker knows.
    subprocess.run([*checker, *tests], env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, check=True)


if torch.cuda.is_available():  # last: what is above says most, and time on a GPU may end
    from .triton_cases import *  # noqa: F403
    from .triton_faults import *  # noqa: F403
    from .triton_launchers import *  # noqa: F403
    from .triton_resting import *  # noqa: F403
