"""What launchers owe their callers: tensors of any strides, on any device, in inference mode, of any number of users
and items; and how many kernels they launch. Run as `triton_cases` is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from cfsfl_fast import backends

from .triton_cases import (  # noqa: F401  (fixtures among them)
    DEVICE,
    chunked,
    csr,
    filtered,
    kernels,
    linear_filter,
    linear_topk,
    normal,
    poisoned,
    resting,
    step_file,
    step_inputs,
)


def strided(x: Any) -> Any:
    """The same values, every other element of something larger along each axis."""
    if isinstance(x, Tensor):
        wide = x.new_full([2 * n for n in x.shape], 99)
        view = wide[(slice(None, None, 2),) * x.dim()]
        return view.copy_(x)
    return type(x)(map(strided, x)) if isinstance(x, (list, tuple)) else x


def calls() -> dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]:
    """Every launcher with arguments."""
    B, M, D = 5, 150, 9
    x, exclude, weights = csr(B, M, 14), csr(B, M, 6), normal(csr(B, M, 14)[0].numel())
    step = step_inputs(B, M, 7, 12, 20, 9)
    ids, table, scores, lse = torch.randint(-1, M, (B, 6), device=DEVICE), normal(M, D), normal(B, 6), normal(B) + 50
    return {
        "row_bag": (kernels.row_bag, (table, *x, weights)),
        "row_bag_backward": (kernels.row_bag_backward, (normal(B, D), *x, weights, M)),
        "row_dot": (kernels.row_dot, (normal(B, D), table, ids)),
        "fuse": (kernels.fuse, (normal(B, D), table, ids, scores, "topk_softmax")),
        "linear_topk": (kernels.linear_topk, (*step[:3], 7, exclude)),
        "feedback_step": (kernels.feedback_step, (*step, 7, "topk_softmax", exclude)),
        "linear_nll": (kernels.linear_nll, (*step[:3], *x, exclude, 7)),
        "linear_nll_backward": (kernels.linear_nll_backward, (normal(B), *step[:3], *x, exclude, lse, None)),
    }


LAUNCHERS = sorted({*kernels.__all__} - {"loop_state"})


def flat(found: Any) -> list[Tensor]:
    return [found] if isinstance(found, Tensor) else [t for part in found if part is not None for t in flat(part)]


def same_whatever_the_strides(name: str) -> None:
    launcher, arguments = calls()[name]
    expected, found = flat(launcher(*arguments)), flat(launcher(*strided(arguments)))
    for one, other in zip(expected, found, strict=True):
        M = 150  # scores kept for a gradient have columns behind the last
        # A library may multiply matrices of other strides in another order.
        torch.testing.assert_close(other[..., :M], one[..., :M], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", LAUNCHERS)
def test_strides_change_nothing(name: str) -> None:
    same_whatever_the_strides(name)


@pytest.mark.usefixtures("filtered")
def test_strides_change_nothing_in_a_filtered_catalogue() -> None:
    same_whatever_the_strides("linear_topk")


class EnteredError(Exception):
    """A device was made the current one."""


@pytest.mark.parametrize("name", LAUNCHERS)
def test_kernels_run_where_the_tensors_are(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton launches on the current device: that of the first tensor becomes it, where it is not."""

    @contextlib.contextmanager
    def enter(device: torch.device) -> Iterator[None]:
        raise EnteredError(str(device))
        yield

    launcher, (_, *rest) = calls()[name]
    monkeypatch.setattr(torch.cuda, "device", enter)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    with pytest.raises(EnteredError, match="cuda:1"):
        launcher(mock.Mock(device=torch.device("cuda", 1)), *rest)


def test_inference_mode_has_no_versions() -> None:
    """A catalogue that is no multiple of 64, whose last rows are padded, made where nothing counts changes in place."""
    with torch.inference_mode():
        launcher, arguments = calls()["feedback_step"]
        state = kernels.loop_state()
        first, again = (flat(launcher(*arguments, state)) for _ in range(2))
    assert all(map(torch.equal, first, again))


# Grids


