"""The K best items of every user.

    s = u O^T + o                                            [B, M], never stored whole                          (2)
    a = the K best items of s, score descending, ties to the smaller id; excluded items, -inf and NaN left out

Two ways, chosen by `filter_from`:

*Select.* The library's product, a chunk of items at a time, into a buffer that stays in the second-level cache; one
program per user selects from it (`tile.select_row`) and carries its list from chunk to chunk.

*Filter* (`linear_filter`). A product whose epilogue keeps what reaches a threshold; nothing else is stored.

Shapes    u [B, H], weight [M, H], bias [M]; ids [B, K] int64, scores [B, K] in the dtype of u.
Traffic   select: the scores are written once and read twice from cache, 2 B M itemsize bytes beside the product's own.
Numerics  The order is that of the scores in the dtype of the product's buffer, exactly.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from cfsfl_fast import library
from cfsfl_fast.kernels import linear_filter
from cfsfl_fast.kernels.scores import LoopState, chunk_width, chunks, product
from cfsfl_fast.kernels.tile import (
    ALIGN,
    CAPACITY,
    EMPTY,
    MAX_K,
    fold,
    item_of,
    leave_out,
    rows_first,
    score_of,
    select_row,
    selection,
)

CSR = tuple[Tensor, Tensor]


@triton.jit
def list_of_user(
    b,
    scores_ptr, buffer_ptr, found_ptr, run_ptr,     # [B, N], [B, CAPACITY], [B], [B, 2^K_LOG]
    items_ptr, offsets_ptr,                         # excluded: [E], [B + 1]
    start, M, N, K, step,
    stride_scores,
    CARRIED: tl.constexpr, FILTERED: tl.constexpr, HAS_EXCLUDE: tl.constexpr,
    K_LOG: tl.constexpr, CHUNK_LOG: tl.constexpr, LANES: tl.constexpr, CAPACITY: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """The 2^K_LOG best keys of user b, ascending, of the list so far and this chunk (or the filter's survivors)."""
    k = tl.arange(0, 2**K_LOG)
    if CARRIED:  # noqa: SIM108  (a constexpr: one branch is compiled)
        run = tl.load(run_ptr + b.to(tl.int64) * 2**K_LOG + k)
    else:
        run = tl.full((2**K_LOG,), EMPTY, tl.int64)
    buffer_ptr += b.to(tl.int64) * CAPACITY
    if FILTERED:
        found = tl.load(found_ptr + b)
        tl.debug_barrier()  # every thread has read the count
        tl.store(found_ptr + b, 0)
        run = fold(run, buffer_ptr, tl.where(found < 0, CAPACITY, found), K_LOG, CHUNK_LOG)
    else:
        row_ptr = scores_ptr + b.to(tl.int64) * stride_scores
        first = tl.load(offsets_ptr + b) if HAS_EXCLUDE else 0
        last = tl.load(offsets_ptr + b + 1) if HAS_EXCLUDE else 0
        leave_out(row_ptr, items_ptr, first, last, start, M, N, step, HAS_EXCLUDE, 128, 64)
        run = select_row(run, row_ptr, buffer_ptr, start, N, K, K_LOG, CHUNK_LOG, LANES, CAPACITY, ASM)
    return run


@triton.jit
def store_list(ids_ptr, best_ptr, run, K, K_LOG: tl.constexpr):
    """Writes a row of ids and scores, best first, from ascending keys; returns both, and their places."""
    k = 2**K_LOG - 1 - tl.arange(0, 2**K_LOG)
    item = tl.where(k < K, item_of(run), -1)
    s = tl.where(k < K, score_of(run), float("-inf"))
    tl.store(ids_ptr + k, item, mask=k < K)
    tl.store(best_ptr + k, s.to(best_ptr.dtype.element_ty), mask=k < K)
    return item, s, k


@triton.jit
def linear_topk_fwd_kernel(
    ids_ptr, best_ptr,                              # out [B, K], [B, K]
    scores_ptr, buffer_ptr, found_ptr, run_ptr,     # scratch [B, N], [B, CAPACITY], [B], [B, 2^K_LOG]
    items_ptr, offsets_ptr,                         # in: excluded [E], [B + 1]
    start, M, N, K, step,
    stride_scores,
    LAST: tl.constexpr, CARRIED: tl.constexpr, FILTERED: tl.constexpr, HAS_EXCLUDE: tl.constexpr,
    K_LOG: tl.constexpr, CHUNK_LOG: tl.constexpr, LANES: tl.constexpr, CAPACITY: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Equation (2). One program per user; the last chunk writes the list, the others hand their keys on."""
    b = tl.program_id(0)
    run = list_of_user(
        b, scores_ptr, buffer_ptr, found_ptr, run_ptr, items_ptr, offsets_ptr, start, M, N, K, step, stride_scores,
        CARRIED, FILTERED, HAS_EXCLUDE, K_LOG, CHUNK_LOG, LANES, CAPACITY, ASM,
    )  # fmt: skip
    if LAST:
        store_list(ids_ptr + b.to(tl.int64) * K, best_ptr + b.to(tl.int64) * K, run, K, K_LOG)
    else:
        tl.store(run_ptr + b.to(tl.int64) * 2**K_LOG + tl.arange(0, 2**K_LOG), run)


# Launchers


class Pending(NamedTuple):
    """Every chunk but the last is selected; what a kernel needs to finish the lists."""

    scores: Tensor  # [B, width]
    buffer: Tensor  # [B, CAPACITY] int64
    found: Tensor  # [B] int32
    run: Tensor  # [B, 2^K_LOG] int64
    exclude: CSR | None
    start: int
    n_columns: int
    carried: bool
    filtered: bool = False
    step: int = 1  # column n is item start + n step

    def arguments(self) -> tuple[object, ...]:
        """Scratch and inputs in the kernels' order."""
        items, offsets = self.exclude or (self.found, self.found)
        return self.scores, self.buffer, self.found, self.run, items, offsets

    def sizes(self, k: int) -> tuple[int, ...]:
        """start, M, N, K, step and the stride of the scores."""
        n = -(-self.n_columns // ALIGN) * ALIGN
        return self.start, self.n_columns, n, k, self.step, self.scores.stride(0)

    def flags(self, k: int) -> dict[str, object]:
        """The kernels' constexprs."""
        return {
            "CARRIED": self.carried,
            "FILTERED": self.filtered,
            "HAS_EXCLUDE": self.exclude is not None,
            **selection(k),
        }


def pending(
    u: Tensor, weight: Tensor, bias: Tensor, k: int, exclude: CSR | None, state: LoopState, scores: Tensor | None = None
) -> Pending:
    """Scores every item and selects from all chunks but the last, which stays in `Pending.scores`.

    Args:
        scores: the whole catalogue's scores [B, width], where they are known.
    """
    B, M = len(u), len(weight)
    run = state.empty("run", (B, 1 << selection(k)["K_LOG"]), torch.int64, u)
    buffer = state.empty("buffer", (B, CAPACITY), torch.int64, u)
    found = state.zeros("found", (B,), torch.int32, u)
    if scores is not None:
        return Pending(scores, buffer, found, run, exclude, 0, M, False)
    if linear_filter.wanted(u, M):
        tau = threshold(u, weight, bias, k, exclude, state)
        linear_filter.survivors(u, rows_first(weight), bias, k, exclude, tau, buffer, found)
        return Pending(buffer, buffer, found, run, None, 0, M, False, True)
    width = chunk_width(u, M)
    scores = state.empty("scores", (B, width), u.dtype, u)
    block = None
    for start, stop in chunks(M, width):
        if block is not None:
            launch(block, None, None, k)
        product(u, weight, bias, start, stop, scores, state)
        block = Pending(scores, buffer, found, run, exclude, start, stop - start, start > 0)
    assert block is not None
    return block


def threshold(u: Tensor, weight: Tensor, bias: Tensor, k: int, exclude: CSR | None, state: LoopState) -> Tensor:
    """A score for every user that a few times k items reach. [B] float32

    From the third call of a loop on the code has all but stopped moving, and the last threshold serves again.
    """
    if state.calls >= 2 and state.tau is not None and state.k == k and len(state.tau) == len(u):
        return state.tau
    step, r = linear_filter.rank(k, len(weight))
    if r > MAX_K:
        return u.new_full((len(u),), float("-inf"), dtype=torch.float32)
    rows, shift = weight[::step], bias[::step]
    width = -(-len(rows) // ALIGN) * ALIGN
    scores = state.empty("sample", (len(u), width), u.dtype, u)
    product(u, rows, shift, 0, len(rows), scores, None)
    run = state.empty("sample_run", (len(u), 1 << selection(r)["K_LOG"]), torch.int64, u)
    buffer = state.empty("buffer", (len(u), CAPACITY), torch.int64, u)
    found = state.zeros("found", (len(u),), torch.int32, u)
    ids, best = empty_lists(u, r)
    launch(Pending(scores, buffer, found, run, exclude, 0, len(rows), False, step=step), ids, best, r)
    state.calls, state.k = (state.calls + 1 if state.k == k else 1), k
    state.tau = best[:, -1].float()
    return state.tau


def launch(block: Pending, ids: Tensor | None, best: Tensor | None, k: int) -> None:
    """Selects from one chunk, into the carried keys or, where they are given, the lists."""
    out = (block.run, block.scores) if ids is None or best is None else (ids, best)
    linear_topk_fwd_kernel[(len(block.scores),)](
        *out, *block.arguments(), *block.sizes(k), LAST=ids is not None, **block.flags(k), num_warps=4,
        maxnreg=128,  # as in feedback_step
    )  # fmt: skip


def empty_lists(u: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Uninitialised ids and scores of lists. [B, K] twice"""
    return u.new_empty((len(u), k), dtype=torch.int64), u.new_empty((len(u), k))


def linear_topk(
    u: Tensor, weight: Tensor, bias: Tensor, k: int, exclude: CSR | None = None, state: LoopState | None = None
) -> tuple[Tensor, Tensor]:
    """Equation (2): ids and scores of the K best items, excluded ones left out. [B, K] twice"""
    k = min(k, len(weight))
    if k > MAX_K:
        return library.linear_topk(u, weight, bias, k, exclude)
    ids, best = empty_lists(u, k)
    if ids.numel():
        launch(pending(rows_first(u), weight, bias, k, exclude, state or LoopState()), ids, best, k)
    return ids, best
