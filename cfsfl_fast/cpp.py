"""The operations by the C++ kernels of `csrc/`: backend "cpp".

Thin: checks, addresses and outputs. What the kernels do not cover (other dtypes than float32) goes to `library`, rows
checked too: torch reads and writes where offsets say.

Threads   as many as torch uses (`torch.set_num_threads`), in torch's own OpenMP pool.
Numerics  a score is one fixed order of float32 operations, so lists, losses and feedback have the same bits in any
          batch, on any number of threads and with any instruction set.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch  # before the extension: torch's OpenMP library then serves both
from torch import Tensor

from cfsfl_fast import _cpp, library

CSR = tuple[Tensor, Tensor]
Layers = Sequence[tuple[Tensor, Tensor]]

KEEP_SCORES = 1 << 26
"""Scores [B, M] that a loss keeps for its backward pass: 256 MB. More are computed again, CHUNK items at a time."""

CHUNK = 4096


def _covers(*tensors: Tensor | None) -> bool:
    return all(t is None or t.dtype == torch.float32 for t in tensors)


def _threads() -> int:
    return torch.get_num_threads()


def _excluded(exclude: CSR | None, n_users: int, n_items: int) -> tuple[CSR | None, tuple[int, int]]:
    """The excluded rows, contiguous and checked, and their addresses."""
    if exclude is None:
        return None, (0, 0)
    items, offsets = _checked(*exclude, n_users, n_items, ascending=True)
    return (items, offsets), (items.data_ptr(), offsets.data_ptr())


def _checked(
    items: Tensor, offsets: Tensor, n_rows: int | None, n_items: int, ascending: bool = False
) -> tuple[Tensor, Tensor]:
    """CSR rows that are safe to walk: contiguous, in range, and ascending where asked."""
    for name, ids in (("items", items), ("offsets", offsets)):
        if ids.dtype != torch.int64 or ids.ndim != 1 or ids.device.type != "cpu":
            raise ValueError(f"{name} of CSR rows must be a vector of int64; got {_described(ids)}")
    if len(offsets) == 0 or (n_rows is not None and len(offsets) != n_rows + 1):
        raise ValueError(f"{n_rows} users need {(n_rows or 0) + 1} offsets; got {len(offsets)}")
    items, offsets = items.contiguous(), offsets.contiguous()
    _cpp.check_rows(items.data_ptr(), offsets.data_ptr(), len(offsets) - 1, len(items), n_items, ascending, _threads())
    return items, offsets


def _fitting(u: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The factors of the scores, checked against each other and contiguous."""
    if u.ndim != 2 or weight.ndim != 2 or u.shape[1] != weight.shape[1] or bias.shape != weight.shape[:1]:
        raise ValueError(
            f"u [B, H], weight [M, H] and bias [M] do not fit: {(*u.shape,)}, {(*weight.shape,)}, {(*bias.shape,)}"
        )
    return _held("u", u, *u.shape), _held("weight", weight, *weight.shape), _held("bias", bias, *bias.shape)


def _held(name: str, t: Tensor, *shape: int) -> Tensor:
    """A tensor whose memory the kernels may walk: of this shape, float32, on the CPU, contiguous."""
    if t.shape != shape or t.dtype != torch.float32 or t.device.type != "cpu" or t.layout != torch.strided:
        raise ValueError(f"{name} must be float32 of shape {shape}; got {_described(t)}")
    return t.contiguous()


def _listed(ids: Tensor, n_users: int, n_items: int) -> Tensor:
    """Lists of item ids [B, K], -1 where one ends, in range and contiguous."""
    if ids.ndim != 2 or len(ids) != n_users or ids.dtype != torch.int64 or ids.device.type != "cpu":
        raise ValueError(f"ids must be int64 of shape [{n_users}, K]; got {_described(ids)}")
    if ids.numel():
        least, most = (int(end) for end in ids.aminmax())
        if least < -1 or most >= n_items:
            raise ValueError(f"listed ids must lie in -1..{n_items - 1}; got {least if least < -1 else most}")
    return ids.contiguous()


