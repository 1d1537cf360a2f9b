"""The K best items of every user.

    s = u O^T + o                                            [B, M], never stored whole                          (2)
    a = the K best items of s, score descending, ties to the smaller id; excluded items, -inf and NaN left out

Two ways, chosen by `filter_from`:

*Select.* The library's product, a chunk of items at a time where all would take too much memory; one program per user
selects from it (`tile.select_row`) and carries its list from chunk to chunk.

*Filter* (`linear_filter`). A product whose epilogue keeps what reaches a threshold; nothing else is stored. In a
loop it is for those alone whose list does not follow from an earlier step (`resting`).

Shapes    u [B, H], weight [M, H], bias [M]; ids [B, K] int64, scores [B, K] in the dtype of u.
Traffic   select: the scores are written once and read twice, 2 B M itemsize bytes beside the product's own.
Numerics  The order is that of the scores in the dtype of the product's buffer, exactly.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from cfsfl_fast import library
from cfsfl_fast.kernels import linear_filter
from cfsfl_fast.kernels.resting import Look, Wide, look, open_scores, skips
from cfsfl_fast.kernels.scores import LoopState, chunk_width, chunks, product
from cfsfl_fast.kernels.tile import (
    ALIGN,
    CAPACITY,
    CSR,
    EMPTY,
    MAX_K,
    covers,
    fold,
    item_of,
    leave_out,
    on_its_device,
    packed,
    round_up,
    rows_first,
    score_of,
    select_row,
    selection,
)


@triton.jit
def list_of_user(
    b,
    scores_ptr, buffer_ptr, found_ptr, run_ptr,     # [B, N], [B, CAPACITY], [B], [B, 2^K_LOG]
    open_ptr,                                       # [B]
    items_ptr, offsets_ptr,                         # excluded: [E], [B + 1]
    start, M, N, K, step,
    stride_scores,
    CARRIED: tl.constexpr, FILTERED: tl.constexpr, HAS_EXCLUDE: tl.constexpr,
    K_LOG: tl.constexpr, CHUNK_LOG: tl.constexpr, LANES: tl.constexpr, CAPACITY: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """The 2^K_LOG best keys of user b, ascending, of the list so far and this chunk; or of the filter's survivors, the
    list in `run` where the user is not open.
    """
    k = tl.arange(0, 2**K_LOG)
    if CARRIED:  # noqa: SIM108  (a constexpr: one branch is compiled)
        run = tl.load(run_ptr + b.to(tl.int64) * 2**K_LOG + k)
    else:
        run = tl.full((2**K_LOG,), EMPTY, tl.int64)
    buffer_ptr += b.to(tl.int64) * CAPACITY
    if FILTERED:
        if tl.load(open_ptr + b) != 0:
            found = tl.load(found_ptr + b)
            run = fold(run, buffer_ptr, tl.where(found < 0, CAPACITY, found), K_LOG, CHUNK_LOG)
        else:
            run = tl.load(run_ptr + b.to(tl.int64) * 2**K_LOG + k)
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
    active_ptr, open_ptr,                           # in and out [1], in [B]
    items_ptr, offsets_ptr,                         # excluded [E], [B + 1]
    start, M, N, K, step,
    stride_scores,
    LAST: tl.constexpr, OPEN: tl.constexpr,
    CARRIED: tl.constexpr, FILTERED: tl.constexpr, HAS_EXCLUDE: tl.constexpr,
    K_LOG: tl.constexpr, CHUNK_LOG: tl.constexpr, LANES: tl.constexpr, CAPACITY: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Equation (2). One program per user, or open user where OPEN; the last chunk writes the list, the others hand
    their keys on.
    """
    b = tl.program_id(0)
    if FILTERED:  # noqa: SIM102  (a constexpr)
        if b == 0:
            tl.store(active_ptr, 0)
    wanted = True
    if OPEN:
        wanted = tl.load(open_ptr + b) != 0
    if wanted:
        run = list_of_user(
            b, scores_ptr, buffer_ptr, found_ptr, run_ptr, open_ptr, items_ptr, offsets_ptr,
            start, M, N, K, step, stride_scores,
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
    seen: Look | None = None  # who is open; None: everyone

    def scratch(self) -> tuple[Tensor, ...]:
        """Of the kernels, in their order."""
        return self.scores, self.buffer, self.found, self.run

    def inputs(self) -> tuple[Tensor, ...]:
        """Of the kernels, in their order: who is open and how many they are, and the excluded rows."""
        looked = (self.found, self.found) if self.seen is None else (self.seen.active, self.seen.open)
        return *looked, *(self.exclude or (self.found, self.found))

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
    u: Tensor,
    weight: Tensor,
    bias: Tensor,
    k: int,
    exclude: CSR | None,
    state: LoopState,
    turn: tuple[Hashable, ...] | None = None,
) -> tuple[Pending, bool]:
    """Scores every item that may matter and selects from all chunks but the last, which stays in `Pending.scores`.

    Args:
        turn: what a step's answers depend on beside u, where those of users who have not moved since the step before
            need not be computed; None where everyone's are wanted.

    Returns:
        What the last kernel needs, and whether users who have not moved are left out.
    """
    M = len(weight)
    u, bias, exclude = rows_first(u), rows_first(bias), packed(exclude)
    first = turn is None or state.turn != (turn, u.shape, u.dtype)
    state.steps = 0 if first else state.steps + 1
    if turn is not None:
        state.turn = turn, u.shape, u.dtype
    buffer, found, run = scratch(state, u, k)
    if linear_filter.wanted(u, M):
        compared = turn is not None
        seen, fresh = survivors(u, rows_first(weight), bias, k, exclude, state, compared, first)
        return Pending(buffer, buffer, found, run, None, 0, M, False, True, seen=seen), compared and not fresh
    looked = None if turn is None else look(u, k, state, first=first, compared=True)
    skipped = looked is not None and not first and skips(u, state.steps)
    width = chunk_width(u, M)
    scores = state.empty("scores", (len(u), width), u.dtype, u)
    block = None
    for start, stop in chunks(M, width):
        if block is not None:
            launch(block, None, None, k)
        if skipped and looked is not None:
            open_scores(u, rows_first(weight)[start:stop], bias[start:stop], scores, looked)
        else:
            product(u, weight, bias, start, stop, scores, state)
        block = Pending(scores, buffer, found, run, exclude, start, stop - start, start > 0, seen=looked)
    assert block is not None
    return block, looked is not None and not first