@contextlib.contextmanager
def launched(*modules: Any) -> Iterator[list[tuple[str, tuple[int, ...]]]]:
    """The kernels of these files that are launched inside, with their grids; they do not run."""
    found: list[tuple[str, tuple[int, ...]]] = []
    with contextlib.ExitStack() as stack:
        for module in modules:
            for name in vars(module):
                if name.endswith("_kernel"):
                    kernel = mock.MagicMock()
                    kernel.__getitem__.side_effect = lambda grid, name=name: lambda *a, **k: found.append((name, grid))
                    stack.enter_context(mock.patch.object(module, name, kernel))
        yield found


def test_only_the_first_axis_of_a_grid_is_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """The others end at 65,535, and neither users nor items do."""
    many = torch.empty(100_000, 1).expand(100_000, 8)
    items = torch.empty(10_000_000, 1).expand(10_000_000, 8)
    with launched(linear_topk, linear_filter, resting, step_file) as found:
        seen = resting.Look(*(torch.empty(1, dtype=torch.int32) for _ in range(4)))
        resting.open_scores(many[:1], items, items[:, 0], torch.empty(1, 1).expand(1, 1 << 24), seen)
        buffer, one = (
            torch.empty(1, 1, dtype=torch.int64).expand(100_000, 4096),
            torch.empty(100_000, dtype=torch.int32),
        )
        linear_filter.survivors(many, many, many[:, 0], 50, None, many[:, 0], buffer, one, seen)
    assert {name for name, _ in found} == {
        "linear_scores_fwd_kernel", "linear_filter_fwd_kernel", "linear_filter_check_kernel",
        "linear_filter_rescue_kernel",
    }  # fmt: skip
    assert all(n <= 65_535 for _, grid in found for n in grid[1:]), found


def test_launches_of_a_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """One per step after the product, one before it, and from the third step on the product itself."""
    step = step_inputs(5, 150, 7, 12, 20, 9)
    with launched(linear_topk, linear_filter, resting, step_file) as found:
        state = kernels.loop_state()
        for _ in range(3):
            kernels.feedback_step(*step, 7, "hard", None, state)
        kernels.linear_topk(*step[:3], 7, None, state)
        monkeypatch.setenv("CFSFL_FILTER_FROM", "1")
        kernels.linear_topk(*step[:3], 7)
    assert [name.removesuffix("_kernel") for name, _ in found] == [
        *("look_fwd", "feedback_step_fwd") * 2,
        *("look_fwd", "linear_scores_fwd", "feedback_step_fwd"),
        "linear_topk_fwd",
        *("look_fwd", "linear_scores_fwd", "linear_topk_fwd"),  # a wide catalogue: thresholds
        *("linear_filter_fwd", "linear_filter_check", "linear_filter_rescue", "linear_topk_fwd"),
    ]


# What the choice of sizes depends on


@pytest.mark.parametrize(("capability", "tile_size"), [(80, 128), (89, 128), (90, 256), (100, 256), (120, 128)])
def test_tiles_fit_the_shared_memory(capability: int, tile_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """99 KB on 8.6, 8.9 and 12.0."""
    monkeypatch.setattr(resting, "capability", lambda device: capability)
    items, depth = resting.tile_of(torch.empty(1, 1, dtype=torch.bfloat16))
    assert items == tile_size
    room = (99 if capability % 10 or capability >= 120 else 164) << 10
    stages = 3 * (128 + items) * depth * 2
    assert stages <= room


def test_a_size_that_is_no_number_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CFSFL_CHUNK_BYTES", "40 MB")
    with pytest.raises(ValueError, match="CFSFL_CHUNK_BYTES must be a whole number; got '40 MB'"):
        kernels.linear_topk(normal(1, 2), normal(9, 2), normal(9), 3)


def test_gpus_without_what_the_kernels_need(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "need compute capability 8.0, cuda:0 has 7.5" in (backends.why_not("triton", device) or "")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    assert backends.why_not("triton", device) is None
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert "NVIDIA" in (backends.why_not("triton", device) or "")
