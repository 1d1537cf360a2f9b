"""What each operation means, in plain PyTorch: the specification that tests run.

Differentiable through autograd, for every float dtype, with no regard for speed. Equation numbers are the paper's.

Shapes    u [B, H], weight [M, H], bias [M]; lookup [M, D]; hx [B, D]; CSR rows as (items [E], offsets [B + 1]).
Lists     A list holds the K best items of a user: score descending, ties to the smaller id. Items of score -inf or NaN
          never enter; a list with fewer than K items is padded with id -1 and score -inf.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from scipy.optimize import nnls
from torch import Tensor
from torch.nn import functional as F

CSR = tuple[Tensor, Tensor]
"""(items [E] int64, offsets [B + 1] int64): row b owns items[offsets[b] : offsets[b + 1]]."""

Layers = Sequence[tuple[Tensor, Tensor]]
"""(weight [out, in], bias [out]) of each linear layer, ReLU between."""

ACTIONS = ("straight_through", "topk_softmax", "softmax", "hard")


def rows_of(offsets: Tensor, n_entries: int | None = None) -> Tensor:
    """The row of every CSR entry; an exported program has to know beforehand how many there are. [E]"""
    users = torch.arange(offsets.shape[0] - 1, device=offsets.device)
    known = n_entries if torch.compiler.is_exporting() else None
    return torch.repeat_interleave(users, offsets.diff(), output_size=known)


def row_bag(table: Tensor, items: Tensor, offsets: Tensor, weights: Tensor | None = None) -> Tensor:
    """sum_{e in row b} weights_e table[items_e]. [B, D]; an empty row gives 0."""
    entries = table[items] if weights is None else table[items] * weights[:, None]
    rows = rows_of(offsets, items.shape[0])
    return table.new_zeros(offsets.shape[0] - 1, table.shape[1]).index_add(0, rows, entries)


def linear(u: Tensor, weight: Tensor, bias: Tensor, exclude: CSR | None = None) -> Tensor:
    """Scores s = u weight^T + bias, -inf where excluded. [B, M]"""
    scores = u @ weight.T + bias
    if exclude is None:
        return scores
    items, offsets = exclude
    place, shut = (rows_of(offsets, items.shape[0]), items), scores.new_tensor(float("-inf"))
    if torch.compiler.is_exporting():  # the rows of an exported program have entries of M, which exclude nothing
        return F.pad(scores, (0, 1)).index_put(place, shut)[:, :-1]
    return scores.index_put(place, shut)


def top(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The K best items of each row of scores [B, M]: (ids [B, K] int64, scores [B, K]), K = min(k, M)."""
    scores = scores.masked_fill(scores.isnan(), float("-inf"))
    order = _order(scores.detach(), k)
    best = scores.gather(1, order)
    return order.masked_fill(best == float("-inf"), -1), best


def _order(scores: Tensor, k: int) -> Tensor:
    """The columns of the K greatest of each row, ties to the smaller column. [B, K]"""
    if not torch.compiler.is_exporting():
        return scores.sort(dim=1, descending=True, stable=True).indices[:, :k]
    # A program that serves should not sort whole catalogues: the bits of a float32, made to ascend as integers do, and
    # the column behind them are one key.
    last = scores.shape[1] - 1
    bits = (scores.float() + 0.0).view(torch.int32)
    keys = bits.where(bits >= 0, bits ^ 0x7FFFFFFF).long() << 32 | torch.arange(last, -1, -1, device=scores.device)
    return last - (keys.topk(min(k, last + 1)).values & 0xFFFFFFFF)


def linear_topk(u: Tensor, weight: Tensor, bias: Tensor, k: int, exclude: CSR | None = None) -> tuple[Tensor, Tensor]:
    """Equation (2): the list a of the K best scores. (ids [B, K], scores [B, K])"""
    return top(linear(u, weight, bias, exclude), k)


def list_softmax(ids: Tensor, scores: Tensor) -> Tensor:
    """Softmax over the listed scores; 0 at the padding and in an empty list. [B, K]"""
    peak = scores.detach().amax(1, keepdim=True) if scores.shape[1] else scores.new_zeros(len(scores), 1)
    peak = peak.masked_fill(peak == float("-inf"), 0)
    e = (scores.masked_fill(ids < 0, float("-inf")) - peak).exp()
    return e / e.sum(1, keepdim=True).clamp_min(torch.finfo(scores.dtype).tiny)