def scratch(state: LoopState, u: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The kernels' buffer [B, CAPACITY], found [B] and run [B, 2^K_LOG]: one of each for a state and a length."""
    return (
        state.empty("buffer", (len(u), CAPACITY), torch.int64, u),
        state.zeros("found", (len(u),), torch.int32, u),
        state.empty("run", (len(u), 1 << selection(k)["K_LOG"]), torch.int64, u),
    )


def survivors(
    u: Tensor,
    weight: Tensor,
    bias: Tensor,
    k: int,
    exclude: CSR | None,
    state: LoopState,
    compared: bool,
    first: bool,
) -> tuple[Look, bool]:
    """Keys among which every open user's k best are, in the buffer; lists of the others who have moved, in the run.

    Candidates serve lists up to twice as long as those that they were found for.

    Returns:
        Who is open, and whether everyone is, there being no step before.
    """
    of = u.shape, u.dtype, *((t.data_ptr(), t.shape) for t in (weight, bias, *(exclude or ())))
    fresh = (compared and first) or state.wide != of or k > 2 * state.k
    if fresh:
        state.wide, state.k = of, k
        state.norm = torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32).amax()[None]
    assert state.norm is not None
    buffer, found, run = scratch(state, u, k)
    step, r = linear_filter.rank(state.k, len(weight))
    best = state.empty("sample_best", (len(u), min(r, MAX_K)), u.dtype, u)
    tau = best[:, -1]
    wide = Wide(weight, bias, tau, state.norm, buffer, found, run)
    seen = look(u, k, state, first=fresh, compared=compared, wide=wide)
    if r > MAX_K:
        best.fill_(float("-inf"))
    else:
        threshold(u, wide, step, exclude, state, best, seen)
    linear_filter.survivors(u, weight, bias, k, exclude, tau, buffer, found, seen)
    return seen, fresh


def threshold(
    u: Tensor, wide: Wide, step: int, exclude: CSR | None, state: LoopState, best: Tensor, seen: Look
) -> None:
    """Every open user's r best scores of every step-th item into best [B, r]; a few times k items of all reach the last
    of them. Their buffers are used: nobody needs what they held.
    """
    r, weight, bias = best.shape[1], wide.weight[::step], wide.bias[::step]
    scores = state.empty("sample", (len(u), round_up(len(weight), ALIGN)), u.dtype, u)
    open_scores(u, weight, bias, scores, seen)
    run = state.empty("sample_run", (len(u), 1 << selection(r)["K_LOG"]), torch.int64, u)
    ids = state.empty("sample_ids", best.shape, torch.int64, u)
    block = Pending(scores, wide.buffer, wide.found, run, exclude, 0, len(weight), False, step=step, seen=seen)
    launch(block, ids, best, r)


def launch(block: Pending, ids: Tensor | None, best: Tensor | None, k: int) -> None:
    """Selects from one chunk, into the carried keys or, where they are given, the lists."""
    out = (block.run, block.scores) if ids is None or best is None else (ids, best)
    linear_topk_fwd_kernel[(len(block.scores),)](
        *out, *block.scratch(), *block.inputs(), *block.sizes(k),
        LAST=ids is not None, OPEN=block.seen is not None and not block.filtered, **block.flags(k), num_warps=4,
        maxnreg=128,  # as in feedback_step
    )  # fmt: skip


def empty_lists(u: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Uninitialised ids and scores of lists. [B, K] twice"""
    return u.new_empty((len(u), k), dtype=torch.int64), u.new_empty((len(u), k))


@on_its_device
def linear_topk(
    u: Tensor, weight: Tensor, bias: Tensor, k: int, exclude: CSR | None = None, state: LoopState | None = None
) -> tuple[Tensor, Tensor]:
    """Equation (2): ids and scores of the K best items, excluded ones left out. [B, K] twice"""
    k = min(k, len(weight))
    if k > MAX_K or not covers(u, weight, bias):
        return library.linear_topk(u, weight, bias, k, exclude)
    ids, best = empty_lists(u, k)
    if ids.numel():
        block, _ = pending(u, weight, bias, k, exclude, state or LoopState())
        launch(block, ids, best, k)
    return ids, best
