"""Sizes of the operations' benches on a CUDA device, one that a CPU manages too, and how rivals are raced there."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from conftest import Report, captured, race

H, D, V, K = 600, 64, 128, 50

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Size(NamedTuple):
    """Users, items, and the dtype of the output layer and the code."""

    B: int
    M: int
    dtype: str

    def __str__(self) -> str:
        return f"B={self.B} M={self.M} {self.dtype}"


SMALL = Size(64, 3706, "fp32")
SIZES = [SMALL, *(Size(*s) for s in itertools.product((500, 4096), (20_108, 41_140, 1_000_000), DTYPES))]

every_size = pytest.mark.parametrize("size", SIZES, ids=str)


class Problem:
    """Random inputs of a size on a device."""

    def __init__(self, size: Size, device: torch.device) -> None:
        if (device.type == "cpu") != (size == SMALL):
            pytest.skip(f"{size} is not for a {device.type}")
        self.size, self.device = size, device
        self.random = torch.Generator(device).manual_seed(0)
        self.u = self.normal(size.B, H).tanh().to(DTYPES[size.dtype])
        self.weight = (self.normal(size.M, H) * H**-0.5).to(self.u.dtype)
        self.bias = (self.normal(size.M) * 0.3).to(self.u.dtype)

    def normal(self, *shape: int) -> torch.Tensor:
        """Standard normal float32."""
        return torch.randn(shape, generator=self.random, device=self.device)

    def rows(self, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        """CSR rows of n items each, ascending; the popular ones are in many."""
        share = torch.rand((self.size.B, n), generator=self.random, device=self.device)
        step = self.size.M // n  # one item from each of n ranges, so that none is twice in a row
        items = torch.arange(n, device=self.device) * step + (share**4 * step).long().clamp_max(step - 1)
        return items.flatten(), torch.arange(self.size.B + 1, device=self.device) * n

    def layers(self, *widths: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(weight, bias) of linear layers."""
        return [(self.normal(o, i) * i**-0.5, self.normal(o)) for i, o in itertools.pairwise(widths)]


def kernels_of(device: torch.device) -> ModuleType:
    """Our kernels of a device."""
    if device.type == "cpu":
        from cfsfl_fast import cpp

        return cpp
    from cfsfl_fast import kernels

    return kernels


def compete(
    report: Report,
    p: Problem,
    case: str,
    eager: Callable[[], Any],
    ours: Callable[[], Any],
    check: Callable[[Any, Any], None],
    *,
    compiles: bool,
    **work: float,
) -> None:
    """Checks our answer against plain PyTorch's, then times both and torch.compile of the plain one. On a CUDA device
    each is one captured graph, so that no launch is waited for; a rival that does not fit the memory is left out.
    """
    answer, rivals = ours(), {"ours": ours}
    try:
        check(answer, eager())
        rivals = {"eager": eager, **rivals}
    except torch.OutOfMemoryError:
        pass
    del answer
    if p.device.type == "cuda":
        torch.cuda.empty_cache()
        rivals = {name: captured(run) for name, run in rivals.items()}
        if compiles and "eager" in rivals:
            rivals["max-autotune"] = torch.compile(eager, mode="max-autotune")
    against = "eager" if "eager" in rivals else "ours"
    report(f"{case} {p.size}", race(rivals), against, **work)
