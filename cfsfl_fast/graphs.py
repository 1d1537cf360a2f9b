"""Functions of tensors whose shapes repeat, captured as CUDA graphs and replayed: one launch for all of their kernels.

Knows no model: takes a function, its tensors, and a key that says everything else the function depends on. On a device
without graphs the function is called, on buffers of the same shapes.

What a function must keep to: no waiting for the device inside, no shape that depends on data, and no memory read but
its inputs and `reads`, whose addresses are part of the key (values may change in place). It may write to tensors that
were there before: an optimiser's step is such a function. The first calls with a key run as they are, which compiles
kernels, fills caches and creates an optimiser's state; they count, so a function with effects has each once per call.

Memory    Graphs of one device share a pool. A replay overwrites what others left in it, so results are copied out, and
          runs follow one another in the order of the calls, on whatever streams these are made.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger(__name__)

MODES = ("auto", True, False)
"""Capture where the device can; have the shapes of captured graphs everywhere; never."""

WARM_UP = 2
"""Calls with one key before its graph is captured."""

LIMIT = 32
"""Graphs that are held; the one not used for longest goes first."""

LEAST_CAPACITY = 1024


def capacity(n: int) -> int:
    """The smallest of 1024, 1280, 1536, 1792, 2048, 2560 ... that holds n: at most a quarter more."""
    if n <= LEAST_CAPACITY:
        return LEAST_CAPACITY
    quarter = 1 << (max(n - 1, 1).bit_length() - 3)
    return -(-n // quarter) * quarter


Function = Callable[..., tuple[Tensor, ...]]


class _Recording:
    """One function at one set of shapes."""

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        self.calls = 0
        self.refused = False
        self.graph: Any = None
        self.outputs: tuple[Tensor, ...] = ()
        with torch.inference_mode(False):
            self.inputs = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs]

    def fill(self, inputs: Sequence[Tensor]) -> None:
        """Copies a call's inputs to where the graph reads them."""
        with torch.inference_mode(False), torch.no_grad():
            torch._foreach_copy_(self.inputs, list(inputs))  # one launch


class _Device:
    """All that is CUDA here: a side stream, the graphs' pool, and the order of runs."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.aside: Any = torch.cuda.Stream(device)
        self.pool: Any = None
        self.graphs: weakref.WeakSet[Any] = weakref.WeakSet()
        self.failed: list[Any] = []
        self.ran: Any = torch.cuda.Event()
        self.ran_on: Any = None

    def follow(self) -> None:
        """Makes the current stream wait for the last run, where that was on another one: it may still read the buffers
        that are about to be filled.
        """
        stream = torch.cuda.current_stream()
        if self.ran_on not in (None, stream):
            stream.wait_event(self.ran)

    def _leave(self, stream: Any) -> None:
        self.ran.record(stream)
        self.ran_on = stream

    def call(self, function: Function, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """function(*inputs) on the side stream, where a capture will be."""
        stream = torch.cuda.current_stream()
        self.aside.wait_stream(stream)
        with torch.cuda.stream(self.aside):
            outputs = function(*inputs)
        stream.wait_stream(self.aside)
        for t in outputs:
            t.record_stream(stream)
        self._leave(stream)
        return outputs

    def capture(self, function: Function, inputs: Sequence[Tensor]) -> tuple[Any, tuple[Tensor, ...]]:
        """A graph of function(*inputs), which is not run, and where its results will be.

        Raises:
            RuntimeError: the function does what cannot be captured.
        """
        stream = torch.cuda.current_stream()
        if not self.graphs:  # the allocator takes no pool back whose graphs are all gone
            self.pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with _undisturbed():
            try:
                with torch.cuda.graph(graph, pool=self.pool, stream=self.aside, capture_error_mode="thread_local"):
                    outputs = function(*inputs)
            except RuntimeError:
                self._end_failed(graph, stream)
                raise
        self.graphs.add(graph)
        return graph, outputs

    def _end_failed(self, graph: Any, stream: Any) -> None:
        """Does what torch leaves undone where ending a capture fails too: its stream stays current, and the allocator
        goes on asking the graph whose memory is whose.
        """
        torch.cuda.set_stream(stream)
        self.failed.append(graph)
        with contextlib.suppress(RuntimeError, AttributeError):  # of a capture that was ended, or by another version
            torch._C._cuda_endAllocateToPool(stream.device_index, self.pool)

    def replay(self, graph: Any, outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Copies of the results of one more run."""
        stream = torch.cuda.current_stream()
        graph.replay()
        copies = tuple(t.clone() for t in outputs)
        self._leave(stream)
        return copies


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """For a capture. No graph that is garbage ends inside, which a device may refuse while it captures. And every graph
    has cuBLAS's workspaces in the graphs' pool, where they live as long as it: torch keeps one for each stream, graphs
    hold its address, and the end of any graph that was captured on the stream takes it away from all others (PyTorch
    issue 193402).
    """
    gc.collect()
    collects = gc.isenabled()
    gc.disable()
    torch._C._cuda_clearCublasWorkspaces()
    try:
        yield
    finally:
        torch._C._cuda_clearCublasWorkspaces()
        if collects:
            gc.enable()