def _described(t: Tensor) -> str:
    return f"{t.dtype} of shape {(*t.shape,)} on {t.device}"


@contextlib.contextmanager
def flush_denormals() -> Iterator[None]:
    """Results below the normal range are 0 inside, in every thread of the pool."""
    threads = _threads()
    old = _cpp.flush_denormals(True, threads)
    try:
        yield
    finally:
        _cpp.flush_denormals(old, threads)


def row_bag(table: Tensor, items: Tensor, offsets: Tensor, weights: Tensor | None = None) -> Tensor:
    """sum_{e in row b} weights_e table[items_e]. [B, D]"""
    if table.ndim != 2:
        raise ValueError(f"a table is [M, D]; got {_described(table)}")
    items, offsets = _checked(items, offsets, None, len(table))
    if not _covers(table, weights):
        return library.row_bag(table, items, offsets, weights)
    table = _held("table", table, *table.shape)
    weights = None if weights is None else _held("weights", weights, len(items))
    B, (M, D) = len(offsets) - 1, table.shape
    out = table.new_empty(B, D)
    _cpp.row_bag(
        out.data_ptr(), table.data_ptr(), items.data_ptr(), offsets.data_ptr(), _address(weights), B, D, M, _threads()
    )
    return out


def row_bag_backward(dout: Tensor, items: Tensor, offsets: Tensor, weights: Tensor | None, n_items: int) -> Tensor:
    """The gradient of `row_bag` for its table [M, D]; sums in entry order, the same bits on every run."""
    if dout.ndim != 2:
        raise ValueError(f"dout is [B, D]; got {_described(dout)}")
    items, offsets = _checked(items, offsets, len(dout), n_items)
    if not _covers(dout, weights):
        return library.row_bag_backward(dout, items, offsets, weights, n_items)
    dout = _held("dout", dout, *dout.shape)
    weights = None if weights is None else _held("weights", weights, len(items))
    B, D = dout.shape
    dtable = dout.new_empty(n_items, D)
    _cpp.row_bag_backward(
        dtable.data_ptr(), dout.data_ptr(), items.data_ptr(), offsets.data_ptr(), _address(weights), B, D, n_items,
        _threads(),
    )  # fmt: skip
    return dtable


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def row_dot(x: Tensor, table: Tensor, ids: Tensor) -> Tensor:
    """< x_b, table[ids_bk] >; padding ids (-1) give 0. [B, K]"""
    if not _covers(x, table):
        return library.row_dot(x, table, ids)
    if x.ndim != 2 or table.ndim != 2:
        raise ValueError(f"x is [B, D], the table [M, D]; got {_described(x)}, {_described(table)}")
    (B, D), M = x.shape, len(table)
    x, table, ids = _held("x", x, B, D), _held("table", table, M, D), _listed(ids, B, M)
    K = ids.shape[1]
    out = x.new_empty(B, K)
    _cpp.row_dot(out.data_ptr(), x.data_ptr(), table.data_ptr(), ids.data_ptr(), B, K, D, _threads())
    return out


def loop_state() -> _cpp.LoopState:
    """What one pass over the loop remembers from step to step: lists, candidates and bounds of every user."""
    return _cpp.LoopState()


def linear_topk(
    u: Tensor, weight: Tensor, bias: Tensor, k: int, exclude: CSR | None = None, state: _cpp.LoopState | None = None
) -> tuple[Tensor, Tensor]:
    """Equation (2): ids and scores of the K best items, excluded ones left out. [B, K] twice"""
    exclude, rows = _excluded(exclude, len(u), len(weight))
    if not _covers(u, weight, bias):
        return library.linear_topk(u, weight, bias, k, exclude)
    u, weight, bias = _fitting(u, weight, bias)
    (B, H), M = u.shape, len(weight)
    k = min(k, M)
    ids, scores = torch.empty(B, k, dtype=torch.int64), u.new_empty(B, k)
    _cpp.linear_topk(
        ids.data_ptr(), scores.data_ptr(), k, u.data_ptr(), weight.data_ptr(), bias.data_ptr(), B, M, H, *rows, state,
        _threads(),
    )  # fmt: skip
    return ids, scores


