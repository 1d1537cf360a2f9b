"""EASE (Steck 2019) and EDLAE (Steck 2020): item-item weights in closed form.

    P = (X^T X + diag(d))^-1,    B_ij = - P_ij / P_jj,  B_jj = 0,    scores of a user: x^T B
    EASE: d = lambda.    EDLAE: d_j = lambda + p / (1 - p) (X^T X)_jj.

Memory    The Gram matrix becomes P and then B where it stands: 8 M^2 bytes in float64, 4 in float32, and a panel. What
          it takes is logged, and compared with what is free, before it is allocated.
Numerics  Float64 to DOUBLE_ITEMS items, float32 beyond: 6.8 GB at 41,140 items.
"""

from __future__ import annotations

import logging
from typing import Any

import scipy.sparse as sp
import torch
from torch import Tensor

from cfsfl_fast import item_item, ops
from cfsfl_fast.baselines.fitted import Fitted, best, check_memory, counted
from cfsfl_fast.interactions import Interactions

log = logging.getLogger(__name__)

DOUBLE_ITEMS = 20_000
BLOCK = 512
"""Rows of the products at a time, rows and columns of a step of the inversion."""


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
    grid = tuple({"ridge": ridge} for ridge in (50.0, 100.0, 200.0, 500.0, 1000.0, 2000.0))

    def __init__(self, train: Any, *, ridge: float = 500.0, show_progress: bool = False) -> None:
        self.weight = self._fit(train, ridge, 0.0, show_progress)

    def _fit(self, train: Any, ridge: float, dropout: float, show_progress: bool) -> Tensor:
        if not ridge > 0:
            raise ValueError(f"ridge must be above 0; got {ridge}")
        x = counted(train)
        P = gram(x, torch.float64 if x.shape[1] <= DOUBLE_ITEMS else torch.float32, self.label, show_progress)
        diagonal = P.diagonal()
        diagonal.add_(diagonal * (dropout / (1 - dropout)) + ridge)
        item_item.invert(P, BLOCK, label=f"{self.label}, inverse", show_progress=show_progress)
        return _zero_diagonal(P)

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
    grid = tuple({"ridge": ridge, "dropout": p} for p in (0.1, 0.25, 0.33, 0.5) for ridge in (50.0, 200.0, 500.0))

    def __init__(self, train: Any, *, ridge: float = 200.0, dropout: float = 0.25, show_progress: bool = False) -> None:
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be in [0, 1); got {dropout}")
        self.weight = self._fit(train, ridge, dropout, show_progress)


def gram(x: sp.csr_matrix, dtype: torch.dtype, label: str, show_progress: bool) -> Tensor:
    """X^T X, after a look at how much memory is free. [M, M]"""
    n_items = x.shape[1]
    n_bytes = n_items**2 * torch.finfo(dtype).bits // 8
    log.info("%s of %d items: %.2f GB in %s", label, n_items, n_bytes / 1e9, dtype)
    check_memory(n_bytes, f"{label} of {n_items:,} items, {n_items:,} x {n_items:,} {dtype},")
    return item_item.gram(x, x, dtype, BLOCK, label=f"{label}, products", show_progress=show_progress)


def _zero_diagonal(P: Tensor) -> Tensor:
    """B of P, which it takes the place of. [M, M] float32"""
    P.div_(-P.diagonal().clone())
    P.fill_diagonal_(0)
    return P.float()
