"""Item-item matrices: how often items occur together, and the inverse of such a matrix where it stands."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from cfsfl_fast.progress import bar


def gram(
    x: Any, weighted: Any, dtype: torch.dtype, block: int, *, label: str = "products", show_progress: bool = False
) -> Tensor:
    """x^T weighted, some rows at a time, so that no other matrix of its size exists. [M, M]

    Args:
        x: histories [U, M], scipy CSR.
        weighted: the same, or with its rows weighted.
        dtype: of the matrix.
        block: rows at a time.
        label: of the progress bar.
        show_progress: a bar on stderr, where that is a terminal.
    """
    by_item, n_items = x.T.tocsr(), x.shape[1]
    found = torch.empty(n_items, n_items, dtype=dtype)
    for start in bar(range(0, n_items, block), shown=show_progress, desc=label, leave=False):
        rows = (by_item[start : start + block] @ weighted).toarray()
        found[start : start + block] = torch.from_numpy(np.ascontiguousarray(rows))
    return found


def invert(A: Tensor, block: int, *, label: str = "inverse", show_progress: bool = False) -> None:
    """Overwrites a matrix by its inverse: block sweeps over the lower triangle.

    A sweep of block k: A_kk to -D with D = A_kk^-1, A_ik to A_ik D, every other A_ij to A_ij - A_ik D A_kj; after all
    of them A is the negative inverse. M^3 flops, as Cholesky's way, in products that share the work among all threads,
    with no second matrix. (OpenBLAS's spotrf ends the process at 41,000 items on two threads.)

    Args:
        A: symmetric positive definite. [M, M]
        block: rows and columns of a sweep.
        label: of the progress bar.
        show_progress: a bar on stderr, where that is a terminal.

    Raises:
        torch.linalg.LinAlgError: A is not positive definite.
    """
    n = len(A)
    for start in bar(range(0, n, block), shown=show_progress, desc=label, leave=False):
        stop = min(start + block, n)
        panel = torch.cat([A[start:stop, :start].T, A[start:, start:stop]])  # A_ik of every i
        own = panel[start:stop].tril()
        D = torch.cholesky_inverse(torch.linalg.cholesky(own + own.tril(-1).T))
        scaled = panel @ D
        for first in range(0, n, block):
            last = min(first + block, n)
            A[first:, first:last].addmm_(scaled[first:], panel[first:last].T, alpha=-1)
        A[stop:, start:stop] = scaled[stop:]
        A[start:stop, :start] = scaled[:start].T
        A[start:stop, start:stop] = -D
    for start in range(0, n, block):
        A[start:, start : start + block].neg_()
        own = A[start : start + block, start : start + block]
        own.copy_(own.tril() + own.tril(-1).T)
        A[start : start + block, start + block :] = A[start + block :, start : start + block].T
