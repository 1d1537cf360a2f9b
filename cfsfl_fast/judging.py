"""The virtual user's answer in scores (`feedback="scores"`): it looks at the list, item by item.

    c_j = s_j + beta e_j(x)                                 the recommender and the item memory: the answer of T = 0
    a^t = the K best of c after those of a^0 .. a^(t-1),    t = 0 .. T - 1: page by page
    g_j = MLP(evidence_j),    r_j = g_j + alpha s_j         for every j in a page: log-odds that the user would take it

Judged items stand before all others, by r; the others follow in the order of c. What a page says of its items does not
change the pages behind it, so the T pages are one list of T K items.

Shapes    s, c [B, M]; ids, g [B, T K].
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from cfsfl_fast import losses, ops
from cfsfl_fast.distributed import ALONE, Group
from cfsfl_fast.interactions import Interactions
from cfsfl_fast.memory import ItemMemory

Layers = list[tuple[Tensor, Tensor]]

NO_SCORE = float("-inf")


class Answer(NamedTuple):
    """What the virtual user says."""

    scores: Tensor  # [B, M]: r of judged items, c of the others, moved behind them
    ids: Tensor  # the pages, -1 where they end. [B, T K]
    logits: Tensor  # g. [B, T K]


def combined(memory: ItemMemory, scores: Tensor, x: Interactions) -> Tensor:
    """c = s + beta e(x). [B, M]; s where the memory is empty."""
    return scores if memory.is_empty else scores + memory.weight * memory.scores(x)[0]


def answer(
    memory: ItemMemory, reward: Layers, scores: Tensor, x: Interactions, shut: Tensor | None, steps: int, k: int
) -> Answer:
    """The virtual user's answer after T pages.

    Args:
        memory: of items.
        reward: the layers of g.
        scores: s [B, M].
        x: histories.
        shut: 0, or -inf where an item is not listed; broadcasts to [B, M].
        steps: T; 0 gives c itself.
        k: K.
    """
    c = combined(memory, scores, x)
    if shut is not None:
        c = c + shut
    n_listed = min(steps * k, c.shape[1])
    if n_listed and memory.is_empty:
        raise ValueError(
            f"{steps} steps need an item memory, and this model has none: train it, or load the whole run's folder"
        )
    if n_listed == 0:
        return Answer(c, torch.empty(len(c), 0, dtype=torch.int64, device=c.device), c.new_empty(len(c), 0))
    ids, best = ops.topk(c.detach(), n_listed)
    listed = ids >= 0
    of_listed = scores.gather(1, ids.clamp_min(0))
    logits = judged(memory, reward, memory.evidence(x, ids, of_listed, k))
    r = logits + memory.recommender_weight * of_listed
    worst_c = best.masked_fill(~listed, -NO_SCORE).amin(1, keepdim=True)
    worst_r = r.detach().masked_fill(~listed, -NO_SCORE).amin(1, keepdim=True)
    behind = torch.where(listed[:, :1], worst_r - worst_c, 0)
    place = torch.where(listed, ids, c.shape[1])  # what is not listed meets in a column that is cut off
    return Answer(F.pad(c + behind, (0, 1)).scatter(1, place, r)[:, :-1], ids, logits)


def judged(memory: ItemMemory, reward: Layers, evidence: Tensor) -> Tensor:
    """g of listed items from their evidence [B, K, 19]. [B, K]"""
    seen = ((evidence - memory.centre) / memory.spread).clamp(-6, 6)
    return ops.mlp(seen.flatten(0, 1), reward).view(evidence.shape[:2])


def lists(
    memory: ItemMemory, scores: Tensor, kept: Interactions, whole: Interactions, steps: int, k: int
) -> tuple[Tensor, Tensor]:
    """The lists that training judges, and their evidence: what `answer` lists for users whom nobody knows.

    Args:
        memory: of items; each user is left out of it.
        scores: s, of a recommender that has not seen the users (`folds`). [B, M]
        kept, whole: what is shown of the histories, and all of them.

    Returns:
        ids [B, T K], -1 where a list ends, and the evidence [B, T K, 19].
    """
    e, absence = memory.scores(kept, whole)
    c = scores + memory.weight * e + closed(kept)
    ids, _ = ops.topk(c, min(max(steps, 1) * k, memory.n_items))
    return ids, memory.evidence(kept, ids, scores.gather(1, ids.clamp_min(0)), k, absence)


def reward_loss(
    memory: ItemMemory, reward: Layers, ids: Tensor, evidence: Tensor, targets: Interactions, group: Group = ALONE
) -> tuple[Tensor, Tensor, Tensor]:
    """Binary cross-entropy of g: a listed item is real where it was held out. And the mean rewards of real and others.

    Users of whom no held-out item is listed teach nothing and count for nothing. Of each figure, the part of this
    process where a group shares the batch.
    """
    real = (ids >= 0) & closed(targets).gather(1, ids.clamp_min(0)).isinf()
    used = (ids >= 0) & real.any(1, keepdim=True)
    others = used & ~real
    g = judged(memory, reward, evidence)
    which = used.flatten(), real.flatten(), others.flatten()
    totals = group.sums([some.sum() for some in which])
    all_listed, of_real, of_others = (losses.shares(some, total) for some, total in zip(which, totals, strict=True))
    loss = F.binary_cross_entropy_with_logits(g, real.to(g.dtype), reduction="none").flatten()
    rewards = g.detach().sigmoid().flatten()
    return losses.mean(loss, all_listed), losses.mean(rewards, of_real), losses.mean(rewards, of_others)


def closed(x: Interactions) -> Tensor:
    """-inf at the entries of x, else 0. [B, M]"""
    users, items = x.rows.clamp_max(len(x) - 1), x.items.clamp_max(x.n_items - 1)
    values = torch.where(x.items < x.n_items, NO_SCORE, 0.0)
    return torch.zeros(len(x), x.n_items, device=x.items.device).index_put((users, items), values, accumulate=True)
