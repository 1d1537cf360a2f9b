"""EASE (Steck 2019) and EDLAE (Steck 2020): item-item weights in closed form.

    P = (X^T X + diag(d))^-1,    B_ij = - P_ij / P_jj,  B_jj = 0,    scores of a user: x^T B
    EASE: d = lambda.    EDLAE: d_j = lambda + p / (1 - p) (X^T X)_jj.

What P takes of memory and time, and its dtypes: `item_item`. P becomes B where it stands.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from cfsfl_fast import ops
from cfsfl_fast.baselines.fitted import Fitted, best, counted
from cfsfl_fast.interactions import Interactions
from cfsfl_fast.item_item import ridge_inverse


class EASE(Fitted):
    """The linear autoencoder x^T B of least squares with a zero diagonal and a ridge penalty.

    Args:
        train: histories [U, M], scipy sparse.
        ridge: lambda, above 0.

    Raises:
        ValueError: ridge is not above 0.
        MemoryError: the item-item matrix does not fit.
    """

    label = "EASE"
    ladders: ClassVar = {"ridge": (20.0, 50.0, 100.0, 200.0, 500.0, 1000.0, 2000.0)}

    def __init__(self, train: Any, *, ridge: float = 500.0, show_progress: bool = False) -> None:
        self.weight = self._fit(train, ridge, 0.0, show_progress)

    def _fit(self, train: Any, ridge: float, dropout: float, show_progress: bool) -> Tensor:
        if not ridge > 0:
            raise ValueError(f"ridge must be above 0; got {ridge}")
        x = counted(train)
        users = np.bincount(x.indices, minlength=x.shape[1])
        P = ridge_inverse(x, ridge + dropout / (1 - dropout) * users, label=self.label, show_progress=show_progress)
        P.div_(-P.diagonal().clone())
        return P.fill_diagonal_(0)

    def recommend(self, x: Interactions, n: int) -> tuple[Tensor, Tensor]:
        """ids [B, n] and scores [B, n], the users' own items left out; padded with -1 and -inf."""
        self.weight = self.weight.to(x.items.device)
        with torch.no_grad():
            return best(ops.row_bag(ops.Table(self.weight), *x.csr), x, n)


class EDLAE(EASE):
    """EASE whose penalty is that of training with dropout p on the input: frequent items pay more.

    Args:
        train: histories [U, M], scipy sparse.
        ridge: lambda, above 0.
        dropout: p, in [0, 1).

    Raises:
        ValueError: ridge or dropout is out of range.
        MemoryError: the item-item matrix does not fit.
    """

    label = "EDLAE"
    ladders: ClassVar = {**EASE.ladders, "dropout": (0.1, 0.25, 0.33, 0.5, 0.67)}

    def __init__(self, train: Any, *, ridge: float = 200.0, dropout: float = 0.25, show_progress: bool = False) -> None:
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be in [0, 1); got {dropout}")
        self.weight = self._fit(train, ridge, dropout, show_progress)