def linear_nll(
    u: Tensor,
    weight: Tensor,
    bias: Tensor,
    items: Tensor,
    offsets: Tensor,
    exclude: CSR | None,
    k: int,
    state: _cpp.LoopState | None = None,
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor], Tensor | None]:
    """The multinomial loss of every user [B], its logsumexp [B], the list of the K best, and what backward uses again.

    The last is the scores [B, M], or None where they are too many to keep.
    """
    items, offsets = _checked(items, offsets, len(u), len(weight))
    exclude, rows = _excluded(exclude, len(u), len(weight))
    if not _covers(u, weight, bias):
        return library.linear_nll(u, weight, bias, items, offsets, exclude, k)
    u, weight, bias = _fitting(u, weight, bias)
    (B, H), M = u.shape, len(weight)
    k = min(k, M)
    nll, lse = u.new_empty(B), u.new_empty(B)
    ids, scores = torch.empty(B, k, dtype=torch.int64), u.new_empty(B, k)
    kept = library.scratch.take(B, M, u) if B * M <= KEEP_SCORES else None
    _cpp.linear_nll(
        nll.data_ptr(), lse.data_ptr(), ids.data_ptr(), scores.data_ptr(), k, _address(kept), u.data_ptr(),
        weight.data_ptr(), bias.data_ptr(), B, M, H, items.data_ptr(), offsets.data_ptr(), *rows, _threads(),
    )  # fmt: skip
    return nll, lse, (ids, scores), kept


