"""Graphs: shapes, keys, order and fallback on the CPU with a stand-in for the device; replay itself on a GPU."""

from __future__ import annotations

import contextlib
import copy
import gc
import logging
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from cfsfl_fast import graphs
from cfsfl_fast.graphs import Graphs, capacity

CUDA = pytest.param("cuda", marks=[
    pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
])  # fmt: skip


class StandIn:
    """A device whose graphs run the function again into the same results, as a replay does."""

    fails = False

    def __init__(self, device: torch.device) -> None:
        self.log: list[str] = []

    def follow(self) -> None:
        pass

    def call(self, function: Callable[..., Any], inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return function(*inputs)

    def capture(self, function: Callable[..., Any], inputs: Sequence[Tensor]) -> tuple[Any, tuple[Tensor, ...]]:
        if self.fails:
            raise RuntimeError("operation not permitted when stream is capturing\nmore words")
        outputs = tuple(torch.full_like(t, 7) for t in function(*inputs))

        def replay() -> None:
            for place, value in zip(outputs, function(*inputs), strict=True):
                place.copy_(value)

        return replay, outputs

    def replay(self, graph: Any, outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        graph()
        return tuple(t.clone() for t in outputs)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> type[StandIn]:
    monkeypatch.setattr(StandIn, "fails", False)
    monkeypatch.setattr(graphs, "_Device", StandIn)
    monkeypatch.setattr(Graphs, "_captures", staticmethod(lambda device: True))
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return StandIn


@pytest.fixture(params=["cpu", CUDA])
def device(request: pytest.FixtureRequest) -> torch.device:
    """The CPU with the stand-in, or a GPU."""
    if request.param == "cpu":
        request.getfixturevalue("stand_in")
    return torch.device(request.param)


def test_capacities_waste_at_most_a_quarter() -> None:
    sizes = [capacity(n) for n in range(20_000)]
    assert sizes[0] == sizes[1024] == 1024
    assert [sizes[n] for n in (1025, 1281, 1537, 1793, 2049, 2561)] == [1280, 1536, 1792, 2048, 2560, 3072]
    assert all(n <= size <= max(1024, 1.25 * n) for n, size in enumerate(sizes))
    assert sizes == sorted(sizes)
    assert len(set(sizes)) < 25


def test_a_replay_gives_what_a_call_gives(device: torch.device) -> None:
    weight, mode = torch.randn(5, 5, device=device), Graphs()

    def function(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        return x @ weight + y, x.sum(0)

    answers = []
    for turn in range(7):
        x, y = torch.randn(3, 5, device=device), torch.randn(5, device=device)
        if turn == 5:
            weight.fill_(0.5)  # in place: the graph reads what is there
        found = mode.run(function, x, y, key="f", reads=[weight])
        answers.append((found, [t.clone() for t in function(x, y)]))
    for found, expected in answers:  # a later call did not touch an earlier one's results
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert (len(mode), mode.replays) == (1, 7 - graphs.WARM_UP)


def test_a_function_with_effects_has_each_once_per_call(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """As an optimiser's step: warm-up counts, capture does not."""
    total, mode = torch.zeros(4, device=device), Graphs()
    # The stand-in's own capture would run the function.
    monkeypatch.setattr(StandIn, "capture", lambda self, function, inputs: (lambda: function(*inputs), ()))

    def add(x: Tensor) -> tuple[Tensor, ...]:
        total.add_(x)
        return ()

    for n in range(1, 8):
        mode.run(add, torch.full((4,), float(n), device=device), key="add", reads=[total])
        assert total.tolist() == [n * (n + 1) / 2] * 4


def test_what_a_function_depends_on_is_in_its_key(device: torch.device) -> None:
    mode = Graphs()

    def times(weight: Tensor, n: int) -> Callable[[Tensor], tuple[Tensor, ...]]:
        return lambda x: (x * weight * n,)

    weight = torch.ones(3, device=device)
    moved = weight * 2  # another address
    for _ in range(4):
        for w, n, dtype, size in ((weight, 1, torch.float32, 3), (weight, 2, torch.float32, 3),
                                  (moved, 1, torch.float32, 3), (weight, 1, torch.float64, 3),
                                  (weight, 1, torch.float32, 1)):  # fmt: skip
            x = torch.ones(size, device=device, dtype=dtype)
            (found,) = mode.run(times(w, n), x, key=n, reads=[w])
            assert torch.equal(found, x * w * n)
    assert len(mode) == 5
    assert mode.replays == 5 * (4 - graphs.WARM_UP)
    old = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        mode.run(times(weight, 1), torch.ones(3, device=device), key=1, reads=[weight])
    finally:
        torch.set_float32_matmul_precision(old)
    assert len(mode) == 6


def test_the_graph_that_was_not_used_for_longest_goes(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "LIMIT", 3)
    mode = Graphs()
    x = torch.ones(2, device=device)
    for name in ("a", "b", "c", "a", "a", "a", "d", "a", "b", "b", "b"):
        (found,) = mode.run(lambda x, name=name: (x * ord(name),), x, key=name)
        assert torch.equal(found, x * ord(name))
    assert len(mode) == 3
    assert mode.replays == 4  # three of a, one of b, whose first recording was dropped
    mode.clear()
    assert len(mode) == 0


def test_what_cannot_be_captured_runs_and_is_said_once(stand_in: type[StandIn], caplog: pytest.LogCaptureFixture,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setattr(stand_in, "fails", True)
    mode = Graphs()
    with caplog.at_level(logging.WARNING):
        for key in ("a", "b"):
            for n in range(5):
                (found,) = mode.run(lambda x: (x + 1,), torch.tensor([float(n)]), key=key)
                assert found.item() == n + 1
    assert [r.message for r in caplog.records] == [
        "no CUDA graph, kernels are launched one by one: operation not permitted when stream is capturing"
    ]
    assert mode.replays == 0


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a capture asks of torch, in order; torch's own part is left out."""
    made: list[str] = []

    class Stream:
        device_index = 3

    class Graph:
        pass

    @contextlib.contextmanager
    def graph(*_: Any, pool: Any, **__: Any) -> Any:
        made.append(f"begin in {pool}, collecting {gc.isenabled()}")
        try:
            yield
        finally:
            made.append("end")

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream())
    monkeypatch.setattr(torch.cuda, "Event", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: made.append("stream back"))
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: f"pool {len(made)}")
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: made.append("clear"), raising=False)
    monkeypatch.setattr(
        torch._C, "_cuda_endAllocateToPool", lambda index, pool: made.append(f"{index} leaves {pool}"), raising=False
    )
    return made


def test_a_capture_has_workspaces_of_its_own(calls: list[str]) -> None:
    device, x = graphs._Device(torch.device("cuda", 3)), torch.ones(2)
    first, (found,) = device.capture(lambda x: (x + 1,), [x])
    assert torch.equal(found, x + 1)
    second, _ = device.capture(lambda x: (x + 1,), [x])
    assert calls == ["clear", "begin in pool 0, collecting False", "end", "clear"] * 2
    del first, second
    calls.append("more")
    device.capture(lambda x: (x + 1,), [x])
    assert "begin in pool 9, collecting False" in calls, "a pool whose graphs are gone is not used again"
    assert gc.isenabled()


def test_a_failed_capture_is_ended_for_the_allocator_too(calls: list[str]) -> None:
    def fails(x: Tensor) -> tuple[Tensor, ...]:
        raise RuntimeError("not permitted")

    device = graphs._Device(torch.device("cuda", 3))
    with pytest.raises(RuntimeError, match="not permitted"):
        device.capture(fails, [torch.ones(2)])
    assert calls == [
        "clear", "begin in pool 0, collecting False", "end", "stream back", "3 leaves pool 0", "clear",
    ]  # fmt: skip
    assert len(device.failed) == 1
    assert gc.isenabled()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_device_goes_on_after_a_failed_capture(caplog: pytest.LogCaptureFixture) -> None:
    mode, x = Graphs(), torch.arange(4.0, device="cuda")
    before = torch.cuda.current_stream()
    for _ in range(5):
        (found,) = mode.run(lambda x: (x * float(x.sum()),), x, key="waits")  # .item() cannot be captured
        assert torch.equal(found, x * 6)
        assert torch.cuda.current_stream() == before
    assert len(caplog.records) == 1
    for _ in range(5):
        assert torch.equal(mode.run(lambda x: (x + 1,), x, key="does not")[0], x + 1)
    assert mode.replays == 5 - graphs.WARM_UP


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_graphs_come_again_after_all_are_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    mode, x = Graphs(), torch.arange(4.0, device="cuda")
    for _ in range(3):
        for _ in range(graphs.WARM_UP + 2):
            assert torch.equal(mode.run(lambda x: (x + 1,), x, key="f")[0], x + 1)
        mode.clear()
    monkeypatch.setattr(graphs, "LIMIT", 1)
    for key in range(6):
        for _ in range(graphs.WARM_UP + 1):
            assert torch.equal(mode.run(lambda x, key=key: (x + key,), x, key=key)[0], x + key)
    assert mode.replays == 3 * 2 + 6


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_graph_outlives_others_of_its_stream() -> None:
    """Also one that is newer, whose products' workspace the older one may share."""
    mode = Graphs()
    weight = torch.randn(4096, 4096, device="cuda")
    inputs = [torch.randn(n, 4096, device="cuda") for n in (64, 32)]
    expected = [x @ weight for x in inputs]

    def times(x: Tensor) -> tuple[Tensor, ...]:
        return (x @ weight,)

    for _ in range(graphs.WARM_UP + 2):
        for x in inputs:
            mode.run(times, x, key=len(x), reads=[weight])
    mode._recordings.popitem()  # the newer goes
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    rubbish = [torch.full((1 << 20,), float("nan"), device="cuda") for _ in range(64)]
    assert torch.equal(mode.run(times, inputs[0], key=64, reads=[weight])[0], expected[0])
    assert all(bool(r.isnan().all()) for r in rubbish)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_replays_follow_one_another_on_any_streams() -> None:
    mode = Graphs()
    streams = [torch.cuda.Stream() for _ in range(3)]
    big = torch.randn(2048, 2048, device="cuda") / 45
    inputs = [torch.randn(2048, 2048, device="cuda") for _ in range(12)]

    def long(x: Tensor) -> tuple[Tensor, ...]:
        for _ in range(6):
            x = x @ big
        return (x,)

    expected = [long(x)[0] for x in inputs]
    torch.cuda.synchronize()
    found = []
    for n, x in enumerate(inputs):
        with torch.cuda.stream(streams[n % 3]):
            found.append(mode.run(long, x, key="long", reads=[big])[0])
    torch.cuda.synchronize()
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def test_without_graphs_a_function_is_called_as_it_is() -> None:
    x = torch.ones(3)
    for mode in (Graphs(False), Graphs("auto")):
        assert not mode.wanted(x.device)
        assert mode.run(lambda x: (x,), x, key="f")[0] is x
        assert len(mode) == 0
    shaped = Graphs(True)
    assert shaped.wanted(x.device)
    (found,) = shaped.run(lambda x: (x,), x, key="f")
    assert found is not x
    assert torch.equal(found, x)
    assert len(shaped) == 1
    assert len(copy.deepcopy(shaped)) == 0
    assert copy.deepcopy(shaped).mode is True


@pytest.mark.parametrize("mode", ["on", None, 2, 1])
def test_other_modes_are_refused(mode: Any) -> None:
    with pytest.raises(ValueError, match=f'must be "auto", True or False; got {mode!r}'):
        Graphs(mode)


def test_inference_mode_and_others_share_buffers() -> None:
    mode, x = Graphs(True), torch.ones(3)
    for inference in (True, False, True):
        with torch.inference_mode(inference):
            assert torch.equal(mode.run(lambda x: (x * 2,), x, key="f")[0], x * 2)