def list_weights(ids: Tensor, scores: Tensor, action: str) -> Tensor:
    """Weights w_k of the listed items in h(x, a): 1/K forward, or the softmax over the listed scores. [B, K]"""
    listed = (ids >= 0).to(scores.dtype)
    uniform = listed / listed.sum(1, keepdim=True).clamp_min(1)
    if action == "hard":
        return uniform
    soft = list_softmax(ids, scores)
    return soft if action == "topk_softmax" else uniform + (soft - soft.detach())


def fuse(hx: Tensor, lookup: Tensor, ids: Tensor, scores: Tensor, action: str) -> Tensor:
    """Equation (16): h(x, a) = hx + sum_k w_k lookup[ids_k], hx the mean row of the history. [B, D]"""
    w = list_weights(ids, scores, action)
    return hx + (w[:, :, None] * lookup[ids.clamp_min(0)]).sum(1)


def fuse_softmax(
    u: Tensor, weight: Tensor, bias: Tensor, hx: Tensor, lookup: Tensor, exclude: CSR | None = None
) -> Tensor:
    """Equation (16) with the whole policy as the list: h = hx + softmax(s) lookup. [B, D]"""
    scores = linear(u, weight, bias, exclude)
    empty = (scores == float("-inf")).all(1, keepdim=True)
    return hx + scores.masked_fill(empty, 0).softmax(1).masked_fill(empty, 0) @ lookup


def mlp(x: Tensor, layers: Layers) -> Tensor:
    """Linear layers with ReLU between, the last one linear."""
    for weight, bias in layers[:-1]:
        x = F.relu(F.linear(x, weight, bias))
    return F.linear(x, *layers[-1])


