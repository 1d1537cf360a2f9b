"""Primitives that two kernels share: exact selection of a list, and what a list does to the lookup table.

A candidate is one int64 key that orders as the specification orders a list,

    key(s, j) = ordered(s) 2^32 + (2^31 - 1 - j)          score descending, ties to the smaller id        (1)

with `ordered` the monotone map of float32 to int32 that sends -0 to 0. EMPTY is below every key.

Selection of a row of N scores, in one program:

    peak_g = max_{n = g mod LANES} s_n                    LANES independent maxima                         (2)
    tau    = the K-th largest peak                        K items reach tau, so the list does              (3)
    note n where s_n >= tau                               1.02 to 1.2 K of them, each lane its own         (4)
    run    = K largest of their keys                      bitonic network over CHUNK keys at a time        (5)

Where a lane is asked to note more than it has places for (ties, adversarial orders), (4) appends keys to a buffer,
which is folded into `run` whenever it is full; tau then rises to just above the K-th key: ids ascend, so a later tie
loses. Exact for every input. NaN fails every comparison; tau is at least the smallest finite float, so -inf fails too.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

CSR = tuple[Tensor, Tensor]

MAX_K = 256
"""Longest list that the kernels select; longer ones go through library calls."""

ALIGN = 64
"""Rows of scores start at multiples of this many elements, so that every load is 16 bytes wide."""

EMPTY = tl.constexpr(-0x8000000000000000)
LOWEST = tl.constexpr(-3.4028234663852886e38)


# Keys


@triton.jit
def ordered(s):
    """The monotone map float32 -> int32; -0 and 0 are one value."""
    bits = tl.where(s == 0, 0, s.to(tl.int32, bitcast=True))
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def disordered(bits):
    """The inverse of `ordered`."""
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def pack(s, item):
    """Key (1) of a score, float32, and an item below 2^31."""
    return (ordered(s).to(tl.int64) << 32) | (0x7FFFFFFF - item).to(tl.int64)


@triton.jit
def score_of(key):
    """The score of a key; -inf for EMPTY."""
    return tl.where(key == EMPTY, float("-inf"), disordered((key >> 32).to(tl.int32)))


@triton.jit
def item_of(key):
    """The item of a key; -1 for EMPTY. int64"""
    return tl.where(key == EMPTY, -1, 0x7FFFFFFF - (key & 0x7FFFFFFF))


# Sorting network. An element's partner along one bit of the index is the sum over an axis of 2 less itself (int64
# wraps): one shuffle on a GPU, one vector operation in the interpreter.


@triton.jit
def sort_descending(x, N_LOG: tl.constexpr):
    """Sorts x [2^N_LOG]."""
    y = tl.reshape(x, [2] * N_LOG)
    for stage in tl.static_range(1, N_LOG + 1):
        for i in tl.static_range(stage):
            right = tl.reshape(tl.arange(0, 2), [1] * (N_LOG - stage + i) + [2] + [1] * (stage - 1 - i))
            if stage < N_LOG:
                right ^= tl.reshape(tl.arange(0, 2), [1] * (N_LOG - 1 - stage) + [2] + [1] * stage)
            else:
                right ^= 1
            partner = tl.sum(y, N_LOG - stage + i, keep_dims=True) - y
            y = tl.where((y < partner) == (right != 0), partner, y)
    return tl.reshape(y, x.shape)


@triton.jit
def merge_ascending(x, N_LOG: tl.constexpr):
    """Sorts a bitonic x [2^N_LOG]."""
    y = tl.reshape(x, [2] * N_LOG)
    for i in tl.static_range(N_LOG):
        right = tl.reshape(tl.arange(0, 2), [1] * i + [2] + [1] * (N_LOG - 1 - i))
        partner = tl.sum(y, i, keep_dims=True) - y
        y = tl.where((y < partner) == (right != 0), partner, y)
    return tl.reshape(y, x.shape)


@triton.jit
def merge_keys(run, keys, K_LOG: tl.constexpr, CHUNK_LOG: tl.constexpr):
    """The 2^K_LOG largest of run (ascending) and keys [2^CHUNK_LOG] (any order), ascending."""
    ROWS: tl.constexpr = 2 ** (CHUNK_LOG - K_LOG)
    ranked = tl.reshape(sort_descending(keys, CHUNK_LOG), (ROWS, 2**K_LOG))
    first = tl.max(tl.where(tl.arange(0, ROWS)[:, None] == 0, ranked, EMPTY), 0)
    return merge_ascending(tl.maximum(run, first), K_LOG)


# Selection


@triton.jit
def worst_of(run, K, K_LOG: tl.constexpr):
    """The K-th largest key of run, EMPTY while there are fewer."""
    return tl.max(tl.where(tl.arange(0, 2**K_LOG) == 2**K_LOG - K, run, EMPTY), 0)


@triton.jit
def bar_above(worst, tau):
    """The smallest float that beats the K-th key with a later id; tau while the list is not full."""
    return tl.where(worst == EMPTY, tau, disordered((worst >> 32).to(tl.int32) + 1))


@triton.jit
def kth_peak(peak, K):
    """A lower bound of the K-th largest of peak, tight to 2^-11 of it; LOWEST where fewer than K are finite."""
    bits = tl.where(peak >= LOWEST, ordered(peak), -0x80000000)
    bound = tl.where(tl.sum((bits >= 0).to(tl.int32), 0) >= K, 0, -0x80000000)
    for i in range(19):
        trial = bound + (1 << (30 - i))
        bound = tl.where(tl.sum((bits >= trial).to(tl.int32), 0) >= K, trial, bound)
    return tl.where(bound < -0x7F800000, LOWEST, disordered(bound))


@triton.jit
def fold(run, buffer_ptr, found, K_LOG: tl.constexpr, CHUNK_LOG: tl.constexpr):
    """run and the buffer's first `found` keys, merged (5)."""
    tl.debug_barrier()
    c = tl.arange(0, 2**CHUNK_LOG)
    for c0 in range(0, found, 2**CHUNK_LOG):
        keys = tl.load(buffer_ptr + c0 + c, mask=c0 + c < found, other=EMPTY)
        run = merge_keys(run, keys, K_LOG, CHUNK_LOG)
    tl.debug_barrier()
    return run


