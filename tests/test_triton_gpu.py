"""The Triton kernels on a CUDA device: everything of `triton_cases`, bf16 included, and what only a device can show."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

if torch.cuda.is_available():
    from .triton_cases import *  # noqa: F403
    from .triton_cases import kernels, reference
    from .triton_faults import *  # noqa: F403
    from .triton_resting import *  # noqa: F403

DEVICE = "cuda"


def production(M: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    u, weight, bias = torch.randn(500, 600), torch.randn(M, 600) / 600**0.5, torch.randn(M)
    return tuple(t.to(DEVICE, dtype) for t in (u, weight, bias))  # type: ignore[return-value]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("M", [20_108, 41_140, 1_000_000])
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
    u, weight = (torch.randint(-2, 3, (n, 64), device=DEVICE).bfloat16() for n in (500, 30_000))
    bias = torch.randint(-2, 3, (30_000,), device=DEVICE).bfloat16()
    monkeypatch.setenv("CFSFL_FILTER_FROM", "1")
    for _ in range(3):
        ids, scores = kernels.linear_topk(u, weight, bias, 100)
        true_ids, true_scores = reference.linear_topk(u.float(), weight.float(), bias.float(), 100)
        assert torch.equal(ids, true_ids)
        assert torch.equal(scores.float(), true_scores)


def test_a_captured_graph_replays_what_ran() -> None:
    u, weight, bias = production(20_108, torch.bfloat16)
    state = kernels.loop_state()
    expected = kernels.linear_topk(u, weight, bias, 50, None, state)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = kernels.linear_topk(u, weight, bias, 50, None, state)
    for _ in range(3):
        graph.replay()
        assert torch.equal(got[0], expected[0])
        assert torch.equal(got[1], expected[1])


@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="compute-sanitizer is not installed")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_under_the_sanitizer(tool: str) -> None:
    wanted = "test_step_at_the_papers_widths or test_row_bag_gradient or test_nll_by_chunks"
    checker = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9"]
    subprocess.run([*checker, sys.executable, "-m", "pytest", "-q", "-k", wanted, __file__], check=True)
