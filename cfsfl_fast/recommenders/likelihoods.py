"""How scores s = u O^T + o are compared with what a user has: one signature, a loss [B] and the list of the scores."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from cfsfl_fast import ops

POSITIVE = 5.0
"""c_j of an item that the user has, in the weighted squared loss; 1 of others (Hu et al. 2008, the paper's values)."""


def multinomial(
    u: Tensor, output: ops.Table, items: Tensor, offsets: Tensor, exclude: ops.CSR | None, k: int, state: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """|x| logsumexp(s) - sum_{j in x} s_j."""
    return ops.linear_nll(u, output, items, offsets, exclude, k, state)


def weighted_squares(
    u: Tensor, output: ops.Table, items: Tensor, offsets: Tensor, exclude: ops.CSR | None, k: int, state: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """sum_j c_j (x_j - s_j)^2, c_j = 5 where x_j = 1, else 1."""
    loss = ops.linear_squares(u, output, items, offsets, exclude, positive=POSITIVE)
    return loss, *ops.linear_topk(u, output, k, exclude, state)


def logistic(
    u: Tensor, output: ops.Table, items: Tensor, offsets: Tensor, exclude: ops.CSR | None, k: int, state: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """sum_j softplus(s_j) - sum_{j in x} s_j: of every item, whether the user has it."""
    loss = ops.linear_logistic(u, output, items, offsets, exclude)
    return loss, *ops.linear_topk(u, output, k, exclude, state)


def rank_weighted(
    u: Tensor, output: ops.Table, items: Tensor, offsets: Tensor, exclude: ops.CSR | None, k: int, state: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """sum_{i in x} Phi(rank_i) sum_{j not in x, s_j > s_i} (s_j - s_i), Phi(r) = sum_{k <= r} 1 / k (WARP)."""
    loss = ops.linear_warp(u, output, items, offsets, exclude)
    return loss, *ops.linear_topk(u, output, k, exclude, state)