@triton.jit
def select_row(
    run,                                     # [2^K_LOG] ascending keys so far
    row_ptr, buffer_ptr,                     # [N] scores, [CAPACITY] int64
    start, N, K,
    K_LOG: tl.constexpr, CHUNK_LOG: tl.constexpr, LANES: tl.constexpr, CAPACITY: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """(2) to (5) over the items start .. start + N - 1, N a multiple of 16; ids ascend from call to call.

    Four vectors of LANES scores are in flight at a time. A lane is a group of (2), and keeps its own few places of (4).
    """
    lane = tl.arange(0, LANES)
    peak = tl.full((LANES,), float("-inf"), tl.float32)
    for n0 in range(0, N, 4 * LANES):
        s0 = scores_at(row_ptr, n0 + lane, N)
        s1 = scores_at(row_ptr, n0 + LANES + lane, N)
        s2 = scores_at(row_ptr, n0 + 2 * LANES + lane, N)
        s3 = scores_at(row_ptr, n0 + 3 * LANES + lane, N)
        peak = tl.maximum(peak, tl.maximum(tl.maximum(s0, s1), tl.maximum(s2, s3)))
    tau = bar_above(worst_of(run, K, K_LOG), LOWEST)
    # A full list may hold +inf: then tau is NaN and nothing enters.
    tau = tl.where(tau == tau, tl.maximum(tau, kth_peak(peak, K)), tau)

    # The buffer's second half holds places, DEPTH per lane; its first half will hold keys.
    DEPTH: tl.constexpr = CAPACITY // LANES
    places_ptr = (buffer_ptr + CAPACITY // 2).to(tl.pointer_type(tl.int32), bitcast=True)
    count = tl.zeros((LANES,), tl.int32)
    for n0 in range(0, N, 4 * LANES):
        s0 = scores_at(row_ptr, n0 + lane, N)
        s1 = scores_at(row_ptr, n0 + LANES + lane, N)
        s2 = scores_at(row_ptr, n0 + 2 * LANES + lane, N)
        s3 = scores_at(row_ptr, n0 + 3 * LANES + lane, N)
        count = note_places(places_ptr, count, s0, tau, n0, LANES, DEPTH, ASM)
        count = note_places(places_ptr, count, s1, tau, n0 + LANES, LANES, DEPTH, ASM)
        count = note_places(places_ptr, count, s2, tau, n0 + 2 * LANES, LANES, DEPTH, ASM)
        count = note_places(places_ptr, count, s3, tau, n0 + 3 * LANES, LANES, DEPTH, ASM)
    tl.debug_barrier()
    found = tl.sum(count, 0)
    deepest = tl.max(count, 0)
    crowded = (deepest > DEPTH) | (found > CAPACITY // 2)
    if not crowded:
        first = 0
        for depth in range(0, deepest):
            here = (count > depth).to(tl.int32)
            n = tl.load(places_ptr + depth * LANES + lane, mask=here != 0, other=0) + lane
            s = tl.load(row_ptr + n, mask=here != 0, other=0.0).to(tl.float32)
            tl.store(buffer_ptr + first + tl.cumsum(here, 0) - 1, pack(s, start + n), mask=here != 0)
            first += tl.sum(here, 0)
    # Of a crowded row the keys are yet to be found. One loop for both: the network in `fold` is compiled once.
    found, n0 = tl.where(crowded, 0, found), tl.where(crowded, 0, N)
    turn = tl.zeros((), tl.int32)
    while (turn == 0) | (n0 < N):
        found, n0 = append_keys(buffer_ptr, found, row_ptr, n0, tau, start, N, LANES, CAPACITY // 2)
        run = fold(run, buffer_ptr, found, K_LOG, CHUNK_LOG)
        tau = bar_above(worst_of(run, K, K_LOG), tau)
        found = tl.zeros((), tl.int32)
        turn += 1
    return run


@triton.jit
def scores_at(row_ptr, n, N):
    """Scores of the places n, -inf past the end. float32"""
    return tl.load(row_ptr + n, mask=n < N, other=float("-inf")).to(tl.float32)


NOTE = tl.constexpr("""{
    .reg .pred hit, room;
    .reg .b64 at;
    setp.ge.f32 hit, $1, $2;
    setp.lt.and.s32 room, $3, $6, hit;
    mad.wide.s32 at, $3, $7, $4;
    @room st.global.b32 [at], $5;
    mov.b32 $0, $3;
    @hit add.s32 $0, $3, 1;
}""")
"""One score of `note_places`: a plain store would first move the scores to threads that suit its addresses."""


@triton.jit
def note_places(places_ptr, count, s, tau, n0, LANES: tl.constexpr, DEPTH: tl.constexpr, ASM: tl.constexpr):
    """Writes n0 into the lane of each score that reaches tau, and counts it. [LANES]"""
    at = places_ptr + tl.arange(0, LANES)
    if ASM:
        full = [tl.full((LANES,), DEPTH, tl.int32), tl.full((LANES,), 4 * LANES, tl.int32)]
        n = tl.zeros((LANES,), tl.int32) + n0
        line = tl.zeros((LANES,), tl.float32) + tau
        count = tl.inline_asm_elementwise(
            NOTE, "=r,f,f,r,l,r,r,r", [s, line, count, at.to(tl.uint64), n, full[0], full[1]],
            dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
    else:
        hit = s >= tau
        tl.store(at + count * LANES, n0, mask=hit & (count < DEPTH))
        count += hit.to(tl.int32)
    return count


@triton.jit
def append_keys(buffer_ptr, found, row_ptr, n0, tau, start, N, TILE: tl.constexpr, CAPACITY: tl.constexpr):
    """Appends the keys of the places n0 .. N - 1 whose scores reach tau, as many tiles of them as the buffer has room
    for; returns how many keys it holds then, and the first place that was left.
    """
    room = n0 < N
    while room:
        n = n0 + tl.arange(0, TILE)
        s = scores_at(row_ptr, n, N)
        hit = (s >= tau).to(tl.int32)
        hits = tl.sum(hit, 0)
        room = found + hits <= CAPACITY
        if room:
            if hits > 0:
                tl.store(buffer_ptr + found + tl.cumsum(hit, 0) - 1, pack(s, start + n), mask=hit != 0)
            found += hits
            n0 += TILE
        room = room & (n0 < N)
    return found, n0


@triton.jit
def leave_out(
    row_ptr,                                 # out [N]
    items_ptr, first, last,                  # the row's excluded items
    start, M, N, step,
    HAS_EXCLUDE: tl.constexpr, BLOCK_E: tl.constexpr, PAD: tl.constexpr,
):  # fmt: skip
    """Writes -inf over the padding M .. N - 1 and over the excluded items; column n is item start + n step."""
    nothing = float("-inf")
    pad = M + tl.arange(0, PAD)
    tl.store(row_ptr + pad, tl.full((PAD,), nothing, tl.float32).to(row_ptr.dtype.element_ty), mask=pad < N)
    if HAS_EXCLUDE:
        e = tl.arange(0, BLOCK_E)
        for e0 in range(first, last, BLOCK_E):
            item = tl.load(items_ptr + e0 + e, mask=e0 + e < last, other=-1) - start
            inside = (e0 + e < last) & (item >= 0) & (item < M * step) & (item % step == 0)
            gone = tl.full((BLOCK_E,), nothing, tl.float32).to(row_ptr.dtype.element_ty)
            tl.store(row_ptr + item // step, gone, mask=inside)
    tl.debug_barrier()


@triton.jit
def is_listed(items_ptr, first, last, item):
    """Whether each item is among items[first : last], which ascend: one binary search per lane."""
    low = tl.zeros_like(item).to(tl.int64) + first
    high = tl.zeros_like(low) + last
    left = last - first
    while left > 0:
        open_ = low < high
        middle = (low + high) // 2
        below = tl.load(items_ptr + middle, mask=open_, other=0) < item
        low = tl.where(open_ & below, middle + 1, low)
        high = tl.where(open_ & ~below, middle, high)
        left = left // 2
    return (low < last) & (tl.load(items_ptr + low, mask=low < last, other=-1) == item)


@triton.jit
def scores_of_items(u_ptr, weight_ptr, bias_ptr, m, in_m, H, stride_weight, BLOCK_H: tl.constexpr):
    """< u, weight_m > + bias_m of one user, float32 sums. [len(m)]"""
    h = tl.arange(0, BLOCK_H)
    products = tl.zeros((m.shape[0], BLOCK_H), tl.float32)
    for h0 in range(0, H, BLOCK_H):
        in_h = h0 + h < H
        x = tl.load(u_ptr + h0 + h, mask=in_h, other=0.0).to(tl.float32)
        w = row_tile(weight_ptr + h0, m, stride_weight, h, in_m[:, None] & in_h[None, :])
        products += w * x[None, :]
    return tl.sum(products, 1) + tl.load(bias_ptr + m, mask=in_m, other=0.0).to(tl.float32)


# Lists


@triton.jit
def product_of_tile(
    u_rows, w_rows, in_b, in_m, H,
    PREC: tl.constexpr, BLOCK_U: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """sum_h u[b, h] weight[m, h] of a tile, from the places of its first columns: u_rows [BLOCK_U, BLOCK_H], w_rows
    [BLOCK_H, BLOCK_M]. [BLOCK_U, BLOCK_M]
    """
    h = tl.arange(0, BLOCK_H)
    s = tl.zeros((BLOCK_U, BLOCK_M), tl.float32)
    for h0 in tl.range(0, H, BLOCK_H, num_stages=3):
        in_h = h0 + h < H
        x = tl.load(u_rows + h0, mask=in_b[:, None] & in_h[None, :], other=0.0)
        w = tl.load(w_rows + h0, mask=in_h[:, None] & in_m[None, :], other=0.0)
        s = tl.dot(x, w, s, input_precision=PREC)
    return s


@triton.jit
def weights_of_list(item, s, K, UNIFORM: tl.constexpr):
    """w_k of h(x, a): 1/K, or the softmax of the listed scores; 0 where the list has ended (item -1)."""
    listed = item >= 0
    if UNIFORM:
        w = listed.to(tl.float32)
    else:
        best = tl.max(tl.where(listed, s, float("-inf")), 0)
        w = tl.where(listed, tl.exp(s - tl.where(best == float("-inf"), 0.0, best)), 0.0)
    total = tl.sum(w, 0)
    return w / tl.where(total == 0, 1.0, total)


@triton.jit
def add_listed_rows(
    h, lookup_ptr, ids_ptr, w_ptr, K, d, D, stride_lookup, BLOCK_K: tl.constexpr
):  # fmt: skip
    """h [BLOCK_D] + sum_k w_k lookup[ids_k], BLOCK_K rows in flight."""
    k = tl.arange(0, BLOCK_K)
    total = tl.zeros((BLOCK_K, d.shape[0]), tl.float32)
    for k0 in range(0, K, BLOCK_K):
        item = tl.load(ids_ptr + k0 + k, mask=k0 + k < K, other=-1)
        w = tl.load(w_ptr + k0 + k, mask=k0 + k < K, other=0.0).to(tl.float32)
        rows = row_tile(lookup_ptr, item, stride_lookup, d, (item >= 0)[:, None] & (d < D)[None, :])
        total += rows * w[:, None]
    return h + tl.sum(total, 0)


@triton.jit
def row_tile(table_ptr, rows, stride, d, mask):
    """Rows of a table, float32. [len(rows), len(d)]"""
    at = rows.to(tl.int64)[:, None] * stride + d[None, :]
    return tl.load(table_ptr + at, mask=mask, other=0.0).to(tl.float32)


# Launchers' helpers


def selection(k: int) -> dict[str, Any]:
    """The constexprs of `select_row` for lists of k."""
    k_log = max(4, (k - 1).bit_length())
    return {
        "K_LOG": k_log,
        "CHUNK_LOG": max(7, k_log + 1),
        "LANES": 1024,
        "CAPACITY": CAPACITY,
        "ASM": not interpreted(),
    }


CAPACITY = 4096
"""Keys that a row's buffer holds; half of it at least LANES."""


def covers(*tensors: Tensor) -> bool:
    """Whether the kernels compute with tensors of these dtypes; float64 is left to library calls."""
    return all(t.dtype in (torch.float32, torch.float16, torch.bfloat16) for t in tensors)


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels: it has no inline assembly."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def round_up(n: int, multiple: int) -> int:
    """The smallest multiple that is not below n."""
    return -(-n // multiple) * multiple


def power_of_two(n: int, least: int = 16) -> int:
    """The smallest power of two that is below neither n nor least."""
    return max(least, 1 << max(0, n - 1).bit_length())


def dot_precision(dtype: torch.dtype) -> str:
    """How `tl.dot` multiplies float32: as PyTorch is told to, and in tf32 beside scores that are halves."""
    exact = dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"
    return "ieee" if exact else "tf32"


def vector(*sizes: int) -> int:
    """The largest power of two up to 8 that divides every size and stride.

    Triton tells by itself only what 16 divides. A kernel that is told VEC says `D = D // VEC * VEC`, which changes
    nothing and lets the compiler see whole vectors: rows of 600 are read 16 bytes at a time.
    """
    return math.gcd(8, *sizes)


def rows_first(x: Tensor) -> Tensor:
    """x with unit stride along its last axis."""
    return x if x.stride(-1) == 1 else x.contiguous()


def packed(rows: CSR | None) -> CSR | None:
    """CSR rows with unit strides."""
    return rows and (rows_first(rows[0]), rows_first(rows[1]))


Launcher = TypeVar("Launcher", bound=Callable[..., Any])


def on_its_device(launcher: Launcher) -> Launcher:
    """Makes the device of a launcher's first tensor the current one while it runs: Triton launches there, wherever the
    tensors are.
    """

    @functools.wraps(launcher)
    def launch(first: Tensor, *rest: Any, **more: Any) -> Any:
        if first.device.type != "cuda" or first.device.index == torch.cuda.current_device():
            return launcher(first, *rest, **more)
        with torch.cuda.device(first.device):
            return launcher(first, *rest, **more)

    return launch  # type: ignore[return-value]


def capability(device: torch.device) -> int:
    """80, 90, 100 ... of a CUDA device; 0 in the interpreter."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def tuned(name: str, table: dict[int, int], device: torch.device) -> int:
    """A size from a table by compute capability (the nearest from below), or the environment variable of that name."""
    asked = os.environ.get(name)
    if asked:
        try:
            return int(asked)
        except ValueError:
            raise ValueError(f"{name} must be a whole number; got {asked!r}") from None
    cc: Any = capability(device)
    return table[max((known for known in table if known <= cc), default=min(table))]
