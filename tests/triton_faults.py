"""Launchers with one argument wrong: each must fail its check of `triton_cases`. Run as those are."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch

from .triton_cases import (  # noqa: F401  (fixtures among them)
    DEVICE,
    bag_gradient,
    chunked,
    compare,
    csr,
    exact_topk,
    filtered,
    kernels,
    linear_filter,
    linear_nll,
    linear_topk,
    nll,
    our_step,
    poisoned,
    reference,
    row_bag,
    step_file,
    step_inputs,
)
from .triton_cases import test_fuse as check_fuse
from .triton_cases import test_gradients_through_ops as check_gradients
from .triton_cases import test_nll_by_chunks as check_nll_by_chunks
from .triton_cases import test_row_bag as check_row_bag
from .triton_cases import test_row_dot as check_row_dot


@contextlib.contextmanager
def fault(kernel: Any, **wrong: Callable[[Any], Any]) -> Iterator[None]:
    """Launches a kernel with some arguments changed."""
    real = kernel.run

    def run(*args: Any, **kwargs: Any) -> Any:
        named = dict(zip(kernel.arg_names, args, strict=False))
        kwargs = {**kwargs, **named}
        return real(**{**kwargs, **{name: change(kwargs[name]) for name, change in wrong.items()}})

    with mock.patch.object(kernel, "run", run):
        yield


def step_check() -> None:
    inputs = step_inputs(17, 90, 4, 12, 20, 9)
    compare(our_step, reference.feedback_step, *inputs, 6, "topk_softmax", csr(17, 90, 9))


Check = Callable[[], None]
TOPK, STEP, BAG = linear_topk.linear_topk_fwd_kernel, step_file.feedback_step_fwd_kernel, row_bag.row_bag_fwd_kernel
SPLIT, SEGMENT = row_bag.row_bag_split_bwd_kernel, row_bag.row_bag_bwd_kernel
LOSS, DLOSS = linear_nll.linear_nll_fwd_kernel, linear_nll.linear_nll_bwd_kernel
FUSE, DOT = step_file.fuse_fwd_kernel, step_file.row_dot_fwd_kernel


def topk_check(B: int, M: int, k: int, excluding: bool = False) -> Check:
    return lambda: exact_topk(B, M, k, torch.float32, excluding)


def bag_check() -> None:
    check_row_bag(9, True, torch.float32)


def hot_check() -> None:
    bag_gradient(60, 30, 14, 5, weighted=True, hot=3)


def segment_check() -> None:
    bag_gradient(7, 50, 11, 9, weighted=True)


def nll_check(excluding: bool = False) -> Check:
    return lambda: nll(3, 301, torch.float32, excluding)


def chunks_check() -> None:
    exact_topk(2, 300, 20, torch.float32, excluding=True)


def gradients_check() -> None:
    check_gradients("topk_softmax")


FAULTS: dict[str, tuple[Any, dict[str, Callable[[Any], Any]], Check]] = {
    "topk: id off by one": (TOPK, {"start": lambda v: v + 1}, topk_check(2, 300, 5)),
    "topk: missing tail": (TOPK, {"N": lambda v: v - 64}, topk_check(4, 150, 40)),
    "topk: stale list": (TOPK, {"CARRIED": lambda v: True}, topk_check(2, 40, 30)),
    "topk: excluded items enter": (TOPK, {"HAS_EXCLUDE": lambda v: False}, topk_check(4, 40, 30, excluding=True)),
    "topk: ids of one chunk only": (TOPK, {"CARRIED": lambda v: False}, chunks_check),
    "topk: chunks in one place": (TOPK, {"start": lambda v: 0}, chunks_check),
    "step: dirty counter": (STEP, {"ticket_ptr": lambda v: v + 1}, step_check),
    "step: last group short": (STEP, {"B": lambda v: v - 1}, step_check),
    "step: wrong width": (STEP, {"R1": lambda v: v - 1}, step_check),
    "step: wrong weights": (STEP, {"UNIFORM": lambda v: not v}, step_check),
    "step: id off by one": (STEP, {"start": lambda v: v - 1}, step_check),
    "step: missing tail": (STEP, {"N": lambda v: v - 64}, step_check),
    "step: excluded items enter": (STEP, {"HAS_EXCLUDE": lambda v: False}, step_check),
    "step: last column of h": (STEP, {"lookup_ptr": lambda t: t * (torch.arange(12, device=DEVICE) < 11)}, step_check),
    "step: feedback's last weight": (STEP, {"F1": lambda v: v - 1}, step_check),
    "step: users share one history": (STEP, {"stride_hx": lambda v: 0}, step_check),
    "step: next pass without its own part": (STEP, {"hoisted_ptr": torch.zeros_like}, step_check),
    "bag: wrong mask": (BAG, {"D": lambda v: v - 1}, bag_check),
    "bag: no weights": (BAG, {"HAS_WEIGHTS": lambda v: False}, bag_check),
    "bag: id off by one": (BAG, {"items_ptr": lambda t: (t + 1) % 40}, bag_check),
    "bag: rows begin early": (BAG, {"offsets_ptr": lambda t: (t - 1).clamp_min(0)}, bag_check),
    "bag gradient: a split missing": (SPLIT, {"partial_ptr": torch.clone}, hot_check),
    "bag gradient: a split's weights": (SPLIT, {"HAS_WEIGHTS": lambda v: False}, hot_check),
    "bag gradient: half of a split's rows": (SPLIT, {"B": lambda v: v // 2}, hot_check),
    "bag gradient: splits not added": (SEGMENT, {"partial_ptr": torch.zeros_like}, hot_check),
    "bag gradient: last row missing": (SEGMENT, {"B": lambda v: v - 1}, segment_check),
    "bag gradient: id off by one": (SEGMENT, {"ends_ptr": lambda t: t.roll(-1).clamp_min(t)}, segment_check),
    "bag gradient: no weights": (SEGMENT, {"HAS_WEIGHTS": lambda v: False}, segment_check),
    "nll: tail missing": (LOSS, {"N": lambda v: v - 64}, nll_check()),
    "nll: chunks forgotten": (LOSS, {"FIRST": lambda v: True}, check_nll_by_chunks),
    "nll: stale targets of chunks": (LOSS, {"hit_ptr": torch.zeros_like}, check_nll_by_chunks),
    "nll: targets shifted": (LOSS, {"start": lambda v: v + 1}, nll_check()),
    "nll: excluded items enter": (LOSS, {"HAS_EXCLUDE": lambda v: False}, nll_check(excluding=True)),
    "nll gradient: targets shifted": (DLOSS, {"start": lambda v: v + 1}, nll_check()),
    "nll gradient: tail missing": (DLOSS, {"N": lambda v: v - 64}, nll_check()),
    "nll gradient: another user's sum": (DLOSS, {"lse_ptr": lambda t: t.roll(1)}, nll_check()),
    "nll gradient: a copy written": (DLOSS, {"ds_ptr": torch.clone}, nll_check()),
    "nll gradient of chunks: excluded enter": (DLOSS, {"HAS_EXCLUDE": lambda v: False}, check_nll_by_chunks),
    "fuse: wrong row": (FUSE, {"stride_lookup": lambda v: v - 1}, lambda: check_fuse("hard")),
    "fuse: wrong weights": (FUSE, {"UNIFORM": lambda v: True}, lambda: check_fuse("topk_softmax")),
    "fuse: wrong mask": (FUSE, {"ids_ptr": lambda t: t.clamp_min(0)}, lambda: check_fuse("hard")),
    "dot: columns missing": (DOT, {"D": lambda v: v - 1}, check_row_dot),
    "dot: padding not 0": (DOT, {"ids_ptr": lambda t: t.clamp_min(0)}, check_row_dot),
    "sparse gradient: of the code": (BAG, {"weights_ptr": torch.zeros_like}, gradients_check),
    "sparse gradient: users shifted": (SEGMENT, {"rows_ptr": lambda t: t.roll(1)}, gradients_check),
    "sparse gradient: of the list's weights": (DOT, {"table_ptr": torch.zeros_like}, gradients_check),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_seen(name: str, request: pytest.FixtureRequest) -> None:
    kernel, wrong, check = FAULTS[name]
    if check in (chunks_check, check_nll_by_chunks):
        request.getfixturevalue("chunked")
    check()
    with fault(kernel, **wrong), pytest.raises((AssertionError, IndexError)):
        check()


FILTER_FAULTS: dict[str, tuple[Any, dict[str, Any]]] = {
    "last tile missing": (linear_filter.linear_filter_fwd_kernel, {"M": lambda v: v - 44}),
    "certificate ignored": (linear_filter.linear_filter_check_kernel, {"K": lambda v: -(1 << 20)}),
    "excluded kept": (linear_filter.linear_filter_check_kernel, {"HAS_EXCLUDE": lambda v: False}),
    "nobody checked": (linear_filter.linear_filter_check_kernel, {"open_ptr": torch.zeros_like}),
    "rescue off by one": (linear_filter.linear_filter_rescue_kernel, {"M": lambda v: v - 1}),
    "rescue of excluded items": (linear_filter.linear_filter_rescue_kernel, {"HAS_EXCLUDE": lambda v: False}),
    "rescue elsewhere": (linear_filter.linear_filter_rescue_kernel, {"buffer_ptr": torch.clone}),
    "items shifted": (linear_filter.linear_filter_fwd_kernel, {"weight_ptr": lambda t: t.roll(1, 0)}),
    "last user left out": (linear_filter.linear_filter_fwd_kernel, {"active_ptr": lambda t: t - 1}),
    "dirty count": (linear_filter.linear_filter_fwd_kernel, {"found_ptr": lambda t: t.add_(1)}),
    "thresholds of others": (linear_filter.linear_filter_fwd_kernel, {"tau_ptr": lambda t: t.flip(0)}),
}


@pytest.mark.usefixtures("filtered")
@pytest.mark.parametrize("name", FILTER_FAULTS)
def test_a_planted_fault_of_the_filter_is_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tau = torch.tensor([10.0, 2.0], device=DEVICE)  # the second user has a certificate, the first none
    monkeypatch.setattr(linear_topk, "threshold", lambda *a: a[5][:, -1].copy_(tau))
    M = 300
    u, weight = torch.ones(2, 1, device=DEVICE), (torch.arange(M, device=DEVICE) % 9 - 5.0)[:, None]
    weight[-3:] = 4
    bias = torch.zeros(M, device=DEVICE)
    exclude = torch.tensor([8, 26, 8, 17, 298], device=DEVICE), torch.tensor([0, 2, 5], device=DEVICE)

    def check() -> None:
        state = kernels.loop_state()
        ids, _ = kernels.linear_topk(u, weight, bias, 20, exclude, state)
        assert torch.equal(ids, reference.linear_topk(u, weight, bias, 20, exclude)[0])
        assert state._buffers["found"].tolist() == [-1, int((weight >= 2).sum())]

    kernel, wrong = FILTER_FAULTS[name]
    check()
    with fault(kernel, **wrong), pytest.raises(AssertionError):
        check()
