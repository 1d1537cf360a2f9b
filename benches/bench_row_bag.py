"""Bags of table rows and their gradients: the history's two tables, and the K selected items of T steps."""

from __future__ import annotations

import pytest
import torch
from conftest import Report, race
from operations import DTYPES, Problem, Size, compete, every_size, kernels_of

from cfsfl_fast import cpp, library
from cfsfl_fast.testing import random_rows

B, M = 500, 20108


@pytest.mark.parametrize("D", [64, 600])
def test_history(D: int, report: Report, device: torch.device) -> None:
    if device.type != "cpu":
        pytest.skip("of the CPU; test_at_every_size is the other")
    g = torch.Generator().manual_seed(D)
    table, dout = torch.randn(M, D, generator=g), torch.randn(B, D, generator=g)
    items, offsets = random_rows(B, M, 200, g)
    weights = torch.rand(len(items), generator=g)
    truth = library.row_bag(table.double(), items, offsets, weights.double())
    assert (cpp.row_bag(table, items, offsets, weights) - truth).abs().max() < 1e-4
    dtruth = library.row_bag_backward(dout.double(), items, offsets, weights.double(), M)
    assert (cpp.row_bag_backward(dout, items, offsets, weights, M) - dtruth).abs().max() < 1e-4
    E = len(items)
    names = {"cpp": cpp, "torch": library}
    times = race({n: lambda i=i: i.row_bag(table, items, offsets, weights) for n, i in names.items()})
    report(f"forward B={B} M={M} D={D} E={E}", times, "torch", bytes=4 * (E + B) * D)
    times = race({n: lambda i=i: i.row_bag_backward(dout, items, offsets, weights, M) for n, i in names.items()})
    report(f"backward B={B} M={M} D={D} E={E}", times, "torch", bytes=4 * (E + M) * D)


def test_selected_items(report: Report, device: torch.device) -> None:
    """The gradient of the output table from K items of every user at T steps; popular items are selected more often."""
    if device.type != "cpu":
        pytest.skip("of the CPU; test_at_every_size is the other")
    T, K, H = 8, 50, 600
    g = torch.Generator().manual_seed(0)
    u = torch.randn(T * B, H, generator=g)
    items = (torch.rand(T * B * K, generator=g) ** 4 * M).long()
    offsets = torch.arange(T * B + 1) * K
    weights = torch.randn(len(items), generator=g)
    names = {"cpp": cpp, "torch": library}
    times = race({n: lambda i=i: i.row_bag_backward(u, items, offsets, weights, M) for n, i in names.items()})
    report(f"selected B={B} T={T} K={K} H={H}", times, "torch", bytes=4 * (len(items) + M) * H)


@pytest.mark.parametrize("D", [64, 600])
@every_size
def test_at_every_size(size: Size, D: int, report: Report, device: torch.device, compiles: bool) -> None:
    """The history's bag, 70 items a user, and its gradient."""
    p = Problem(size, device)
    impl, itemsize = kernels_of(device), DTYPES[size.dtype].itemsize
    items, offsets = p.rows(70)
    weights = torch.full((len(items),), 0.5, device=device, dtype=p.u.dtype)
    table, dout = p.normal(size.M, D).to(p.u.dtype), p.normal(size.B, D).to(p.u.dtype)
    ragged = {"mode": "sum", "per_sample_weights": weights, "include_last_offset": True}

    def eager() -> torch.Tensor:
        return torch.nn.functional.embedding_bag(items, table, offsets, **ragged)

    def ours() -> torch.Tensor:
        return impl.row_bag(table, items, offsets, weights)

    def eager_gradient() -> torch.Tensor:
        entries = (dout[:, None] * weights.view(size.B, -1, 1)).flatten(0, 1)
        return torch.zeros_like(table).index_add_(0, items, entries)

    def our_gradient() -> torch.Tensor:
        return impl.row_bag_backward(dout, items, offsets, weights, size.M)

    E = len(items)
    compete(report, p, f"row_bag D={D}", eager, ours, close, compiles=compiles, bytes=itemsize * (E + size.B) * D)
    compete(
        report, p, f"row_bag gradient D={D}", eager_gradient, our_gradient, close, compiles=compiles,
        bytes=itemsize * (E + size.M) * D,
    )  # fmt: skip


def close(found: torch.Tensor, plain: torch.Tensor) -> None:
    """To the rounding of their dtype; sums of thousands of halves round more in the plain one."""
    error = (found.float() - plain.float()).abs().max()
    assert error <= (1e-4 if found.dtype == torch.float32 else 0.1) * plain.float().abs().max(), float(error)
