"""Recall and NDCG of ranked ids: pure functions (Liang et al. 2018)."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from cfsfl_fast.interactions import Interactions


class Mean(NamedTuple):
    """A mean over users and its standard error."""

    value: float
    error: float

    def __str__(self) -> str:
        return f"{self.value:.4f} +- {self.error:.4f}"


def hits(ids: Tensor, targets: Interactions) -> Tensor:
    """Which recommended ids are targets. ids [B, N] int64, -1 where a list ends -> [B, N] bool"""
    width = targets.n_items + 1
    if len(targets.items) == 0:
        return torch.zeros_like(ids, dtype=torch.bool)
    keys = targets.rows * width + targets.items
    asked = torch.arange(len(ids), device=ids.device)[:, None] * width + ids.where(ids >= 0, targets.n_items)
    place = torch.searchsorted(keys, asked).clamp_max_(len(keys) - 1)
    return keys[place] == asked


def recall(hit: Tensor, n_targets: Tensor, r: int) -> Tensor:
    """Recall@R = |top R and targets| / min(R, |targets|) of each user. [B] float64; NaN without a target"""
    return hit[:, :r].sum(1) / n_targets.clamp_max(r).double()


def ndcg(hit: Tensor, n_targets: Tensor, r: int) -> Tensor:
    """Binary NDCG@R, the ideal truncated at min(|targets|, R), of each user. [B] float64; NaN without a target"""
    discount = 1 / torch.log2(torch.arange(2, r + 2, dtype=torch.float64))
    ideal = torch.cat([discount.new_zeros(1), discount.cumsum(0)]).to(hit.device)  # a GPU's own has no fixed order
    gain = (hit[:, :r] * discount[: hit.shape[1]].to(hit.device)).sum(1)
    return gain / ideal[n_targets.clamp_max(r)]


def mean(values: Tensor) -> Mean:
    """Mean and standard error of a value per user."""
    n = len(values)
    error = float(values.std()) / math.sqrt(n) if n > 1 else math.nan
    return Mean(float(values.mean()) if n else math.nan, error)
