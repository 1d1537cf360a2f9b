"""Item-item matrices: how often items occur together, and the inverse of that with a ridge.

    P = (x^T W x + D)^-1,    W = diag(w), D = diag(d)                                      M^3 operations
      = D^-1/2 (I - S^T (I + S S^T)^-1 S) D^-1/2,    S = W^1/2 x D^-1/2 [U, M]             U^3, and sparse products

The second (Woodbury's identity) inverts a row per user instead of one per item; it is taken where that is less work.

Memory    P takes 4 M^2 bytes, and 12 M^2 while it is made in float64; by users 4 or 8 U^2 beside it. That is compared
          with what is free before anything is allocated.
Numerics  Matrices of up to DOUBLE_ROWS rows are inverted in float64, larger ones in float32.
"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cfsfl_fast.progress import bar
from cfsfl_fast.scarcity import check_free

log = logging.getLogger(__name__)

BLOCK = 512
"""Rows of the products at a time, rows and columns of a step of the inversion."""

DOUBLE_ROWS = 20_000

SPARSE_COST = 100
"""Operations of the inversion in the time of one of a product of a sparse and a dense matrix."""


def ridge_inverse(
    x: Any, ridge: NDArray[Any], weights: NDArray[Any] | None = None, *, label: str, show_progress: bool = False
) -> Tensor:
    """P. [M, M] float32

    Args:
        x: histories, all ones, scipy CSR. [U, M]
        ridge: d. [M]
        weights: w, above 0; None: all 1. [U]
        label: what P is for, in messages.
        show_progress: bars on stderr, where that is a terminal.

    Raises:
        torch.linalg.LinAlgError: x^T W x + D is not positive definite.
        MemoryError: a matrix does not fit.
    """
    n_users, n_items = x.shape
    check_free(ridge_inverse_bytes(n_users, n_items, x.nnz), f"{label} of {n_items:,} items")
    if _by_users(n_users, n_items, x.nnz) and bool((ridge > 0).all()):
        return _ridge_inverse_by_users(x, ridge, weights, label, show_progress)
    weighted = x if weights is None else x.multiply(weights[:, None]).tocsr()
    P = gram(x, weighted, _dtype(n_items), label=label, show_progress=show_progress)
    P.diagonal().add_(torch.from_numpy(ridge))
    invert(P, label=f"{label}, inverse", show_progress=show_progress)
    return P.float()


def _ridge_inverse_by_users(
    x: Any, ridge: NDArray[Any], weights: NDArray[Any] | None, label: str, show_progress: bool
) -> Tensor:
    n_users, n_items = x.shape
    scale = ridge**-0.5
    S_T = x.T.multiply(scale[:, None])
    if weights is not None:
        S_T = S_T.multiply(weights**0.5)
    S_T, dtype = S_T.tocsr(), _dtype(n_users)
    P = torch.empty(n_items, n_items)
    K = gram(S_T, S_T, dtype, label=f"{label}, by users", show_progress=show_progress)
    K.diagonal().add_(1)
    invert(K, label=f"{label}, inverse", show_progress=show_progress)
    inner, S_T, scales = K.numpy(), S_T.astype(K.numpy().dtype), torch.from_numpy(scale).to(dtype)
    for start in bar(range(0, n_items, BLOCK), shown=show_progress, desc=f"{label}, by items", leave=False):
        stop = min(start + BLOCK, n_items)
        rows = S_T[start:stop] @ inner  # [block, U]
        below = torch.from_numpy(S_T[start:] @ np.ascontiguousarray(rows.T)).neg_()  # [M - start, block]
        below.diagonal().add_(1)
        P[start:, start:stop] = below.mul_(scales[start:, None]).mul_(scales[start:stop])
        _mirror(P, start, stop)
    return P


def ridge_inverse_bytes(n_users: int, n_items: int, n_events: float) -> int:
    """What P takes while it is made, with all that is beside it then."""
    of_items, of_users = n_items**2, n_users**2
    if _by_users(n_users, n_items, n_events):
        return 4 * of_items + _dtype(n_users).itemsize * of_users
    return (12 if _dtype(n_items) == torch.float64 else 4) * of_items


def gram(x: Any, weighted: Any, dtype: torch.dtype, *, label: str, show_progress: bool = False) -> Tensor:
    """x^T weighted, some rows at a time, so that no other matrix of its size exists. [M, M]

    Args:
        x: [U, M], scipy CSR.
        weighted: the same, or with its rows weighted.
        dtype: of the result.
        label, show_progress: as above.

    Raises:
        MemoryError: the result does not fit.
    """
    by_item, n_items = x.T.tocsr(), x.shape[1]
    n_bytes = n_items**2 * dtype.itemsize
    log.info("%s: %d x %d, %.2f GB in %s", label, n_items, n_items, n_bytes / 1e9, dtype)
    check_free(n_bytes, f"{label}, {n_items:,} x {n_items:,} {dtype},")
    found = torch.empty(n_items, n_items, dtype=dtype)
    for start in bar(range(0, n_items, BLOCK), shown=show_progress, desc=f"{label}, products", leave=False):
        rows = (by_item[start : start + BLOCK] @ weighted).toarray()
        found[start : start + BLOCK] = torch.from_numpy(np.ascontiguousarray(rows))
    return found


def invert(A: Tensor, *, label: str = "inverse", show_progress: bool = False) -> None:
    """Overwrites a matrix by its inverse: block sweeps over the lower triangle.

    A sweep of block k: A_kk to -D with D = A_kk^-1, A_ik to A_ik D, every other A_ij to A_ij - A_ik D A_kj; after all
    of them A is the negative inverse. M^3 flops, as Cholesky's way, in products that share the work among all threads,
    with no second matrix. (OpenBLAS's spotrf ends the process at 41,000 items on two threads.)

    Args:
        A: symmetric positive definite. [M, M]
        label, show_progress: as above.

    Raises:
        torch.linalg.LinAlgError: A is not positive definite.
    """
    n = len(A)
    for start in bar(range(0, n, BLOCK), shown=show_progress, desc=label, leave=False):
        stop = min(start + BLOCK, n)
        panel = torch.cat([A[start:stop, :start].T, A[start:, start:stop]])  # A_ik of every i
        own = panel[start:stop].tril()
        D = torch.cholesky_inverse(torch.linalg.cholesky(own + own.tril(-1).T))
        scaled = panel @ D
        for first in range(0, n, BLOCK):
            last = min(first + BLOCK, n)
            A[first:, first:last].addmm_(scaled[first:], panel[first:last].T, alpha=-1)
        A[stop:, start:stop] = scaled[stop:]
        A[start:stop, :start] = scaled[:start].T
        A[start:stop, start:stop] = -D
    for start in range(0, n, BLOCK):
        A[start:, start : start + BLOCK].neg_()
        _mirror(A, start, min(start + BLOCK, n))


def _mirror(A: Tensor, start: int, stop: int) -> None:
    """Some columns below the diagonal become the rows beside it."""
    own = A[start:stop, start:stop]
    own.copy_(own.tril() + own.tril(-1).T)
    A[start:stop, stop:] = A[stop:, start:stop].T


def _by_users(n_users: int, n_items: int, n_events: float) -> bool:
    """Whether the inverse by users is less work."""
    return n_users**3 + SPARSE_COST * 2 * n_events * (n_users + n_items) < n_items**3


def _dtype(n_rows: int) -> torch.dtype:
    """Of an inversion."""
    return torch.float64 if n_rows <= DOUBLE_ROWS else torch.float32
