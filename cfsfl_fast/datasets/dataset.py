"""What a prepared data set is: binary histories of training users, and held-out users with fold-in and targets."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

_QUANTILES = (0.0, 0.25, 0.5, 0.75, 0.9, 0.99, 1.0)
_BLOCK = 1 << 20
"""Events that are looked at together, where all of them may be more than memory holds."""


@dataclass(frozen=True)
class HeldOut:
    """Users that training never sees; row n of every part is the user `user_ids[n]`.

    Attributes:
        fold_in: the history that a recommender may look at, CSR [N, M] float32 ones.
        targets: the items to be found, CSR [N, M] float32 ones; at least one in every row.
        user_ids: external ids [N], int64 or str.
    """

    fold_in: sp.csr_matrix
    targets: sp.csr_matrix
    user_ids: NDArray[Any]


@dataclass(frozen=True)
class Dataset:
    """Training users and two groups of held-out users over the same M items.

    Matrices hold ones, indices ascending within rows; index arrays are int32 as long as the events fit.

    Attributes:
        name: what the data set is called.
        train: CSR [U, M] float32 ones.
        validation, test: held-out users.
        item_ids: external ids [M], int64 or str: column j is the item `item_ids[j]`.
        user_ids: external ids of the training users [U].
        report: counts of every stage of the preparation.
    """

    name: str
    train: sp.csr_matrix
    validation: HeldOut
    test: HeldOut
    item_ids: NDArray[Any]
    user_ids: NDArray[Any]
    report: dict[str, Any] = field(default_factory=dict)

    @property
    def n_items(self) -> int:
        """M."""
        return int(self.train.shape[1])

    @property
    def n_users(self) -> int:
        """U, the training users."""
        return int(self.train.shape[0])

    def matrices(self) -> dict[str, sp.csr_matrix]:
        """The five matrices by name, in the order that they are stored."""
        return {
            "train": self.train,
            "validation_fold_in": self.validation.fold_in,
            "validation_targets": self.validation.targets,
            "test_fold_in": self.test.fold_in,
            "test_targets": self.test.targets,
        }

    def ids(self) -> dict[str, NDArray[Any]]:
        """The four arrays of external ids by name."""
        return {
            "item_ids": self.item_ids,
            "train_user_ids": self.user_ids,
            "validation_user_ids": self.validation.user_ids,
            "test_user_ids": self.test.user_ids,
        }

    def validate(self) -> None:
        """Checks everything that the layout promises, in time linear in the events.

        Raises:
            ValueError: shapes that do not fit, ids out of range, rows not ascending or with duplicates, a target that
                is also fold-in, a row without a target, or an id that is used twice.
        """
        for name, matrix in self.matrices().items():
            check_matrix(matrix, self.n_items, f"{self.name}: {name}")
            _check_rows(matrix, f"{self.name}: {name}")
        for part, group in (("validation", self.validation), ("test", self.test)):
            n_rows = len(group.user_ids)
            if not group.fold_in.shape[0] == group.targets.shape[0] == n_rows:
                shapes = f"{group.fold_in.shape[0]}, {group.targets.shape[0]} and {n_rows}"
                raise ValueError(f"{self.name}: {part} fold-in, targets and user ids have {shapes} rows")
            if (np.diff(group.targets.indptr) == 0).any():
                raise ValueError(f"{self.name}: {part} has a user without a target")
            if group.fold_in.multiply(group.targets).nnz:
                raise ValueError(f"{self.name}: {part} has a target that is also in the fold-in")
        if len(self.item_ids) != self.n_items:
            raise ValueError(f"{self.name}: {len(self.item_ids)} item ids for {self.n_items} items")
        if len(self.user_ids) != self.n_users:
            raise ValueError(f"{self.name}: {len(self.user_ids)} user ids for {self.n_users} training users")
        if len(np.unique(self.item_ids)) != self.n_items:
            raise ValueError(f"{self.name}: an item id is used twice")
        everyone = np.concatenate([self.user_ids, self.validation.user_ids, self.test.user_ids])
        if len(np.unique(everyone)) != len(everyone):
            raise ValueError(f"{self.name}: a user is in more than one part, or twice in one")

    def describe(self) -> str:
        """A table to read: sizes, density, how events spread over users and items, and the held-out users."""
        train = self.train
        per_user = np.diff(train.indptr)
        per_item = item_counts(train)
        density = train.nnz / max(self.n_users * self.n_items, 1)
        lines = [
            f"{self.name}: {self.n_users:,} training users x {self.n_items:,} items, {train.nnz:,} events, "
            f"density {density:.3%}",
            "",
            f"{'training':<14}" + "".join(f"{_quantile_name(q):>9}" for q in _QUANTILES) + f"{'mean':>10}",
            f"{'items per user':<14}" + _quantile_row(per_user),
            f"{'users per item':<14}" + _quantile_row(per_item),
            "",
            f"share of events  most popular 1 % of the items {_top_share(per_item, 0.01):6.1%}, "
            f"10 % {_top_share(per_item, 0.1):6.1%}",
            "",
            f"{'held out':<12}{'users':>9}{'skipped':>9}{'fold-in':>12}{'targets':>12}{'targets per user':>18}",
        ]
        for part, group in (("validation", self.validation), ("test", self.test)):
            n, skipped = len(group.user_ids), self.report.get(part, {}).get("skipped", 0)
            lines.append(
                f"{part:<12}{n:>9,}{skipped:>9,}{group.fold_in.nnz:>12,}{group.targets.nnz:>12,}"
                f"{group.targets.nnz / max(n, 1):>18.1f}"
            )
        return "\n".join(lines)


def binary_csr(indices: NDArray[Any], indptr: NDArray[Any], n_items: int) -> sp.csr_matrix:
    """A CSR of ones [len(indptr) - 1, n_items] over sorted rows, without copying `indices`.

    The ones are one number in memory, read-only.
    """
    ones = np.broadcast_to(np.float32(1), len(indices))
    matrix = sp.csr_matrix((ones, indices, indptr), shape=(len(indptr) - 1, n_items), copy=False)
    matrix.has_sorted_indices = True
    matrix.has_canonical_format = True
    return matrix


def pairs_to_csr(rows: NDArray[Any], columns: NDArray[Any], shape: tuple[int, int]) -> sp.csr_matrix:
    """A CSR of float32 ones with sorted rows from pairs [n] in any order; a pair that occurs twice counts once."""
    matrix = sp.csr_matrix((np.ones(len(rows), np.float32), (rows, columns)), shape=shape)
    matrix.sort_indices()
    matrix.data.fill(1.0)
    return matrix


def item_counts(matrix: sp.csr_matrix) -> NDArray[np.int64]:
    """Users of every item, without a copy of the indices. [M]"""
    counts = np.zeros(matrix.shape[1], np.int64)
    for begin in range(0, matrix.nnz, _BLOCK):
        counts += np.bincount(matrix.indices[begin : begin + _BLOCK], minlength=matrix.shape[1])
    return counts


def check_counts(name: str, claimed: int, held: int, what: str, by: str) -> None:
    """Refuses a count that takes memory and that what a file holds does not explain: a damaged one, or a trap.

    Raises:
        ValueError: it is negative, or above 2^16 and 16 times what the file holds.
    """
    if not 0 <= claimed <= max(1 << 16, 16 * held):
        raise ValueError(f"{name}: {claimed:,} {what} are claimed, but the file holds {held:,} {by}")


def check_matrix(matrix: sp.csr_matrix, n_items: int, name: str) -> None:
    """What must hold before compiled code may touch the matrix.

    Raises:
        ValueError: indptr not ascending from 0 to the number of events, or an item id outside 0 .. n_items - 1.
    """
    if matrix.shape[1] != n_items:
        raise ValueError(f"{name}: expected {n_items} columns; found {matrix.shape[1]}")
    indptr, indices = matrix.indptr, matrix.indices
    if indptr[0] != 0 or indptr[-1] != len(indices) or (indptr[1:] < indptr[:-1]).any():
        raise ValueError(f"{name}: expected row starts ascending from 0 to {len(indices)}; found others")
    if len(indices) and indices.view(f"u{indices.itemsize}").max() >= n_items:  # a negative id counts as a huge one
        found = f"{indices.min()} .. {indices.max()}"
        raise ValueError(f"{name}: expected item indices in 0 .. {n_items - 1}; found {found}")


def _check_rows(matrix: sp.csr_matrix, name: str) -> None:
    starts = matrix.indptr[1:-1]
    for begin in range(0, matrix.nnz - 1, _BLOCK):
        rising = np.diff(matrix.indices[begin : begin + _BLOCK + 1]) > 0
        low, high = np.searchsorted(starts, (begin + 1, begin + len(rising) + 1))
        rising[starts[low:high] - begin - 1] = True  # a new row may start lower
        if not rising.all():
            row = int(np.searchsorted(matrix.indptr, begin + np.argmin(rising), side="right")) - 1
            raise ValueError(f"{name}: row {row} is not ascending or names an item twice")
    values = matrix.data[:1] if matrix.data.strides == (0,) else matrix.data
    if not (values == 1).all():
        raise ValueError(f"{name}: expected ones; found other values")


def _quantile_name(q: float) -> str:
    return {0.0: "min", 0.5: "median", 1.0: "max"}.get(q, f"{q:.0%}")


def _quantile_row(counts: NDArray[Any]) -> str:
    if len(counts) == 0:
        return ""
    return "".join(f"{value:>9,.0f}" for value in np.quantile(counts, _QUANTILES)) + f"{counts.mean():>10,.1f}"


def _top_share(per_item: NDArray[Any], share: float) -> float:
    n_top = max(1, round(share * len(per_item)))
    return float(np.sort(per_item)[::-1][:n_top].sum() / max(per_item.sum(), 1))
