"""The four operations by library calls alone, with hand-written gradients: backend "torch".

What runs where no kernel of ours can, on any device that PyTorch knows. Shapes and the meaning of a list: `reference`.

Traffic   One [B, chunk] block of scores at a time, in a buffer that is used again: fresh pages cost a CPU 15-20 %
          (`benches/bench_loop.py`). Gradients of looked-up rows are sorted by item once and summed in item order:
          no atomics, the same bits on every run.
Room      Entries behind offsets[-1] belong to no row and hold an item id of M. They meet in a row that is cut off:
          cutting them off first would wait for the device.
Numerics  Products in the dtype of u. Scores narrower than float32 are widened, and everything after is float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

CSR = tuple[Tensor, Tensor]
Layers = Sequence[tuple[Tensor, Tensor]]

CHUNK_SCORES = 1 << 26
"""Scores [B, chunk] that are held at once: 256 MB in float32. Catalogues that fit are scored in one product."""


class _Scratch:
    """Buffers that are handed out and taken back, so that their pages are touched once."""

    def __init__(self) -> None:
        self.free: list[Tensor] = []

    def take(self, rows: int, columns: int, like: Tensor) -> Tensor:
        """An uninitialised matrix [rows, columns] of like's dtype and device."""
        size = rows * columns
        if not _pooled(like):
            return like.new_empty(rows, columns)
        for i, buffer in enumerate(self.free):
            if buffer.dtype == like.dtype and buffer.device == like.device and buffer.numel() >= size:
                del self.free[i]
                return buffer[:size].view(rows, columns)
        return torch.empty(size, dtype=like.dtype, device=like.device).view(rows, columns)

    def give(self, block: Tensor) -> None:
        """Takes a block back; nobody may use it afterwards."""
        if not _pooled(block):
            return
        self.free = [torch.empty(0, dtype=block.dtype, device=block.device).set_(block.untyped_storage()), *self.free][
            :2
        ]


def _pooled(t: Tensor) -> bool:
    """Not on a CUDA device, whose allocator keeps pages, and where memory of a captured graph must not get out of it;
    nor what a trace computes with.
    """
    return not t.is_cuda and type(t) in (Tensor, torch.nn.Parameter)


scratch = _Scratch()


def ended(offsets: Tensor, n_entries: int) -> Tensor:
    """Offsets with one more row, which owns the room. [B + 2]"""
    return torch.cat([offsets, offsets.new_full((1,), n_entries)])


def rows_of(offsets: Tensor, n_entries: int) -> Tensor:
    """The row of every CSR entry, B behind the last. [E]"""
    rows = torch.arange(offsets.shape[0], device=offsets.device)
    return torch.repeat_interleave(rows, ended(offsets, n_entries).diff(), output_size=n_entries)


def without_room(items: Tensor, offsets: Tensor) -> CSR:
    """The same CSR rows without entries behind the last, on a CPU; elsewhere that would wait for the device.

    Raises:
        ValueError: offsets do not ascend from 0 to at most E; torch reads and writes where they say. Seen on a CPU.
    """
    if items.is_cuda or len(offsets) == 0:
        return items, offsets
    first, last = int(offsets[0]), int(offsets[-1])
    if first != 0 or last > len(items) or bool((offsets[1:] < offsets[:-1]).any()):
        raise ValueError(f"offsets must ascend from 0 to at most {len(items)}; got {offsets[:8].tolist()} ...")
    return items[:last], offsets


