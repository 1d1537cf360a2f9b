"""Everything that a graph holds, run on a device that is not there: its tensors have shapes and no data, and what mixes
devices, waits, or has a shape that depends on data raises. `test_pretended` runs this file in a process of its own, for
the device stays registered.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.utils import _pytree as pytree
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend
from triton.runtime.jit import JITFunction

from cfsfl_fast import CFSFL, CFSFLConfig, backends
from cfsfl_fast.folds import Folds
from cfsfl_fast.graphs import Graphs
from cfsfl_fast.interactions import Interactions
from cfsfl_fast.kernels import resting, tile
from cfsfl_fast.reference import ACTIONS
from cfsfl_fast.updates import Optimisers, Updates
from tests.test_training import SIZES

DEVICE = "pretended"
M, B, ROOM = 40, 16, 256

_setup_privateuseone_for_python_backend(DEVICE)


class Launches(set[str]):
    """Kernels that were launched; a tensor of another device, which a kernel would read as an address, raises."""

    def __call__(self, kernel: JITFunction, *arguments: Any, **options: Any) -> None:
        for t in (*arguments, *options.values()):
            assert not isinstance(t, Tensor) or t.device.type == DEVICE, f"{kernel.__name__} got a tensor on {t.device}"
        self.add(kernel.__name__)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[Launches]:
    """Inside, tensors are without data, those of DEVICE count as a CUDA device's, and kernels only look at where they
    are."""
    found = Launches()
    monkeypatch.setattr(FakeTensor, "is_cuda", property(lambda t: t.device.type == DEVICE))
    monkeypatch.setattr(FakeTensor, "data_ptr", lambda t: 16 * id(t))
    monkeypatch.setattr(JITFunction, "run", lambda *arguments, **options: found(*arguments, **options))
    monkeypatch.setattr(torch, "_fused_adam_", adam)
    monkeypatch.setattr(backends, "why_not", lambda backend, device: None)
    for module in (tile, resting):
        monkeypatch.setattr(module, "capability", lambda device: 90)
    with FakeTensorMode():
        yield found


def adam(*lists: list[Tensor], **options: Any) -> None:
    """torch has no shapes-only version of it."""
    for t in pytree.tree_leaves((lists, options)):
        assert not isinstance(t, Tensor) or t.device.type == DEVICE, f"Adam got a tensor on {t.device}"


def rows(n_users: int) -> Interactions:
    ids = [torch.empty(n, dtype=torch.int64, device=DEVICE) for n in (ROOM, n_users + 1)]
    return Interactions(*ids, M, fixed=True)


def make(**choices: Any) -> CFSFL:
    with unset_fake_temporarily():
        model = CFSFL.from_config(M, CFSFLConfig(**{**SIZES, "batch_size": B, "anneal_steps": 100, **choices}))
    model.graphs = Graphs(True)
    for module in model.modules():
        for name, p in module._parameters.items():
            module._parameters[name] = p if p is None else torch.nn.Parameter(torch.empty(p.shape, device=DEVICE))
        for name, b in module._buffers.items():
            module._buffers[name] = b if b is None else torch.empty(b.shape, dtype=b.dtype, device=DEVICE)
    if model.memory is not None:
        model.memory.precision, model.memory.counts = (torch.empty(n, device=DEVICE) for n in ((M, M), M))
    return model


BACKENDS = pytest.mark.parametrize("backend", ["torch", "triton"])


@BACKENDS
@pytest.mark.parametrize(("precision", "choices"), [
    ("fp32", {}),
    ("bf16", {"reading": "full", "noise": "fresh", "kl": "annealed", "reward_batch": "fresh"}),
    ("bf16", {"action": "topk_softmax", "loss_steps": "all"}),
    ("fp32", {"action": "softmax", "mask_kept": False}),
    ("fp32", {"recommender": "recvae"}),
    ("fp32", {"recommender": "mf"}),
    ("fp32", {"recommender": "warp"}),
    ("fp32", {"feedback": "scores"}),
], ids=lambda of: of if isinstance(of, str) else ",".join(map(str, of.values())) or "default")  # fmt: skip
def test_an_update(choices: dict[str, Any], precision: str, backend: str, launches: Launches) -> None:
    for stage in ("recommender", "reward", "joint"):
        model = make(**choices)
        if model.memory is not None and stage == "joint":
            continue  # its loop has no part in the recommender's training
        model.backend, model.precision = backend, precision
        folds = Folds([make(**choices).eval() for _ in range(2)], torch.empty(50, dtype=torch.int64, device=DEVICE))
        for other in folds.models:
            other.backend, other.precision = backend, precision
        updates = Updates(model, rows(50), Optimisers(model, stage), stage, folds=folds)
        updates.begin(3, (1, 2), ROOM)
        users = torch.empty(B, dtype=torch.int64, device=DEVICE)
        updates(users, users)
    assert bool(launches) == (backend == "triton")


@BACKENDS
@pytest.mark.parametrize(("precision", "filter_from"), [("fp32", 1 << 30), ("bf16", 1 << 30), ("bf16", 1)])
@pytest.mark.parametrize("choices", [{"action": action} for action in ACTIONS] + [{"feedback": "scores"}],
                         ids=lambda of: next(iter(of.values())))  # fmt: skip
def test_an_inference(
    choices: dict[str, Any], filter_from: int, precision: str, backend: str, launches: Launches,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("CFSFL_FILTER_FROM", str(filter_from))
    model = make(**choices).eval()
    model.backend, model.precision = backend, precision
    calls = (5, True, None, False), (M, False, None, True), (5, False, rows(64), True)
    for n, exclude_seen, others, rescore in calls:
        with torch.no_grad(), model.running():
            ids, best, finite = model._recommend(rows(64), n, exclude_seen, others, None, None, rescore)
        assert (ids.shape, best.shape, finite.shape) == ((64, n), (64, n), (1,))
        assert {t.device.type for t in (ids, best, finite)} == {DEVICE}
    with torch.no_grad():
        assert model(rows(64)).shape == (64, M)
    assert bool(launches) == (backend == "triton")


def test_what_would_fail_raises(launches: Launches) -> None:
    x = torch.empty(4, device=DEVICE)
    for wrong in (lambda: x + torch.arange(4), lambda: x[torch.arange(4).bool()], lambda: float(x.sum())):
        with pytest.raises((RuntimeError, DataDependentOutputException, DynamicOutputShapeException)):
            wrong()
