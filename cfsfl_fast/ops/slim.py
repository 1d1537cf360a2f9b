"""Sparse linear methods."""

from __future__ import annotations

from torch import Tensor

from cfsfl_fast.compiling import implementation, selected


def slim(gram: Tensor, first: int, last: int, l1: float, l2: float) -> tuple[Tensor, int]:
    """Columns of SLIM (Ning and Karypis 2011): argmin over w >= 0, w_j = 0 of

        1/2 |X_j - X w|^2 + l2 / 2 |w|^2 + l1 sum w,    j = first .. last - 1.

    Args:
        gram: X^T X of X >= 0, on the CPU. [M, M]
        first, last: which columns.
        l1, l2: penalties; l1 >= 0, l2 >= 0.

    Returns:
        the weights, one item's in a row [last - first, M], and how many items did not converge.
    """
    found: tuple[Tensor, int] = implementation(selected(gram.device)).slim(gram, first, last, l1, l2)
    return found
