"""What a recommender has to beat."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from cfsfl_fast import ops
from cfsfl_fast.interactions import Interactions


class MostPopular:
    """Every user gets the items that most training users have.

    Args:
        train: histories [U, M], scipy sparse.
    """

    def __init__(self, train: Any) -> None:
        counts = np.bincount(train.indices, minlength=train.shape[1])
        self.weight = torch.from_numpy(counts).float()[:, None]

    def recommend(self, x: Interactions, n: int) -> tuple[Tensor, Tensor]:
        """ids [B, n] and their training users [B, n], the user's own items left out; padded with -1 and -inf."""
        weight = self.weight.to(x.items.device)
        table = ops.Table(weight, weight.new_zeros(len(weight)))
        return ops.linear_topk(weight.new_ones(len(x), 1), table, n, x.csr)


BASELINES = {"most popular": MostPopular}
"""By name; each is fitted to training histories [U, M] and then recommends."""

SEEDED: frozenset[str] = frozenset()
"""Those that draw random numbers."""