class Graphs:
    """Calls functions, by replaying their graphs where there are any.

    Args:
        mode: "auto" captures on CUDA devices; True has the shapes of graphs on every device, for tests, and captures on
            CUDA devices; False calls every function as it is.

    Raises:
        ValueError: mode is none of these.
    """

    def __init__(self, mode: str | bool = "auto") -> None:
        if mode not in MODES or (mode != "auto" and not isinstance(mode, bool)):
            raise ValueError(f'graphs must be "auto", True or False; got {mode!r}')
        self.mode = mode
        self.replays = 0
        self._recordings: OrderedDict[Hashable, _Recording] = OrderedDict()
        self._devices: dict[torch.device, _Device] = {}
        self._lock = threading.RLock()
        self._complained = False

    def __reduce__(self) -> tuple[Any, ...]:
        return Graphs, (self.mode,)  # copies start without graphs

    def __len__(self) -> int:
        return len(self._recordings)

    def wanted(self, device: torch.device) -> bool:
        """Whether shapes should repeat on a device: whether to pad to a `capacity` before a call."""
        return self.mode is True or (self.mode == "auto" and self._captures(device))

    @staticmethod
    def _captures(device: torch.device) -> bool:
        return device.type == "cuda"

    def clear(self) -> None:
        """Drops every graph and its memory."""
        with self._lock:
            for device in self._devices:
                torch.cuda.synchronize(device)  # one may be running
            self._recordings.clear()

    def run(
        self, function: Function, *inputs: Tensor, key: Hashable, reads: Sequence[Tensor] = ()
    ) -> tuple[Tensor, ...]:
        """function(*inputs).

        Args:
            function: of tensors, to a tuple of tensors.
            inputs: all on one device.
            key: what the function depends on beside shapes, types, numeric modes of torch and the addresses of `reads`.
            reads: tensors that the function reads or writes where they are.
        """
        device = inputs[0].device
        if not self.wanted(device) or torch.compiler.is_compiling():
            return function(*inputs)
        with self._lock:
            recording = self._recording(key, inputs, reads)
            if not self._captures(device):
                recording.fill(inputs)
                return tuple(t.clone() for t in function(*recording.inputs))
            with torch.cuda.device(device):
                if recording.refused or torch.cuda.is_current_stream_capturing():
                    return function(*inputs)
                return self._run(recording, function, inputs)

    def _recording(self, key: Hashable, inputs: Sequence[Tensor], reads: Sequence[Tensor]) -> _Recording:
        identity = (
            key,
            tuple((x.shape, x.dtype, x.device) for x in inputs),
            tuple((t.data_ptr(), t.shape, t.dtype) for t in reads),
            torch.get_float32_matmul_precision(),
            torch.are_deterministic_algorithms_enabled(),
        )
        if identity not in self._recordings:
            self._recordings[identity] = _Recording(inputs)
        self._recordings.move_to_end(identity)
        if len(self._recordings) > LIMIT:
            if inputs[0].is_cuda:
                torch.cuda.synchronize(inputs[0].device)  # the oldest may be running
            self._recordings.popitem(last=False)
        return self._recordings[identity]

    def _run(self, recording: _Recording, function: Function, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        place = inputs[0].device
        if place not in self._devices:
            self._devices[place] = _Device(place)
        device = self._devices[place]
        device.follow()
        recording.fill(inputs)
        recording.calls += 1
        if recording.calls <= WARM_UP:
            return device.call(function, recording.inputs)
        if recording.graph is None:
            try:
                recording.graph, recording.outputs = device.capture(function, recording.inputs)
            except RuntimeError as error:
                recording.refused = True
                self._complain(error)
                return function(*recording.inputs)
        self.replays += 1
        return device.replay(recording.graph, recording.outputs)

    def _complain(self, error: RuntimeError) -> None:
        """Says once why there is no graph."""
        cause = error.__context__ or error  # ending a failed capture fails too
        reason = (str(cause).strip() or type(cause).__name__).splitlines()[0]
        level = logging.DEBUG if self._complained else logging.WARNING
        log.log(level, "no CUDA graph, kernels are launched one by one: %s", reason)
        self._complained = True
