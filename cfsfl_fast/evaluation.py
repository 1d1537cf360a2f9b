"""Fold-in, recommend, compare with the targets: strong generalisation (Liang et al. 2018)."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cfsfl_fast import metrics
from cfsfl_fast.distributed import ALONE, Group
from cfsfl_fast.interactions import Interactions, as_interactions
from cfsfl_fast.progress import bar
from cfsfl_fast.scarcity import Batches

RANKS = 100
"""Items that are ranked for a user; no metric looks further."""

BATCH_SIZE = 512

Recommend = Callable[[Interactions, int], tuple[Tensor, Tensor]]
"""(histories, n) -> ids [B, n] and scores [B, n], the histories' own items left out."""


@dataclass(frozen=True)
class Evaluation:
    """Every user's metrics. Each [N] float64, N users with a target."""

    recall20: Tensor
    recall50: Tensor
    ndcg100: Tensor

    def per_user(self) -> dict[str, Tensor]:
        """The values [N] by the metric's name."""
        return {"Recall@20": self.recall20, "Recall@50": self.recall50, "NDCG@100": self.ndcg100}

    def summary(self) -> dict[str, metrics.Mean]:
        """Mean and standard error by the metric's name."""
        return {name: metrics.mean(values) for name, values in self.per_user().items()}


def evaluate(
    recommend: Recommend,
    fold_in: Any,
    targets: Any,
    *,
    device: torch.device | str = "cpu",
    batch_size: int = BATCH_SIZE,
    progress: str | None = None,
    group: Group = ALONE,
) -> Evaluation:
    """Recall@20, Recall@50 and NDCG@100 of every user, from fold-in histories and held-out targets.

    Args:
        recommend: gives the ids that are judged, for histories on `device`.
        fold_in, targets: the same users' rows [N, M], in any form that `as_interactions` takes. Users without a target
            are left out.
        batch_size: users at once, fewer where the device has no memory for so many; it changes no figure.
        progress: label of a progress bar; None shows none.
        group: processes that share the users; each gets everyone's figures.

    Raises:
        ValueError: the two do not have the same users and items, or batch_size is below 1.
    """
    if fold_in.shape != targets.shape:
        raise ValueError(f"fold-in and targets must have one shape; got {fold_in.shape} and {targets.shape}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1; got {batch_size}")
    n_items = fold_in.shape[1]
    history, wanted = (as_interactions(x, n_items, device) for x in (fold_in, targets))
    judged = wanted.host_counts.nonzero().squeeze(1)
    begin, end = group.span(len(judged))

    def judge(users: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mine = wanted.take(users)
        hit = metrics.hits(recommend(history.take(users), RANKS)[0], mine)
        recalls = metrics.recall(hit, mine.counts, 20), metrics.recall(hit, mine.counts, 50)
        return *recalls, metrics.ndcg(hit, mine.counts, RANKS)

    found: list[tuple[Tensor, Tensor, Tensor]] = []
    with bar(shown=progress is not None, total=end - begin, unit=" users", desc=progress, leave=False) as shown:
        for figures in Batches()(judged[begin:end], batch_size, judge):
            found.append(figures)
            shown.update(len(figures[0]))
    values = (torch.cat(parts).cpu() for parts in zip(*found, strict=True))
    return Evaluation(*(group.joined(mine, len(judged)) for mine in values))


def seconds_to_answer(
    recommends: Sequence[Recommend], fold_in: Any, *, device: torch.device | str = "cpu", rounds: int = 5
) -> list[float]:
    """How long each of some recommenders takes to rank `RANKS` items for all users of a fold-in.

    The fastest of a few rounds, which take turns: another load on the machine slows all of them alike.

    Args:
        recommends: what is timed.
        fold_in: the users' rows [N, M].
        device: where histories are.
        rounds: how often each is timed.
    """
    history = as_interactions(fold_in, fold_in.shape[1], device)
    batches = [history.take(users) for users in torch.arange(len(history), device=device).split(BATCH_SIZE)]
    fastest = [float("inf")] * len(recommends)
    for _ in range(rounds):
        for i, recommend in enumerate(recommends):
            began = time.perf_counter()
            for batch in batches:
                recommend(batch, RANKS)[0].cpu()  # waits for the device
            fastest[i] = min(fastest[i], time.perf_counter() - began)
    return fastest
