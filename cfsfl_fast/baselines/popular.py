"""The most popular items."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cfsfl_fast import ops
from cfsfl_fast.baselines.fitted import Fitted
from cfsfl_fast.datasets.dataset import item_counts
from cfsfl_fast.interactions import Interactions


class MostPopular(Fitted):
    """Every user gets the items that most training users have.

    Args:
        train: histories [U, M], scipy sparse.
    """

    label = "most popular"

    def __init__(self, train: Any, *, show_progress: bool = False) -> None:
        self.weight = torch.from_numpy(item_counts(train)).float()[:, None]

    def recommend(self, x: Interactions, n: int) -> tuple[Tensor, Tensor]:
        """ids [B, n] and their training users [B, n], the user's own items left out; padded with -1 and -inf."""
        weight = self.weight.to(x.items.device)
        table = ops.Table(weight, weight.new_zeros(len(weight)))
        return ops.linear_topk(weight.new_ones(len(x), 1), table, n, x.csr)
