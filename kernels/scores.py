"""Where scores come from before a kernel reads them: the library's product, a chunk of items at a time.

    s[:, start : stop] = u weight[start : stop]^T + bias[start : stop]        [B, width], in a buffer that is used again

Traffic   Scores are written once, and read from the second-level cache where they fit into it. Rows start at multiples
          of ALIGN elements. Where the catalogue is no multiple of ALIGN, one loop's state keeps the last chunk's
          weights padded (bias -inf), so that every product has the library's fast shape and its bias epilogue.
Numerics  As torch.addmm in the dtype of u: `torch.set_float32_matmul_precision` decides between float32 and tf32.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from cfsfl_fast.kernels.tile import ALIGN, round_up, tuned

CHUNK_BYTES = {90: 512 << 20}
"""Bytes of scores held at once, by compute capability. A bound on memory: on an H100 (9.0) one product of everything
beats several whose scores fit its cache, for 4,096 users of 20,108 items in bf16 3.7 against 4.7 ms for the loop."""


class LoopState:
    """What one loop's calls hand to each other; a call without one allocates its own.

    On the device, allocated at the first call that needs it and of one shape from then on: `_buffers` (scratch, the
    codes of the last step, and of a wide catalogue the anchors, candidates and thresholds), `norm`, and the last step's
    answers. On the host: numbers that count the calls and say whose buffers these are. Which users are at rest or have
    a proof is known to the device alone: no call waits for it, and the calls of one loop launch the same kernels on the
    same addresses whatever the data is, so that a graph that captured them, from `loop_state` on, replays them.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}
        self._tail: tuple[tuple[int, ...], tuple[Tensor, Tensor]] | None = None
        self.turn: Any = None  # what the last feedback step's answers depend on beside the code
        self.steps = 0  # feedback steps of this turn so far
        self.answers: tuple[Tensor, ...] | None = None  # of the last feedback step
        self.wide: Any = None  # whose candidates these are
        self.k = 0  # the length of list that they were found for
        self.norm: Tensor | None = None  # the largest row of the output layer [1]

    def empty(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, like: Tensor) -> Tensor:
        """An uninitialised buffer, the same one for every call with this name and shape."""
        return self._buffer(name, shape, dtype, like, torch.empty)

    def zeros(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, like: Tensor) -> Tensor:
        """A buffer that was zero when it was made; kernels leave it zero."""
        return self._buffer(name, shape, dtype, like, torch.zeros)

    def _buffer(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, like: Tensor, make: object) -> Tensor:
        held = self._buffers.get(name)
        if held is None or held.shape != shape or held.dtype != dtype or held.device != like.device:
            held = self._buffers[name] = make(shape, dtype=dtype, device=like.device)  # type: ignore[operator]
        return held

    def tail(self, weight: Tensor, bias: Tensor, start: int, width: int) -> tuple[Tensor, Tensor]:
        """The rows from `start` on, padded to `width` rows that score -inf."""
        key = (*_identity(weight), *_identity(bias), start, width)
        if self._tail is None or self._tail[0] != key:
            missing = width - (len(weight) - start)
            padded = F.pad(weight[start:], (0, 0, 0, missing)), F.pad(bias[start:], (0, missing), value=float("-inf"))
            self._tail = key, padded
        return self._tail[1]


def _identity(t: Tensor) -> tuple[int, int]:
    """Where a tensor is and how often it changed in place; nothing counts that of one made in inference mode."""
    return t.data_ptr(), 0 if t.is_inference() else t._version


def loop_state() -> LoopState:
    """What the calls of one loop over the same users, output layer and exclusions share."""
    return LoopState()


def chunk_width(u: Tensor, n_items: int) -> int:
    """Items whose scores [B, width] are held at once; a multiple of ALIGN."""
    limit = tuned("CFSFL_CHUNK_BYTES", CHUNK_BYTES, u.device)
    whole = round_up(n_items, ALIGN)
    fits = limit // max(1, len(u) * u.element_size()) // ALIGN * ALIGN
    return max(ALIGN, min(whole, fits))


def chunks(n_items: int, width: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of each chunk of the catalogue."""
    for start in range(0, n_items, width):
        yield start, min(start + width, n_items)


def product(
    u: Tensor, weight: Tensor, bias: Tensor, start: int, stop: int, out: Tensor, state: LoopState | None
) -> None:
    """Scores of the items start .. stop - 1 into out [B, width]; columns past them hold anything or -inf."""
    width = round_up(stop - start, ALIGN)
    if stop - start == width or (state is not None and stop == len(weight)):
        rows, shift = (weight, bias) if stop - start == width else state.tail(weight, bias, start, width)  # type: ignore[union-attr]
        if rows is weight:
            rows, shift = weight[start:stop], bias[start:stop]
        torch.addmm(shift, u, rows.T, out=out[:, :width])
    else:
        torch.addmm(bias[start:stop], u, weight[start:stop].T, out=out[:, : stop - start])