def linear_nll_backward(
    dnll: Tensor,
    u: Tensor,
    weight: Tensor,
    bias: Tensor,
    items: Tensor,
    offsets: Tensor,
    exclude: CSR | None,
    lse: Tensor,
    kept: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of u [B, H], weight [M, H] and bias [M]: ds = dnll (|x| softmax(s) - x) here, library products."""
    items, offsets = _checked(items, offsets, len(u), len(weight))
    exclude, rows = _excluded(exclude, len(u), len(weight))
    if not _covers(u, weight, bias, dnll):
        return library.linear_nll_backward(dnll, u, weight, bias, items, offsets, exclude, lse, kept)
    u, weight, bias = _fitting(u, weight, bias)
    (B, H), M = u.shape, len(weight)
    dnll, lse = _held("dnll", dnll, B), _held("lse", lse, B)
    kept = None if kept is None else _held("kept", kept, B, M)
    du = torch.zeros_like(u)
    dweight, dbias = torch.empty_like(weight), torch.empty_like(bias)
    width = M if kept is not None else min(M, CHUNK)
    ds = kept if kept is not None else library.scratch.take(B, width, u)
    with flush_denormals():
        for first in range(0, M, max(width, 1)):
            last = min(first + width, M)
            _cpp.linear_nll_backward(
                ds.data_ptr(), width, dbias.data_ptr(), dnll.data_ptr(), lse.data_ptr(), _address(kept), first, last,
                u.data_ptr(), weight.data_ptr(), bias.data_ptr(), B, M, H, items.data_ptr(), offsets.data_ptr(), *rows,
                _threads(),
            )  # fmt: skip
            columns = ds[:, : last - first]
            du.addmm_(columns, weight[first:last])
            torch.mm(columns.T, u, out=dweight[first:last])
    library.scratch.give(ds)
    return du, dweight, dbias


def fuse(hx: Tensor, lookup: Tensor, ids: Tensor, scores: Tensor, action: str) -> tuple[Tensor, Tensor]:
    """Equation (16): h = hx + sum_k w_k lookup[ids_k] [B, D], and the weights w [B, K]."""
    if not _covers(hx, lookup, scores):
        return library.fuse(hx, lookup, ids, scores, action)
    if hx.ndim != 2 or lookup.ndim != 2:
        raise ValueError(f"hx is [B, D], the table [M, D]; got {_described(hx)}, {_described(lookup)}")
    (B, D), M = hx.shape, len(lookup)
    hx, lookup, ids = _held("hx", hx, B, D), _held("lookup", lookup, M, D), _listed(ids, B, M)
    K = ids.shape[1]
    scores = _held("scores", scores, B, K)
    h, w = hx.new_empty(B, D), hx.new_empty(B, K)
    _cpp.fuse(
        h.data_ptr(), w.data_ptr(), hx.data_ptr(), lookup.data_ptr(), ids.data_ptr(), scores.data_ptr(),
        action == "topk_softmax", B, K, D, _threads(),
    )  # fmt: skip
    return h, w


def respond(h: Tensor, reward: Layers, feedback: Layers) -> tuple[Tensor, Tensor]:
    """Equations (3) and (4): the reward's logit [B] and the feedback v [B, V]."""
    if not _covers(h, *(t for layer in (*reward, *feedback) for t in layer)):
        return library.respond(h, reward, feedback)
    if h.ndim != 2 or not reward or not feedback:
        raise ValueError(
            f"h is [B, D], with a layer at least; got {_described(h)}, {len(reward)}, {len(feedback)} layers"
        )
    B, D = h.shape
    h = _held("h", h, B, D)
    held = [[(w.contiguous(), b.contiguous()) for w, b in layers] for layers in (reward, feedback)]
    for layers, width in zip(held, (D, D + 1), strict=True):
        for w, b in layers:
            if w.ndim != 2 or w.shape[1] != width or b.shape != w.shape[:1]:
                raise ValueError(f"a layer takes {width} inputs; got weight {(*w.shape,)}, bias {(*b.shape,)}")
            width = len(w)
    logit, v = h.new_empty(B), h.new_empty(B, len(held[1][-1][0]))
    first, second = ([(w.data_ptr(), b.data_ptr(), *w.shape) for w, b in layers] for layers in held)
    _cpp.respond(v.data_ptr(), logit.data_ptr(), h.data_ptr(), first, second, B, D, _threads())
    return logit, v


def feedback_step(
    u: Tensor,
    weight: Tensor,
    bias: Tensor,
    hx: Tensor,
    lookup: Tensor,
    reward: Layers,
    feedback: Layers,
    hoisted: Tensor,
    wv: Tensor,
    k: int,
    action: str,
    exclude: CSR | None = None,
    state: _cpp.LoopState | None = None,
) -> tuple[Tensor, ...]:
    """v [B, V], the reward's logit [B], ids, scores [B, K], hoisted + v^ Wv [B, P], h [B, D], list weights [B, K]."""
    ids, scores = linear_topk(u, weight, bias, k, exclude, state)
    h, w = fuse(hx, lookup, ids, scores, action)
    logit, v = respond(h, reward, feedback)
    return v, logit, ids, scores, library.follow(v, hoisted, wv), h, w


def slim(gram: Tensor, first: int, last: int, l1: float, l2: float) -> tuple[Tensor, int]:
    """Weights of the items first..last on all others [last - first, M], and how many of them did not converge."""
    if not _covers(gram):
        return library.slim(gram, first, last, l1, l2)
    gram = gram.contiguous()
    M = len(gram)
    if gram.shape != (M, M) or not 0 <= first <= last <= M:
        raise ValueError(f"columns {first} to {last} of a Gram matrix of shape {(*gram.shape,)}")
    columns = gram.new_empty(last - first, M)
    rest = library.SLIM_TOLERANCE, library.SLIM_PASSES, _threads()
    return columns, _cpp.slim(columns.data_ptr(), gram.data_ptr(), M, first, last, l1, l2, *rest)
