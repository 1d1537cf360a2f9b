"""Interactions that come as a matrix: `.npz` of `scipy.sparse.save_npz`, and the compact delta-coded `.npz`.

The compact layout: `n_users`, `n_items`; for each matrix NAME `NAME_counts` (items of each row) and `NAME_deltas` (rows
one after the other, items ascending, each item minus the one before it in its row). Optional: `item_ids`, `user_ids`,
and `NAME_first_user`, the user that row 0 of NAME is.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from cfsfl_fast.arrays import check_npz, zip_members
from cfsfl_fast.datasets.dataset import Dataset, HeldOut, binary_csr, check_counts, check_matrix, pairs_to_csr
from cfsfl_fast.datasets.events import Events, collect
from cfsfl_fast.datasets.table import Chunk, Ids

SPLIT_NAMES = ("train", "vad_tr", "vad_te", "test_tr", "test_te")


def npz_format(path: Path) -> str | None:
    """ "compact" or "scipy" by the names of the arrays inside, None where the file is no such `.npz`."""
    names = {member.filename for member in zip_members(path)}
    if {"format.npy", "shape.npy", "data.npy"} <= names:
        return "scipy"
    if {"n_users.npy", "n_items.npy"} <= names and any(name.endswith("_counts.npy") for name in names):
        return "compact"
    if names and all(name.endswith(".npy") for name in names):
        raise ValueError(f"{path.name}: expected a saved sparse matrix or the compact layout; found {sorted(names)}")
    return None


def matrix_events(matrix: Any, name: str) -> Events:
    """Events of a sparse matrix, users x items, row after row. Explicit zeros are dropped and counted.

    Raises:
        ValueError: not two-dimensional, damaged, or values that are no finite real numbers.
    """
    if not sp.issparse(matrix) or len(matrix.shape) != 2:
        raise ValueError(f"{name}: expected a sparse matrix of users x items; found {type(matrix).__name__}")
    if matrix.dtype.kind not in "biuf":
        raise ValueError(f"{name}: expected real numbers as ratings; found {matrix.dtype}")
    if matrix.format in ("csr", "csc", "bsr"):
        try:
            matrix.check_format(full_check=True)  # compiled code walks it from here on
        except ValueError as error:
            raise ValueError(f"{name}: damaged sparse matrix ({error})") from error
    if matrix.format == "csr":
        rows = np.repeat(np.arange(matrix.shape[0], dtype=np.int64), np.diff(matrix.indptr))
        items, values = matrix.indices, matrix.data.astype(np.float64)
    else:  # not by tocsr: it takes memory for every row that the shape claims
        cells = matrix.tocoo()
        order = np.lexsort((cells.col, cells.row))
        rows, items, values = cells.row[order].astype(np.int64), cells.col[order], cells.data[order].astype(np.float64)
    finite = np.isfinite(values)
    if not finite.all():
        at = int(np.argmin(finite))
        raise ValueError(f"{name}, row {rows[at]}: expected finite ratings; found {values[at]}")
    keep = values != 0
    chunk = Chunk(rows[keep], items[keep].astype(np.int64), values[keep])
    return collect([chunk], name, explicit_zeros=int((~keep).sum()))


def read_scipy(path: Path) -> Events:
    """Events of a matrix that `scipy.sparse.save_npz` wrote.

    Raises:
        ValueError: a damaged file, or what `matrix_events` refuses.
    """
    check_npz(path)
    try:
        matrix = sp.load_npz(path)
    except Exception as error:  # whatever SciPy stumbles over, it is the file
        raise ValueError(f"{path.name}: not a readable sparse matrix ({error})") from error
    return matrix_events(matrix, path.name)


class Compact:
    """A compact `.npz`, read whole.

    Attributes:
        matrices: for each NAME its CSR [n_rows, n_items] and the user of row 0.
        user_ids, item_ids: external ids; the indices themselves where the file brings none.

    Raises:
        ValueError: a damaged file, counts and deltas that do not fit, or ids out of range.
    """

    def __init__(self, path: Path) -> None:
        self.name = path.name
        check_npz(path)
        try:
            with np.load(path, allow_pickle=False) as stored:
                arrays = {key: stored[key] for key in stored.files}
        except Exception as error:  # whatever NumPy stumbles over, it is the file
            raise ValueError(f"{path.name}: not a readable compact data set ({error})") from error
        self.n_users, self.n_items = (self._number(arrays, key) for key in ("n_users", "n_items"))
        names = [key.removesuffix("_counts") for key in arrays if key.endswith("_counts")]
        check_counts(self.name, self.n_users, sum(arrays[f"{name}_counts"].size for name in names), "users", "rows")
        n_events = sum(arrays.get(f"{name}_deltas", np.empty(0)).size for name in names)
        check_counts(self.name, self.n_items, n_events, "items", "events")
        self.matrices = {name: self._decode(arrays, name) for name in names}
        self.user_ids = self._ids(arrays, "user_ids", self.n_users)
        self.item_ids = self._ids(arrays, "item_ids", self.n_items)

    @property
    def is_split(self) -> bool:
        """Whether the file brings a finished split."""
        return set(SPLIT_NAMES) <= set(self.matrices)

    def events(self) -> Events:
        """The union of all matrices, in the order of the file."""

        def chunks() -> Iterator[Chunk]:
            for matrix, first in self.matrices.values():
                rows = first + np.repeat(np.arange(matrix.shape[0]), np.diff(matrix.indptr))
                users, items = self.user_ids[rows], self.item_ids[matrix.indices]
                yield Chunk(_as_read(users), _as_read(items), None)

        return collect(chunks(), self.name)

    def dataset(self) -> Dataset:
        """The split that the file brings. Held-out users without a target are skipped and counted."""
        report: dict[str, Any] = {}
        train, first = self.matrices["train"]
        report["train"] = {"users": train.shape[0], "items": self.n_items, "events": train.nnz}
        groups = []
        for part, short in (("validation", "vad"), ("test", "test")):
            (fold_in, first_fold_in), (targets, first_targets) = (
                self.matrices[f"{short}_tr"],
                self.matrices[f"{short}_te"],
            )
            if fold_in.shape != targets.shape or first_fold_in != first_targets:
                raise ValueError(f"{self.name}: {short}_tr and {short}_te name different users")
            user_ids = self.user_ids[first_targets : first_targets + targets.shape[0]]
            group = with_targets(fold_in, targets, user_ids)
            report[part] = held_out_counts(group, targets.shape[0])
            groups.append(group)
        users = self.user_ids[first : first + train.shape[0]]
        return Dataset(self.name, train, groups[0], groups[1], self.item_ids, users, report)

    def _decode(self, arrays: dict[str, NDArray[Any]], name: str) -> tuple[sp.csr_matrix, int]:
        where = f"{self.name}: {name}"
        if f"{name}_deltas" not in arrays:
            raise ValueError(f"{where}: {name}_counts without {name}_deltas")
        counts, deltas = (self._integers(arrays, f"{name}_{part}") for part in ("counts", "deltas"))
        first = self._number(arrays, f"{name}_first_user") if f"{name}_first_user" in arrays else 0
        inside = len(counts) == 0 or 0 <= counts.min() <= counts.max() <= len(deltas)
        if not inside or counts.sum() != len(deltas):
            raise ValueError(f"{where}: the counts add up to {counts.sum()}; found {len(deltas)} deltas")
        if first < 0 or first + len(counts) > self.n_users:
            raise ValueError(f"{where}: users {first} .. {first + len(counts) - 1}, but n_users is {self.n_users}")
        indptr = np.concatenate(([0], np.cumsum(counts)))
        running = np.concatenate(([0], np.cumsum(deltas)))
        indices = running[1:] - np.repeat(running[indptr[:-1]], counts)
        inner = np.ones(len(deltas), np.bool_)
        inner[indptr[:-1][counts > 0]] = False
        if (deltas[inner] <= 0).any():
            raise ValueError(f"{where}: items of a row must ascend")
        if len(indices) and not 0 <= indices.min() <= indices.max() < self.n_items:
            found = f"{indices.min()} .. {indices.max()}"
            raise ValueError(f"{where}: expected item indices in 0 .. {self.n_items - 1}; found {found}")
        matrix = binary_csr(indices.astype(np.int32), indptr, self.n_items)
        check_matrix(matrix, self.n_items, where)
        return matrix, first

    def _number(self, arrays: dict[str, NDArray[Any]], key: str) -> int:
        if key not in arrays or arrays[key].size != 1 or arrays[key].dtype.kind not in "iu":
            found = f"{arrays[key].dtype} {arrays[key].shape}" if key in arrays else "none"
            raise ValueError(f"{self.name}: expected one whole number as {key}; found {found}")
        return int(arrays[key].ravel()[0])

    def _integers(self, arrays: dict[str, NDArray[Any]], key: str) -> NDArray[np.int64]:
        if arrays[key].ndim != 1 or arrays[key].dtype.kind not in "iu":
            found = f"{arrays[key].dtype} {arrays[key].shape}"
            raise ValueError(f"{self.name}: expected a row of whole numbers as {key}; found {found}")
        return arrays[key].astype(np.int64)

    def _ids(self, arrays: dict[str, NDArray[Any]], key: str, size: int) -> Ids:
        if key not in arrays:
            return np.arange(size, dtype=np.int64)
        ids = arrays[key]
        if ids.shape != (size,) or ids.dtype.kind not in "iuU":
            raise ValueError(f"{self.name}: expected {size} integers or texts as {key}; found {ids.dtype} {ids.shape}")
        if ids.dtype.kind == "u" and ids.size and ids.max() >= 2**63:
            raise ValueError(f"{self.name}: expected {key} below 2^63; found {ids.max()}")
        if len(np.unique(ids)) != size:
            raise ValueError(
                f"{self.name}: expected every id once in {key}; found {size - len(np.unique(ids))} repeated"
            )
        return ids if ids.dtype.kind == "U" else ids.astype(np.int64)


def with_targets(fold_in: sp.csr_matrix, targets: sp.csr_matrix, user_ids: Ids) -> HeldOut:
    """The held-out users that have a target; the others are left out."""
    rows = np.flatnonzero(np.diff(targets.indptr))
    if len(rows) == targets.shape[0]:
        return HeldOut(fold_in, targets, user_ids)
    return HeldOut(_rows(fold_in, rows), _rows(targets, rows), user_ids[rows])


def held_out_counts(group: HeldOut, held_out: int) -> dict[str, int]:
    """The entry of a report for a split that was made elsewhere; `held_out` counts the skipped users too."""
    users = len(group.user_ids)
    counts = {"held_out": held_out, "skipped": held_out - users, "users": users}
    return {**counts, "fold_in_events": group.fold_in.nnz, "target_events": group.targets.nnz}


def _rows(matrix: sp.csr_matrix, rows: NDArray[Any]) -> sp.csr_matrix:
    old = np.repeat(np.arange(matrix.shape[0]), np.diff(matrix.indptr))
    rank = np.full(matrix.shape[0], -1, np.int64)
    rank[rows] = np.arange(len(rows))
    kept = rank[old] >= 0
    return pairs_to_csr(rank[old[kept]], matrix.indices[kept], (len(rows), matrix.shape[1]))


def _as_read(ids: Ids) -> Ids:
    return np.char.encode(ids, "utf-8") if ids.dtype.kind == "U" else ids
