"""The tests of `test_triton_gpu` here: small, in the interpreter, with tapes for graphs. What they ask of a device they
then ask for the first time without a mistake of their own. Run as `triton_cases` is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from . import test_triton_gpu as gpu
from . import triton_cases, triton_faults, triton_launchers, triton_resting
from .test_recorded import Tape
from .triton_cases import filtered, kernels, poisoned, reference, step_inputs  # noqa: F401  (fixtures among them)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes that the interpreter can bear; float32, since its products of bf16 are wrong."""
    borrowed = {"kernels": kernels, "reference": reference, "step_inputs": step_inputs}
    for name, value in {
        **borrowed,
        "DEVICE": "cpu",
        "HALF": torch.float32,
        "B": 2,
        "M": 170,
        "H": 7,
        "WIDE": 300,
    }.items():
        monkeypatch.setattr(gpu, name, value, raising=False)


@pytest.fixture
def tapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.cuda.graph takes down what runs inside it, launches among it; a replay makes it again."""
    from triton.runtime import interpreter

    launch = interpreter.GridExecutor.__call__
    taking: list[Tape] = []

    def run(*arguments: Any, **options: Any) -> None:
        with torch._C._DisableTorchDispatch():
            launch(*arguments, **options)
        if taking:
            taking[-1].calls.append((run, arguments, options, None))

    class Graph(Tape):
        def __init__(self) -> None:
            super().__init__()
            self.fresh = False

        def replay(self) -> None:
            assert self.calls
            super().replay()

    @contextlib.contextmanager
    def graph(tape: Graph) -> Iterator[None]:
        with tape:
            taking.append(tape)
            yield
            taking.pop()

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", run)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", graph)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lists(dtype: torch.dtype) -> None:
    gpu.test_lists_at_production_sizes(150, dtype)


@pytest.mark.usefixtures("small", "filtered")
def test_the_filter(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu.test_the_filter_finds_the_same_lists(monkeypatch)


@pytest.mark.usefixtures("small", "tapes")
def test_a_captured_graph() -> None:
    gpu.test_a_captured_graph_replays_what_ran()


@pytest.mark.usefixtures("small", "tapes")
@pytest.mark.parametrize("wide", [False, True])
def test_a_captured_loop(wide: bool, request: pytest.FixtureRequest) -> None:
    if wide:
        request.getfixturevalue("filtered")
    gpu.test_a_captured_loop_knows_who_rests(wide)


def test_everything_is_there_once() -> None:
    """`test_triton_gpu` takes the names of all: one that two files have would be lost."""
    files = triton_cases, triton_faults, triton_launchers, triton_resting
    every = sorted(name for file in files for name in vars(file) if name.startswith("test_"))
    assert every == sorted({*every})
    assert {*gpu.SANITIZED} <= {*every}