def respond(h: Tensor, reward: Layers, feedback: Layers) -> tuple[Tensor, Tensor]:
    """The virtual user's answer to h: the reward's logit g(h) of (3) [B] and the feedback v of (4) [B, V]."""
    logit = mlp(h, reward)
    return logit.squeeze(1), mlp(torch.cat([h, logit.sigmoid()], dim=1), feedback)


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Equations (2), (16), (3), (4): one turn of the virtual user.

    Returns:
        v [B, V], the reward's logit [B], ids [B, K], scores [B, K], hoisted + v^ Wv [B, P].
    """
    ids, scores = linear_topk(u, weight, bias, k, exclude)
    if action == "softmax":
        h = fuse_softmax(u, weight, bias, hx, lookup, exclude)
    else:
        h = fuse(hx, lookup, ids, scores, action)
    logit, v = respond(h, reward, feedback)
    return v, logit, ids, scores, hoisted + F.normalize(v, dim=1, eps=1e-12) @ wv


def linear_nll(
    u: Tensor, weight: Tensor, bias: Tensor, items: Tensor, offsets: Tensor, exclude: CSR | None = None
) -> Tensor:
    """The multinomial loss |x| logsumexp(s) - sum_{j in x} s_j of each user. [B]; 0 where x is empty."""
    scores = linear(u, weight, bias, exclude)
    rows = rows_of(offsets, items.shape[0])
    counts = offsets.diff()
    lse = torch.where(counts > 0, scores.logsumexp(1), 0)
    return lse * counts - scores.new_zeros(len(u)).index_add(0, rows, scores[rows, items])


def linear_squares(
    u: Tensor,
    weight: Tensor,
    bias: Tensor,
    items: Tensor,
    offsets: Tensor,
    exclude: CSR | None = None,
    positive: float = 5.0,
) -> Tensor:
    """The weighted squared loss sum_j c_j (x_j - s_j)^2 of each user, c_j = positive where x_j = 1, else 1. [B]

    Excluded items leave the sum.
    """
    scores = linear(u, weight, bias)
    ones = scores.new_ones(len(items))
    x = torch.zeros_like(scores).index_put((rows_of(offsets), items), ones)
    cost = 1 + (positive - 1) * x
    if exclude is not None:
        cost = cost.index_put((rows_of(exclude[1]), exclude[0]), cost.new_zeros(()))
    return (cost * (x - scores).square()).sum(1)


def linear_logistic(
    u: Tensor, weight: Tensor, bias: Tensor, items: Tensor, offsets: Tensor, exclude: CSR | None = None
) -> Tensor:
    """The logistic loss -sum_{j in x} log sigmoid(s_j) - sum_{j not in x} log(1 - sigmoid(s_j)) of each user. [B]

    Excluded items leave the sum.
    """
    scores = linear(u, weight, bias)
    target = torch.zeros_like(scores).index_put((rows_of(offsets), items), scores.new_ones(len(items)))
    loss = F.binary_cross_entropy_with_logits(scores, target, reduction="none")
    if exclude is not None:
        loss = loss.index_put((rows_of(exclude[1]), exclude[0]), loss.new_zeros(()))
    return loss.sum(1)


def linear_warp(
    u: Tensor, weight: Tensor, bias: Tensor, items: Tensor, offsets: Tensor, exclude: CSR | None = None
) -> Tensor:
    """sum_{i in x} Phi(rank_i) sum_{j not in x, s_j > s_i} (s_j - s_i) of each user, Phi(r) = sum_{k <= r} 1 / k. [B]

    rank_i counts the j of the inner sum; Phi is constant in the gradient; excluded items are no j.
    """
    scores = linear(u, weight, bias)
    rows = rows_of(offsets)
    negative = torch.ones_like(scores, dtype=torch.bool)
    negative[rows, items] = False
    if exclude is not None:
        negative[rows_of(exclude[1]), exclude[0]] = False
    margins = F.relu(scores[rows] - scores[rows, items][:, None]) * negative[rows]  # [E, M]
    rank = (margins > 0).sum(1)
    phi = torch.cat([scores.new_zeros(1), scores.new_ones(len(weight)).div(_counting(scores)).cumsum(0)])
    return scores.new_zeros(len(u)).index_add(0, rows, phi[rank] * margins.sum(1))


def _counting(scores: Tensor) -> Tensor:
    return torch.arange(1, scores.shape[1] + 1, dtype=scores.dtype, device=scores.device)


def item_memory(x: Tensor, ridge: float, absent: int | None = None) -> Tensor:
    """P = (sum_u w_u x_u x_u^T + D)^-1 of histories x [U, M]; absent: a user whose term is left out, not their part in
    D. [M, M]
    """
    sizes = x.sum(1).clamp_min(1)
    w = sizes.rsqrt() / sizes.rsqrt().mean()
    gram = x.T @ (w[:, None] * x)
    counts = gram.diagonal().clamp_min(1)
    gram = gram + (ridge * (counts * counts.mean()).sqrt()).diag()
    if absent is not None:
        gram = gram - w[absent] * torch.outer(x[absent], x[absent])
    return gram.inverse()


def evidence(precision: Tensor, counts: Tensor, kept: Tensor, ids: Tensor, scores: Tensor, first: int) -> Tensor:
    """What is known for each item of a list from the items `kept`, b_ij = -P_ij / P_jj; columns as in `memory`. [K, 19]

    Args:
        precision: P. [M, M]
        counts: users of every item, those asking left out. [M]
        kept: items of the history. [N] int64
        ids: the list. [K] int64, no padding
        scores: s, the recommender's of the list. [K]
        first: items of the first page.
    """
    b = -precision[kept][:, ids] / precision.diagonal()[ids]  # [N, K]
    b = b.masked_fill(kept[:, None] == ids, 0)
    r = 1 / (3 + counts[kept]).log()[:, None]
    positive = b.clamp_min(0)

    def most(values: Tensor) -> Tensor:
        return values.amax(0) if len(values) else values.new_zeros(values.shape[1])

    def standard(values: Tensor) -> Tensor:
        page = values[:first]
        return (values - page.mean()) / page.std(correction=0).clamp_min(1e-6)

    e, rare = b.sum(0), (r * b).sum(0)
    best, rare_best = most(positive), most(r * positive)
    roots, squares = positive.sqrt().sum(0), positive.square().sum(0)
    logs = [v.clamp_min(1e-4).log() for v in (e, best, rare, rare_best, roots, squares)]
    columns = [e, b.clamp_max(0).sum(0), best, roots, squares, rare, *logs, standard(e), standard(rare)]
    columns += [counts[ids].log1p(), torch.full_like(e, len(kept)).log1p()]
    columns += [scores, standard(scores), torch.arange(len(ids), dtype=e.dtype).log1p()]
    return torch.stack(columns, 1)


def slim(gram: Tensor, first: int, last: int, l1: float, l2: float) -> tuple[Tensor, int]:
    """argmin over w >= 0, w_j = 0 of 1/2 |X_j - X w|^2 + l2 / 2 |w|^2 + l1 sum w, gram = X^T X; j = first .. last - 1.

    As a non-negative least squares: |L^T w - L^-1 (g - l1)|^2 with L L^T = G + l2 I, without row and column j.
    """
    columns = torch.zeros(last - first, len(gram), dtype=gram.dtype)
    for column, j in zip(columns, range(first, last), strict=True):
        others = torch.arange(len(gram)) != j
        L = torch.linalg.cholesky(gram[others][:, others].double() + l2 * torch.eye(len(gram) - 1))
        aim = torch.linalg.solve_triangular(L, (gram[others, j].double() - l1)[:, None], upper=False)
        column[others] = torch.from_numpy(nnls(L.T.numpy(), aim.squeeze(1).numpy())[0]).to(gram.dtype)
    return columns, 0