def widened(table: Tensor, items: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The rows of a narrow table that are looked up, in float32: their ids [n], the rows [n, D], and every item's place
    among them.
    """
    ids = items.clamp_max(len(table) - 1)
    if torch.compiler.is_compiling():  # a graph does not know how many are different
        places = torch.arange(len(items), device=items.device)
    else:
        ids, places = ids.unique(return_inverse=True)
    return ids, table[ids].float(), places


def row_bag(table: Tensor, items: Tensor, offsets: Tensor, weights: Tensor | None = None) -> Tensor:
    """sum_{e in row b} weights_e table[items_e]. [B, D]"""
    ends = ended(offsets, len(items))
    ids, weights = items.clamp_max(len(table) - 1), None if weights is None else weights.to(table.dtype)
    bags = F.embedding_bag(ids, table, ends, mode="sum", per_sample_weights=weights, include_last_offset=True)
    return bags[:-1]


def row_bag_backward(dout: Tensor, items: Tensor, offsets: Tensor, weights: Tensor | None, n_items: int) -> Tensor:
    """The gradient of `row_bag` for its table [M, D]: the bag of the transposed matrix."""
    order = items.argsort(stable=True)
    rows = rows_of(offsets, len(items))[order]
    counts = items.new_zeros(n_items + 1).index_add_(0, items, torch.ones_like(items))  # bincount waits for a device
    item_offsets = F.pad(counts[:n_items].cumsum(0), (1, 0))
    return row_bag(dout, rows, item_offsets, None if weights is None else weights[order])


def row_dot(x: Tensor, table: Tensor, ids: Tensor) -> Tensor:
    """< x_b, table[ids_bk] >; padding ids (-1) give 0. [B, K]"""
    dots = torch.bmm(table[ids.clamp_min(0)], x[:, :, None]).squeeze(2)
    return dots.masked_fill_(ids < 0, 0)


def exact_topk(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The list of each row of scores [B, M]: ids [B, K], scores [B, K]. Ties to the smaller id, NaN never."""
    if scores.device.type != "cpu":
        return keyed_topk(scores, k)
    k = min(k, scores.shape[1])
    if k == 0 or len(scores) == 0:
        return scores.new_empty((len(scores), k), dtype=torch.int64), scores.new_empty(len(scores), k)
    best, ids = scores.topk(min(k + 1, scores.shape[1]), dim=1)
    nan = best[:, 0].isnan()
    tied = ((best[:, 1:] == best[:, :-1]) & (best[:, 1:] != float("-inf"))).any(1)
    unsure = (nan | tied).nonzero().squeeze(1)
    best, ids = best[:, :k].contiguous(), ids[:, :k].contiguous()
    if len(unsure):
        rows = scores[unsure]
        ordered = rows.masked_fill_(rows.isnan(), float("-inf")).sort(dim=1, descending=True, stable=True)
        best[unsure], ids[unsure] = ordered.values[:, :k], ordered.indices[:, :k]
    return ids.masked_fill_(best == float("-inf"), -1), best


def keyed_topk(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`exact_topk` that does not wait for a device to say where scores are tied.

    The bits of a float32, made to ascend as integers do, and the column behind them are one key, so none are tied.
    """
    k, last = min(k, scores.shape[1]), scores.shape[1] - 1
    scores = scores.masked_fill(scores.isnan(), float("-inf"))
    if scores.dtype == torch.float64:
        ids = scores.sort(dim=1, descending=True, stable=True).indices[:, :k]
    else:
        bits = (scores.float() + 0.0).view(torch.int32)  # -0 becomes 0
        keys = bits.where(bits >= 0, bits ^ 0x7FFFFFFF).long() << 32
        keys |= torch.arange(last, -1, -1, device=scores.device)
        ids = last - (keys.topk(k, dim=1).values & 0xFFFFFFFF)
    best = scores.gather(1, ids)
    return ids.masked_fill(best == float("-inf"), -1), best


def _chunks(n_users: int, n_items: int) -> Iterator[tuple[int, int]]:
    width = max(1, CHUNK_SCORES // max(1, n_users))
    for start in range(0, n_items, width):
        yield start, min(start + width, n_items)


def _wide(u: Tensor) -> Tensor:
    """Nothing, in the dtype of what is computed from products of u."""
    return u.new_empty(0, dtype=torch.promote_types(u.dtype, torch.float32))


def _score(u: Tensor, weight: Tensor, bias: Tensor, exclude: CSR | None, start: int, stop: int) -> Tensor:
    """Scores of the items start..stop, -inf where excluded, in a scratch block. [B, stop - start]"""
    block = scratch.take(len(u) + 1, stop - start, _wide(u))
    scores = block[:-1]
    if scores.dtype == u.dtype:
        torch.addmm(bias[start:stop], u, weight[start:stop].T, out=scores)
    else:
        scores.copy_(torch.addmm(bias[start:stop], u, weight[start:stop].T))
    if exclude is not None:
        block.index_put_(_inside(*exclude, start, stop), block.new_full((), float("-inf")))
    return scores


def _extended(old: tuple[Tensor, Tensor] | None, scores: Tensor, start: int, k: int) -> tuple[Tensor, Tensor]:
    """The list of all items up to a chunk: `old` of those before it, and the chunk's scores, whose first id is `start`.

    Every id of the chunk is greater than those of `old`, so a stable sort keeps ties right.
    """
    ids, best = exact_topk(scores, k)
    if old is None:
        return ids, best
    ids.add_(start).masked_fill_(best == float("-inf"), -1)
    best, order = torch.cat([old[1], best], 1).sort(dim=1, descending=True, stable=True)
    return torch.cat([old[0], ids], 1).gather(1, order[:, :k]), best[:, :k].contiguous()


def _inside(items: Tensor, offsets: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """Row and column of every CSR entry in a chunk of the catalogue; row B for those that are not there. [E] twice"""
    rows = rows_of(offsets, items.shape[0])
    rows = rows.masked_fill((items < start) | (items >= stop), offsets.shape[0] - 1)
    return rows, (items - start).clamp_(0, stop - start - 1)


def loop_state() -> None:
    """What one pass over the loop remembers from step to step: nothing here."""


def linear_topk(
    u: Tensor, weight: Tensor, bias: Tensor, k: int, exclude: CSR | None = None, state: None = None
) -> tuple[Tensor, Tensor]:
    """Equation (2): ids and scores of the K best items, excluded ones left out. [B, K] twice"""
    found = None
    for start, stop in _chunks(len(u), len(weight)):
        scores = _score(u, weight, bias, exclude, start, stop)
        found = _extended(found, scores, start, k)
        scratch.give(scores)
    if found is None:
        return exact_topk(u.new_empty(len(u), 0), k)
    return found


def linear_nll(
    u: Tensor,
    weight: Tensor,
    bias: Tensor,
    items: Tensor,
    offsets: Tensor,
    exclude: CSR | None,
    k: int,
    state: None = None,
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor], Tensor | None]:
    """The multinomial loss of every user [B], its logsumexp [B], the list of the K best, and softmax(s) for backward.

    The last is [B, M] where the catalogue is one chunk, else None.
    """
    counts = offsets.diff()
    lse = _wide(u).new_full((len(u),), float("-inf"))
    hit = lse.new_zeros(len(u) + 1)
    found = None
    kept = None
    for start, stop in _chunks(len(u), len(weight)):
        scores = _score(u, weight, bias, exclude, start, stop)
        rows, columns = _inside(items, offsets, start, stop)
        hit.index_add_(0, rows, scores[rows.clamp_max(len(u) - 1), columns])
        if k:
            found = _extended(found, scores, start, k)
        peak = scores.amax(1)
        peak.masked_fill_(peak == float("-inf"), 0)
        total = scores.sub_(peak[:, None]).exp_().sum(1)
        lse = torch.logaddexp(lse, peak + total.log())
        if stop - start == len(weight):
            kept = scores.mul_(total.reciprocal_().nan_to_num_(posinf=0)[:, None])
        else:
            scratch.give(scores)
    nll = torch.where(counts > 0, lse * counts, 0) - hit[:-1]
    return nll, lse, found or exact_topk(u.new_empty(len(u), 0), 0), kept


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
    counts: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of u [B, H], weight [M, H] and bias [M]: ds = dnll (|x| softmax(s) - x), a chunk of items at a time.

    counts: |x| [B], where x is only in part here.
    """
    scale = (dnll * (offsets.diff() if counts is None else counts))[:, None]
    hits = F.pad(-dnll, (0, 1))
    lse = lse.masked_fill(lse == float("-inf"), 0)[:, None]
    du = torch.zeros_like(u, dtype=lse.dtype)
    dweight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    dbias = torch.empty_like(bias, memory_format=torch.contiguous_format)
    for start, stop in _chunks(len(u), len(weight)):
        ds = _score(u, weight, bias, exclude, start, stop).sub_(lse).exp_() if kept is None else kept
        ds.mul_(scale)
        rows, columns = _inside(items, offsets, start, stop)
        ds.index_put_((rows.clamp_max(len(u) - 1), columns), hits[rows], accumulate=True)
        _products(ds, u, weight[start:stop], du, dweight[start:stop], dbias[start:stop])
        scratch.give(ds)
    return du.to(u.dtype), dweight, dbias


def _products(ds: Tensor, u: Tensor, weight: Tensor, du: Tensor, dweight: Tensor, dbias: Tensor) -> None:
    """Adds a chunk's ds O to du; writes its ds^T u and its sums over users."""
    narrow = ds.to(u.dtype)
    if du.dtype == u.dtype:
        du.addmm_(ds, weight)
    else:
        du.add_(narrow @ weight)
    torch.mm(narrow.T, u, out=dweight)
    dbias.copy_(ds.sum(0))


def list_softmax(ids: Tensor, scores: Tensor) -> Tensor:
    """Softmax over the listed scores; 0 at the padding and in an empty list. [B, K]"""
    return scores.softmax(1).masked_fill_(ids < 0, 0)


def list_weights(ids: Tensor, scores: Tensor, action: str) -> Tensor:
    """The weights w of (16), forward: 1/K, or the softmax over the listed scores. [B, K]"""
    if action == "topk_softmax":
        return list_softmax(ids, scores)
    listed = (ids >= 0).to(scores.dtype)
    return listed / listed.sum(1, keepdim=True).clamp_min_(1)


def fuse(hx: Tensor, lookup: Tensor, ids: Tensor, scores: Tensor, action: str) -> tuple[Tensor, Tensor]:
    """Equation (16): h = hx + sum_k w_k lookup[ids_k] [B, D], and the weights w [B, K]."""
    w = list_weights(ids, scores, action)
    return row_bag(lookup, ids.clamp_min(0).flatten(), list_offsets(ids), w.flatten()).add_(hx), w


def list_offsets(ids: Tensor) -> Tensor:
    """The offsets of lists [B, K] as CSR rows. [B + 1]"""
    return torch.arange(ids.shape[0] + 1, device=ids.device) * ids.shape[1]


def respond(h: Tensor, reward: Layers, feedback: Layers) -> tuple[Tensor, Tensor]:
    """Equations (3) and (4): the reward's logit [B] and the feedback v [B, V]."""
    logit = mlp(h, reward)
    return logit.squeeze(1), mlp(torch.cat([h, logit.sigmoid()], 1), feedback)


def unit(v: Tensor) -> Tensor:
    """v / max(||v||, 1e-12). [B, V]"""
    return F.normalize(v, dim=1, eps=1e-12)


def follow(v: Tensor, hoisted: Tensor, wv: Tensor) -> Tensor:
    """hoisted + v^ Wv [B, P]: the recommender's first pre-activation with the feedback v [B, V]."""
    return torch.addmm(hoisted, unit(v), wv)


def mlp(x: Tensor, layers: Layers) -> Tensor:
    """Linear layers with ReLU between, the last one linear."""
    for weight, bias in layers[:-1]:
        x = F.linear(x, weight, bias).relu_()
    return F.linear(x, *layers[-1])


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
    state: None = None,
) -> tuple[Tensor, ...]:
    """v [B, V], the reward's logit [B], ids, scores [B, K], hoisted + v^ Wv [B, P], h [B, D], list weights [B, K]."""
    ids, scores = linear_topk(u, weight, bias, k, exclude)
    h, w = fuse(hx, lookup, ids, scores, action)
    logit, v = respond(h, reward, feedback)
    return v, logit, ids, scores, follow(v, hoisted, wv), h, w


def fuse_softmax(u: Tensor, weight: Tensor, bias: Tensor, lookup: Tensor, exclude: CSR | None) -> tuple[Tensor, Tensor]:
    """softmax(s) lookup [B, D], streamed as attention with keys weight and values lookup; and logsumexp(s) [B]."""
    mean = lookup.new_zeros(len(u), lookup.shape[1])
    lse = _wide(u).new_full((len(u),), float("-inf"))
    for start, stop in _chunks(len(u), len(weight)):
        scores = _score(u, weight, bias, exclude, start, stop)
        grown = torch.logaddexp(lse, scores.logsumexp(1))
        safe = grown.masked_fill(grown == float("-inf"), 0)
        mean.mul_((lse - safe).exp_()[:, None])
        mean.addmm_(scores.sub_(safe[:, None]).exp_(), lookup[start:stop])
        lse = grown
        scratch.give(scores)
    return mean, lse


def fuse_softmax_backward(
    dmean: Tensor,
    u: Tensor,
    weight: Tensor,
    bias: Tensor,
    lookup: Tensor,
    exclude: CSR | None,
    mean: Tensor,
    lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of u, weight, bias and lookup: ds = p (dmean lookup^T - < dmean, mean >), p computed again."""
    du = torch.zeros_like(u, dtype=lse.dtype)
    dweight, dbias, dlookup = torch.empty_like(weight), torch.empty_like(bias), torch.empty_like(lookup)
    inner = (dmean * mean).sum(1, keepdim=True)
    lse = lse.masked_fill(lse == float("-inf"), 0)[:, None]
    for start, stop in _chunks(len(u), len(weight)):
        p = _score(u, weight, bias, exclude, start, stop).sub_(lse).exp_()
        torch.mm(p.T, dmean, out=dlookup[start:stop])
        ds = p.mul_(torch.mm(dmean, lookup[start:stop].T).sub_(inner))
        _products(ds, u, weight[start:stop], du, dweight[start:stop], dbias[start:stop])
        scratch.give(p)
    return du.to(u.dtype), dweight, dbias, dlookup


PICKED = 1 << 13
"""Entries whose rows are gathered at once: 20 MB a table at H = 600, which a cache still helps."""


def linear_pick(u: Tensor, weight: Tensor, bias: Tensor, items: Tensor, rows: Tensor) -> Tensor:
    """The scores < u_b, weight_j > + bias_j of single pairs (rows_e, items_e); of any pair where they are room. [E]"""
    rows, items = rows.clamp_max(u.shape[0] - 1), items.clamp_max(weight.shape[0] - 1)
    parts = [(u[b] * weight[j]).sum(1) for b, j in zip(rows.split(PICKED), items.split(PICKED), strict=True)]
    return torch.cat(parts).add_(bias[items])


def squares_by_gram(u: Tensor) -> bool:
    """Whether sum_j s_j^2 = u^T (O^T O) u + 2 u^T O^T o + o^T o, with corrections at targets and excluded items, costs
    less than the scores: 4 M H^2 flops with the gradient against 6 B M H, and no [B, M].
    """
    return 2 * u.shape[0] > 3 * u.shape[1]


def linear_squares(
    u: Tensor, weight: Tensor, bias: Tensor, items: Tensor, offsets: Tensor, exclude: CSR | None, positive: float
) -> tuple[Tensor, list[Tensor]]:
    """The weighted squared loss of each user [B], and what its gradient needs."""
    loss = u.new_zeros(u.shape[0] + 1)
    kept: list[Tensor] = []
    if squares_by_gram(u):
        cross = bias @ weight
        half = torch.mm(u, torch.mm(weight.T, weight)).add_(cross)  # half the gradient of sum_j s_j^2 in u
        total = ((half + cross) * u).sum(1, dtype=torch.float64) + bias.square().sum(dtype=torch.float64)
        loss[:-1] = total.to(u.dtype)
        rows = rows_of(offsets, items.shape[0])
        found = linear_pick(u, weight, bias, items, rows)
        loss.index_add_(0, rows, positive * (found - 1).square() - found.square())
        kept = [half, found]
        if exclude is not None:
            rows = rows_of(exclude[1], exclude[0].shape[0])
            kept.append(linear_pick(u, weight, bias, exclude[0], rows))
            loss.index_add_(0, rows, -kept[-1].square())
        return loss[:-1], kept
    for start, stop in _chunks(u.shape[0], weight.shape[0]):
        scores = _squared_scores(u, weight, bias, exclude, start, stop)
        loss[:-1] += torch.linalg.vector_norm(scores, dim=1).square_()
        rows, columns = _inside(items, offsets, start, stop)
        found = scores[rows.clamp_max(u.shape[0] - 1), columns]
        loss.index_add_(0, rows, positive * (found - 1).square() - found.square())
        if stop - start == weight.shape[0]:
            kept.append(scores)
        else:
            scratch.give(scores)
    return loss[:-1], kept


def linear_squares_backward(
    dloss: Tensor,
    u: Tensor,
    weight: Tensor,
    bias: Tensor,
    items: Tensor,
    offsets: Tensor,
    exclude: CSR | None,
    positive: float,
    kept: list[Tensor],
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Gradients of u [B, H], weight [M, H] and bias [M]. With the Gram matrix, what single scores add to them is left
    out: their gradients come fourth, of the targets and of the excluded items.
    """
    g = 2 * dloss
    g_or_0 = F.pad(g, (0, 1))
    if squares_by_gram(u):
        half, found, *left_out = kept
        summed = g @ u
        dweight = torch.addr(weight @ torch.mm(u.T, u * g[:, None]), bias, summed)
        dbias = torch.addmv(bias * g.sum(), weight, summed)
        single = [g_or_0[rows_of(offsets, items.shape[0])] * (positive * (found - 1) - found)]
        for s in left_out:
            assert exclude is not None
            single.append(-g_or_0[rows_of(exclude[1], s.shape[0])] * s)
        return half * g[:, None], dweight, dbias, single
    du = torch.zeros_like(u)
    dweight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    dbias = torch.empty_like(bias, memory_format=torch.contiguous_format)
    for start, stop in _chunks(u.shape[0], weight.shape[0]):
        ds = kept[0] if kept else _squared_scores(u, weight, bias, exclude, start, stop)
        rows, columns = _inside(items, offsets, start, stop)
        at = rows.clamp_max(u.shape[0] - 1), columns
        found = ds[at]
        ds.mul_(g[:, None]).index_put_(at, g_or_0[rows] * (positive * (found - 1) - found), accumulate=True)
        _products(ds, u, weight[start:stop], du, dweight[start:stop], dbias[start:stop])
        scratch.give(ds)
    return du, dweight, dbias, []


def _squared_scores(u: Tensor, weight: Tensor, bias: Tensor, exclude: CSR | None, start: int, stop: int) -> Tensor:
    """`_score` with 0 where excluded, which costs nothing and moves nothing."""
    scores = _score(u, weight, bias, exclude, start, stop)
    return scores if exclude is None else scores.masked_fill_(scores == float("-inf"), 0)


def linear_logistic(
    u: Tensor, weight: Tensor, bias: Tensor, items: Tensor, offsets: Tensor, exclude: CSR | None
) -> tuple[Tensor, Tensor | None]:
    """The logistic loss of each user [B], and sigmoid(s) [B, M] where the catalogue is one chunk, else None."""
    loss = u.new_zeros(u.shape[0] + 1)
    kept = None
    for start, stop in _chunks(u.shape[0], weight.shape[0]):
        scores = _score(u, weight, bias, exclude, start, stop)
        rows, columns = _inside(items, offsets, start, stop)
        loss.index_add_(0, rows, scores[rows.clamp_max(u.shape[0] - 1), columns], alpha=-1)
        softplus = scratch.take(u.shape[0], stop - start, scores)
        loss[:-1] += torch.logaddexp(scores, scores.new_zeros(()), out=softplus).sum(1)  # 0 where excluded
        scratch.give(softplus)
        if stop - start == weight.shape[0]:
            kept = scores.sigmoid_()
        else:
            scratch.give(scores)
    return loss[:-1], kept


def linear_logistic_backward(
    dloss: Tensor,
    u: Tensor,
    weight: Tensor,
    bias: Tensor,
    items: Tensor,
    offsets: Tensor,
    exclude: CSR | None,
    kept: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of u [B, H], weight [M, H] and bias [M]: ds = dloss (sigmoid(s) - x), a chunk of items at a time."""
    hits = F.pad(-dloss, (0, 1))
    du = torch.zeros_like(u)
    dweight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    dbias = torch.empty_like(bias, memory_format=torch.contiguous_format)
    for start, stop in _chunks(u.shape[0], weight.shape[0]):
        ds = _score(u, weight, bias, exclude, start, stop).sigmoid_() if kept is None else kept
        rows, columns = _inside(items, offsets, start, stop)
        ds.mul_(dloss[:, None]).index_put_((rows.clamp_max(u.shape[0] - 1), columns), hits[rows], accumulate=True)
        _products(ds, u, weight[start:stop], du, dweight[start:stop], dbias[start:stop])
        scratch.give(ds)
    return du, dweight, dbias


WARP_SCORES = 1 << 21
"""Scores that are ranked at once: some 100 MB beside the [B, M] gradient."""


def linear_warp(
    u: Tensor, weight: Tensor, bias: Tensor, items: Tensor, offsets: Tensor, exclude: CSR | None
) -> tuple[Tensor, Tensor]:
    """The rank-weighted loss of each user [B], and its gradient in the scores [B, M]."""
    n_users, n_items = u.shape[0], weight.shape[0]
    positive = torch.zeros(n_users + 1, n_items, dtype=torch.bool, device=u.device)
    positive.index_put_(_inside(items, offsets, 0, n_items), positive.new_ones(()))
    scores = _score(u, weight, bias, exclude, 0, n_items)
    counting = torch.arange(n_items + 1, dtype=torch.float64, device=u.device)
    harmonic = counting.clamp_min(1).reciprocal().cumsum(0) - 1  # Phi(r)
    width = max(1, WARP_SCORES // n_items)
    losses = [_warp(*rows, harmonic) for rows in zip(scores.split(width), positive[:-1].split(width), strict=True)]
    return torch.cat(losses), scores


def _warp(scores: Tensor, positive: Tensor, harmonic: Tensor) -> Tensor:
    """The loss of each row [b]; scores [b, M] become its gradient. Excluded items have score -inf.

    One sort, then prefix sums over the ranks. Of equal scores none is above the other: what stands before an item
    counts up to the first of its equals, and what stands behind from their last.
    """
    best, order = scores.sort(dim=1, descending=True)
    hit = positive.gather(1, order)
    miss = ~(hit | (best == float("-inf")))
    edge = best[:, 1:] != best[:, :-1]
    first, last = F.pad(edge, (1, 0), value=True), F.pad(edge, (0, 1), value=True)
    above = (miss.cumsum(1) - miss.long()).masked_fill_(~first, 0).cummax(1).values
    seen = torch.where(miss, best, 0).double().cumsum(1)  # the sum of the misses up to each rank
    phi = torch.where(hit, harmonic[above], 0)
    n_seen = miss.cumsum(1)
    loss = torch.where(hit, phi * (seen - n_seen * torch.where(hit, best, 0)), 0).sum(1)
    below = phi.sum(1, keepdim=True) - phi.cumsum(1)
    below = below.masked_fill_(~last, float("-inf")).flip(1).cummax(1).values.flip(1)
    ds = torch.where(hit, -phi * above, torch.where(miss, below, 0))
    scores.scatter_(1, order, ds.to(scores.dtype))
    return loss.to(scores.dtype)


SLIM_TOLERANCE = 1e-5
"""A column is finished when no weight moves further in a pass over all."""

SLIM_PASSES = 1000


def slim(gram: Tensor, first: int, last: int, l1: float, l2: float) -> tuple[Tensor, int]:
    """Weights of the items first..last on all others [last - first, M], and how many of them did not converge.

    Coordinate descent on the Gram matrix, as csrc/slim.cpp has it, one change of a weight per call of the library.
    """
    G = gram.double().numpy()
    columns = torch.zeros(last - first, len(gram), dtype=gram.dtype)
    unfinished = 0
    for column, j in zip(columns, range(first, last), strict=True):
        items = (gram[j] > l1).nonzero().squeeze(1)
        items = items[items != j]
        some = items.numpy()
        r, w, own = G[j, some].copy(), np.zeros(len(some)), G[np.ix_(some, some)]
        places = list(range(len(some)))
        for _ in range(SLIM_PASSES):
            moved = 0.0
            for s in places:
                change = max(0.0, r[s] + own[s, s] * w[s] - l1) / (own[s, s] + l2) - w[s]
                if change:
                    r -= change * own[s]
                    w[s] += change
                    moved = max(moved, abs(change))
            if moved <= SLIM_TOLERANCE and len(places) == len(some):
                break
            places = list(range(len(some))) if moved <= SLIM_TOLERANCE else w.nonzero()[0].tolist()
        else:
            unfinished += 1
        column[items] = torch.from_numpy(w).to(gram.dtype)
    return columns, unfinished
