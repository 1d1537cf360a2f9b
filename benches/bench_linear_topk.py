"""Exact top-K of u weight^T + bias, product included, against the library's product alone and exact searches."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import Report, race
from operations import H, K, Problem, Size, compete, every_size, kernels_of

from cfsfl_fast import cpp, library

B, M = 500, 20108


@pytest.mark.parametrize("k", [20, 50, 100])
def test_linear_topk(k: int, report: Report, device: torch.device) -> None:
    if device.type != "cpu":
        pytest.skip("of the CPU; test_at_every_size is the other")
    g = torch.Generator().manual_seed(k)
    u = torch.randn(B, H, generator=g).tanh_()
    weight, bias = torch.randn(M, H, generator=g) * 0.05, torch.randn(M, generator=g) * 0.3
    scores = torch.empty(B, M)

    def full() -> tuple[torch.Tensor, torch.Tensor]:
        old = cpp._cpp.set_screening(False)
        try:
            return cpp.linear_topk(u, weight, bias, k)
        finally:
            cpp._cpp.set_screening(old)

    found = cpp.linear_topk(u, weight, bias, k)
    assert all(torch.equal(a, b) for a, b in zip(found, full(), strict=True))
    expected = library.linear_topk(u.double(), weight.double(), bias.double(), k)
    assert (found[1] - expected[1]).abs().max() < 1e-4

    rivals: dict[str, Callable[[], Any]] = {
        "product": lambda: torch.addmm(bias, u, weight.T, out=scores),
        "cpp": lambda: cpp.linear_topk(u, weight, bias, k),
        "cpp, every score": full,
        "torch.topk": lambda: torch.addmm(bias, u, weight.T, out=scores).topk(k, dim=1),
    }
    # A last column of ones carries the bias into libraries that have none.
    users = torch.cat([u, torch.ones(B, 1)], 1).numpy()
    items = torch.cat([weight, bias[:, None]], 1).numpy()
    if importlib.util.find_spec("implicit"):
        from implicit.cpu.topk import topk
        from threadpoolctl import threadpool_limits

        def implicit() -> None:
            with threadpool_limits(1, "blas"):  # as implicit itself asks: its threads call BLAS
                topk(items, users, k, num_threads=torch.get_num_threads())

        rivals["implicit"] = implicit
    if importlib.util.find_spec("faiss"):
        import faiss

        index = faiss.IndexFlatIP(H + 1)
        index.add(items)
        rivals["faiss"] = lambda: index.search(users, k)
    report(f"B={B} M={M} H={H} K={k}", race(rivals), "product", flops=2 * B * M * H)


@every_size
def test_at_every_size(size: Size, report: Report, device: torch.device, compiles: bool) -> None:
    p = Problem(size, device)
    impl = kernels_of(device)

    def eager() -> tuple[torch.Tensor, torch.Tensor]:
        return torch.addmm(p.bias, p.u, p.weight.T).topk(K, dim=1)

    def ours() -> tuple[torch.Tensor, torch.Tensor]:
        return impl.linear_topk(p.u, p.weight, p.bias, K)

    compete(report, p, "linear_topk", eager, ours, same_lists, compiles=compiles, flops=2 * size.B * size.M * H)


def same_lists(found: tuple[torch.Tensor, ...], plain: tuple[torch.Tensor, ...]) -> None:
    """The scores of each place agree; near-ties may change places in another order of summation."""
    error = (found[1].float() - plain[0].float()).abs().max()
    assert error < (1e-4 if found[1].dtype == torch.float32 else 0.05), float(error)
    assert (found[0].sort(1).values.diff(dim=1) > 0).all(), "an item is listed twice"
