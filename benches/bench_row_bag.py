"""Bags of table rows and their gradients: the history's two tables, and the K selected items of T steps."""

from __future__ import annotations

import pytest
import torch
from conftest import Report, race

from cfsfl_fast import cpp, library
from cfsfl_fast.testing import random_rows

B, M = 500, 20108


@pytest.mark.parametrize("D", [64, 600])
def test_history(D: int, report: Report) -> None:
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


def test_selected_items(report: Report) -> None:
    """The gradient of the output table from K items of every user at T steps; popular items are selected more often."""
    T, K, H = 8, 50, 600
    g = torch.Generator().manual_seed(0)
    u = torch.randn(T * B, H, generator=g)
    items = (torch.rand(T * B * K, generator=g) ** 4 * M).long()
    offsets = torch.arange(T * B + 1) * K
    weights = torch.randn(len(items), generator=g)
    names = {"cpp": cpp, "torch": library}
    times = race({n: lambda i=i: i.row_bag_backward(u, items, offsets, weights, M) for n, i in names.items()})
    report(f"selected B={B} T={T} K={K} H={H}", times, "torch", bytes=4 * (len(items) + M) * H)
