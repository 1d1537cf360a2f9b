"""Captured functions, replayed as a CUDA device would: every call of torch in them is taken down and made again,
without a line of Python between. What a function knew from the host when it was captured stays as it was then.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from cfsfl_fast import CFSFL, CFSFLConfig, graphs, library
from cfsfl_fast.graphs import Graphs
from cfsfl_fast.interactions import as_interactions
from cfsfl_fast.reference import ACTIONS
from cfsfl_fast.updates import Optimisers, run_epoch
from tests.conftest import clusters
from tests.test_captured import agree, epochs
from tests.test_graphs import StandIn, stand_in  # noqa: F401
from tests.test_model import M, build, histories
from tests.test_training import SIZES


def storage(t: Tensor) -> int:
    return t.untyped_storage().data_ptr()


class Tape(TorchDispatchMode):
    """Takes calls down; `replay` makes them again, and puts what they give where the first ones put it."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self.fresh = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero):
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        given = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, given))
        return given

    def replay(self) -> None:
        if self.fresh:
            self.fresh = False
            return
        for func, args, kwargs, given in self.calls:
            again = func(*args, **kwargs)
            for place, value in zip(pytree.tree_leaves(given), pytree.tree_leaves(again), strict=True):
                if isinstance(place, Tensor) and storage(place) != storage(value):
                    place.copy_(value.view(place.shape))  # some were squeezed in place since


replayed = 0


class Recorder(StandIn):
    """A device whose graphs are tapes. Taking down runs a function once, which stands for the first replay."""

    def capture(self, function: Callable[..., Any], inputs: Sequence[Tensor]) -> tuple[Any, tuple[Tensor, ...]]:
        with Tape() as tape:
            return tape, function(*inputs)

    def replay(self, graph: Tape, outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        global replayed
        replayed += 1
        with torch.no_grad():
            graph.replay()
        return tuple(t.clone() for t in outputs)


@pytest.fixture(autouse=True)
def recorder(stand_in: type[StandIn], monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """Graphs of everything, and operations that do not look at their data, as on a CUDA device."""
    global replayed
    replayed = 0

    def rows_of(offsets: Tensor, n_entries: int) -> Tensor:
        rows = torch.arange(len(offsets), device=offsets.device)
        return torch.repeat_interleave(rows, library.ended(offsets, n_entries).diff(), output_size=n_entries)

    monkeypatch.setattr(graphs, "_Device", Recorder)
    monkeypatch.setattr(library, "without_room", lambda items, offsets: (items, offsets))
    monkeypatch.setattr(library, "exact_topk", library.keyed_topk)
    monkeypatch.setattr(library, "rows_of", rows_of)
    monkeypatch.setattr(library, "_pooled", lambda t: False)
    monkeypatch.setenv("CFSFL_BACKEND", "torch")


@pytest.mark.parametrize("choices", [
    {}, {"reading": "full", "noise": "fresh", "kl": "annealed", "reward_batch": "fresh", "reward_loss": "literal"},
    {"action": "softmax", "mask_kept": False}, {"action": "topk_softmax", "loss_steps": "all"}, {"recommender": "warp"},
])  # fmt: skip
def test_updates(choices: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps, keys, the KL weight and Adam's counters go on in replays: they are read from where they change."""
    found, figures = epochs("cpu", 41, "auto", n=4, **choices)
    assert replayed == 3 * (4 * 3 - graphs.WARM_UP)
    monkeypatch.setattr(graphs, "WARM_UP", 1 << 30)
    plain, expected = epochs("cpu", 41, "auto", n=4, **choices)
    agree(found, plain, "cpu")
    assert figures == expected


def test_replays_move_the_moments_that_were_restored() -> None:
    """And not those of before, whose addresses a graph knows."""
    torch.manual_seed(0)
    model = CFSFL.from_config(40, CFSFLConfig(**{**SIZES, "batch_size": 16, "anneal_steps": 100}))
    x, optimisers = as_interactions(clusters(48), 40), Optimisers(model, "recommender")

    def epoch(number: int) -> list[Tensor]:
        run_epoch(model, x, optimisers, "recommender", torch.arange(48), (1, number), 3 * number, lambda *_: None)
        return [w.clone() for w in model.state_dict().values()]

    for number in range(2):
        epoch(number)
    weights, moments = ({k: t.clone() for k, t in state.items()} for state in (model.state_dict(), optimisers.state()))
    assert replayed
    first = epoch(2)
    model.load_state_dict(weights)
    optimisers.restore(moments)
    again = epoch(2)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("action", ACTIONS)
def test_lists_and_scores(action: str) -> None:
    """Weights change in place, move, and come back to where they were; T and K change."""
    model, plain = (build(graphs=mode, action=action) for mode in ("auto", False))
    x, first = histories(), {name: p.clone() for name, p in model.state_dict().items()}

    def check() -> None:
        for _ in range(graphs.WARM_UP + 2):
            agree(model.recommend(x, 9), plain.recommend(x, 9), "cpu")
            with torch.no_grad():
                agree([model(x)], [plain(x)], "cpu")

    check()
    for change in (
        lambda m: m.recommender.output.bias.data.copy_(torch.linspace(-3, 3, M)),
        lambda m: m.load_state_dict({name: p + 0.01 for name, p in first.items()}),
        lambda m: m.load_state_dict({name: p - 0.01 for name, p in first.items()}, assign=True),
        lambda m: m.load_state_dict({name: p.clone() for name, p in first.items()}, assign=True),
        lambda m: setattr(m, "config", dataclasses.replace(m.config, steps=1, top_k=3)),
        lambda m: setattr(m, "precision", "bf16"),
        lambda m: m.to("cpu"),
    ):
        for each in (model, plain):
            change(each)
        check()
    assert replayed >= 8 * 2 * 2


def test_a_function_that_reads_the_host_is_seen() -> None:
    """What the tape is for: a number of the host's stays in a graph as it was."""
    found, mode = [], Graphs()
    for n in range(graphs.WARM_UP + 3):
        found.append(float(mode.run(lambda x: (x + n,), torch.zeros(1), key="n")[0]))  # noqa: B023
    assert found == [0, 1, 2, 2, 2]
