"""What a captured graph may not contain, looked for in every call between a graph's inputs and its results: with the
Triton kernels interpreted, an update of each stage and a recommendation run the code that a CUDA device runs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cfsfl_fast import CFSFL, CFSFLConfig, backends, library, ops, reference
from cfsfl_fast.folds import Folds
from cfsfl_fast.graphs import Graphs
from cfsfl_fast.interactions import as_interactions
from cfsfl_fast.training import prepare_item_reward
from cfsfl_fast.updates import Optimisers, run_epoch
from tests.conftest import clusters
from tests.test_training import SIZES

from . import interpreter  # noqa: F401

aten = torch.ops.aten
WAITING = {
    aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten._unique2, aten.unique_dim, aten.bincount,
    aten.unique_consecutive, aten.equal, aten.is_nonzero, aten._nested_tensor_from_tensor_list, aten.histc,
}  # fmt: skip
"""Calls whose result, or its shape, the host reads from the device."""

FROM_HOST = {aten.lift_fresh, aten.lift_fresh_copy}
"""Tensors made of Python's numbers: a copy from memory that a graph would read again later."""


class Watch(TorchDispatchMode):
    """Raises at a call that waits for the device or depends on the host's memory."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet = func.overloadpacket
        if packet in WAITING | FROM_HOST:
            raise AssertionError(f"{func} in a graph")
        if packet in (aten.index, aten.index_put, aten.index_put_):
            kinds = [t.dtype for t in args[1] if t is not None]
            assert not {torch.bool, torch.uint8} & set(kinds), f"{func} by a mask"
        if packet is aten.repeat_interleave:
            assert (kwargs or {}).get("output_size") is not None, "repeat_interleave without its size"
        return func(*args, **(kwargs or {}))


watched = 0


@pytest.fixture(autouse=True)
def watch(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every function given to `Graphs` is watched, and rows keep their room, as on a device."""
    from triton.runtime import interpreter as triton

    run, launch = Graphs.run, triton.GridExecutor.__call__

    def run_watched(self: Graphs, function: Any, *inputs: Any, **rest: Any) -> Any:
        def inside(*tensors: Any) -> Any:
            global watched
            watched += 1
            with Watch():
                return function(*tensors)

        return run(self, inside, *inputs, **rest)

    def launch_unwatched(*arguments: Any, **options: Any) -> Any:
        with torch._C._DisableTorchDispatch():
            return launch(*arguments, **options)

    monkeypatch.setattr(Graphs, "run", run_watched)
    monkeypatch.setattr(triton.GridExecutor, "__call__", launch_unwatched)
    monkeypatch.setattr(library, "without_room", lambda items, offsets: (items, offsets))
    monkeypatch.setattr(ops, "topk", reference.top)
    before = watched
    with contextlib.ExitStack() as stack:
        stack.enter_context(backends.use_backend("triton"))
        yield
    assert watched > before, "nothing was watched"


def make(**choices: Any) -> CFSFL:
    config = CFSFLConfig(**{**SIZES, "batch_size": 16, "anneal_steps": 100, "steps": 1, **choices})
    torch.manual_seed(0)
    model = CFSFL.from_config(40, config, graphs=True)
    torch.nn.init.normal_(model.recommender.input.feedback)
    return model


CHOICES: list[dict[str, Any]] = [
    {},
    {"reading": "full", "noise": "fresh", "kl": "annealed", "reward_batch": "fresh", "reward_loss": "literal",
     "action": "topk_softmax", "loss_steps": "all"},
    {"action": "softmax", "mask_kept": False},
    {"recommender": "mf"},
    {"recommender": "warp"},
    {"recommender": "cdae"},
    {"recommender": "awae"},
    {"feedback": "scores", "steps": 2},
]  # fmt: skip


@pytest.mark.parametrize("choices", CHOICES, ids=lambda choices: ",".join(map(str, choices.values())) or "default")
def test_an_update_waits_for_nothing(choices: dict[str, Any]) -> None:
    model = make(**choices)
    x = as_interactions(clusters(16), 40)
    stages, folds = ["recommender", "reward", "joint"], None
    if model.config.feedback == "scores":
        folds = Folds([make(**choices).eval()], torch.zeros(16, dtype=torch.int64))
        model.memory.fit(x, 1.0)
        prepare_item_reward(model, folds, x)
        stages.pop()  # its loop has no part in the recommender's training
    for stage in stages:
        optimisers = Optimisers(model, stage)
        run_epoch(model, x, optimisers, stage, torch.arange(16), (1, 2), 0, lambda n, loss: None, folds=folds)


@pytest.mark.parametrize("action", ["straight_through", "softmax"])
def test_a_recommendation_waits_for_nothing(action: str) -> None:
    model, x = make(action=action, steps=1).eval(), clusters(20)
    model.recommend(x, 3)
    model.recommend(x, 3, exclude=[1, 2], steps=0)


def test_the_watch_sees() -> None:
    model, x = Graphs(True), torch.arange(4.0)
    for function in (
        lambda x: (x[x > 1],),
        lambda x: (x * x.sum().item(),),
        lambda x: (x.nonzero(),),
        lambda x: (x + torch.tensor([1.0, 2, 3, 4]),),
        lambda x: (x.repeat_interleave(x.long()),),
    ):
        with pytest.raises(AssertionError, match=r"in a graph|by a mask|without its size"):
            model.run(function, x, key=None)
