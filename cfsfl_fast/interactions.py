"""Histories as CSR rows: what users may hand in, checked, repaired and placed on a device."""

from __future__ import annotations

import functools
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True, eq=False)
class Interactions:
    """The items of B users, ascending and unique within a user: x in {0,1}^(B x M), sparse.

    items: [E] int64 in 0..M-1. offsets: [B + 1] int64; user b owns items[offsets[b] : offsets[b + 1]].
    fixed: shapes do not depend on what the rows hold, and nothing here waits for the device. Then E is a capacity: what
    stands behind offsets[-1] is room, entries that belong to nobody and hold M; values per entry are 0 there, and a
    selection has the same E.

    Rows that `as_interactions(..., as_stored=True)` gives hold items as int32 where their matrix does: they are for
    `take`, whose answer has int64.
    """

    items: Tensor
    offsets: Tensor
    n_items: int
    fixed: bool = False

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def csr(self) -> tuple[Tensor, Tensor]:
        """(items, offsets), as operations take rows."""
        return self.items, self.offsets

    @property
    def counts(self) -> Tensor:
        """|x| of every user. [B]"""
        return self.offsets.diff()

    @functools.cached_property
    def host_counts(self) -> Tensor:
        """`counts` in the host's memory: waits for the device once. [B]"""
        return self.counts.cpu()

    @property
    def rows(self) -> Tensor:
        """The user of every entry, B behind the last. [E]"""
        users = torch.arange(len(self) + 1, device=self.offsets.device)
        return _repeated(users, self.offsets, len(self.items))

    def spread(self, per_user: Tensor) -> Tensor:
        """A value per user, laid out over the user's entries; 0 behind the last. [B] -> [E]"""
        return _repeated(F.pad(per_user, (0, 1)), self.offsets, len(self.items))

    def unit_weights(self) -> Tensor:
        """The entries of x / ||x||_2. [E] float32"""
        return self.spread(self.counts.clamp_min(1).float().rsqrt())

    def mean_weights(self) -> Tensor:
        """The entries of x / |x|. [E] float32"""
        return self.spread(self.counts.clamp_min(1).float().reciprocal())

    def take(self, users: Tensor, capacity: int | None = None) -> Interactions:
        """The rows of some users, in the order given.

        Args:
            users: [B'] int64; on the CPU, the answer's size is known without waiting for the device.
            capacity: E of the answer, which is `fixed` then; at least as many entries as these users have.
        """
        if capacity is not None:
            n_entries = capacity
        elif users.is_cuda:
            n_entries = int((self.offsets[users + 1] - self.offsets[users]).sum())
        else:
            n_entries = int(self.host_counts[users].sum())
        users = users.to(self.offsets.device)
        first = self.offsets[users]
        offsets = F.pad((self.offsets[users + 1] - first).cumsum(0), (1, 0))
        place = torch.arange(n_entries, device=offsets.device)
        source = place + _repeated(F.pad(first - offsets[:-1], (0, 1)), offsets, n_entries)
        if capacity is None:
            return Interactions(self.items[source].long(), offsets, self.n_items)
        if len(self.items) == 0:
            return Interactions(torch.full_like(source, self.n_items), offsets, self.n_items, fixed=True)
        items = self.items[source.clamp_max_(len(self.items) - 1)].long()
        return Interactions(items.where(place < offsets[-1], self.n_items), offsets, self.n_items, fixed=True)

    def where(self, keep: Tensor) -> Interactions:
        """The same users with some of their entries. keep: [E] bool"""
        if self.fixed:
            keep = keep & (self.items < self.n_items)
        kept = F.pad(keep.cumsum(0), (1, 0))
        return Interactions(self.pick(keep, self.items, self.n_items), kept[self.offsets], self.n_items, self.fixed)

    def pick(self, keep: Tensor, values: Tensor, behind: float = 0) -> Tensor:
        """Values of the entries that `where(keep)` leaves, and `behind` in the room. [E]"""
        if not self.fixed:
            return values[keep]
        keep = keep & (self.items < self.n_items)
        n = len(values)
        place = torch.where(keep, keep.cumsum(0) - 1, n)  # the others meet in a place that is cut off
        return values.new_full((n + 1,), behind).scatter_(0, place, values)[:n]

    def padded(self, n_users: int, capacity: int | None = None) -> Interactions:
        """The same rows and empty ones behind them, n_users in all; with a capacity E it is `fixed`."""
        offsets, items = self.offsets, self.items
        if n_users > len(self):
            offsets = torch.cat([offsets, offsets[-1:].expand(n_users - len(self))])
        if capacity is None:
            return Interactions(items, offsets, self.n_items, self.fixed)
        if capacity > len(items):
            items = F.pad(items, (0, capacity - len(items)), value=self.n_items)
        return Interactions(items, offsets, self.n_items, fixed=True)

    def exact(self) -> Interactions:
        """The same rows without entries behind the last; waits for the device."""
        if not self.fixed:
            return self
        return Interactions(self.items[: int(self.offsets[-1])], self.offsets, self.n_items)

    def union(self, other: Interactions) -> Interactions:
        """Row by row, the items of either."""
        both = self.exact(), other.exact()
        rows, items = torch.cat([x.rows for x in both]), torch.cat([x.items for x in both])
        return from_pairs(rows, items, len(self), self.n_items)

    def among(self, candidates: Tensor) -> Interactions:
        """The rows as positions in the ascending `candidates`; other items leave."""
        x = self.exact()
        if len(candidates) == 0:
            return Interactions(x.items[:0], torch.zeros_like(x.offsets), 0)
        place = torch.searchsorted(candidates, x.items).clamp_max(len(candidates) - 1)
        kept = x.where(candidates[place] == x.items)
        return Interactions(torch.searchsorted(candidates, kept.items), kept.offsets, len(candidates))

    def to(self, device: torch.device | str) -> Interactions:
        """The same rows on a device; these, where they are there."""
        device = torch.device(device)
        if device == self.items.device == self.offsets.device:
            return self  # which may know its `host_counts`
        return Interactions(self.items.to(device), self.offsets.to(device), self.n_items, self.fixed)


def _repeated(values: Tensor, offsets: Tensor, n_entries: int) -> Tensor:
    """values[b] in every place of row b, and the last value behind the last row. values [B + 1] -> [n_entries]"""
    ends = torch.cat([offsets, offsets.new_full((1,), n_entries)])
    return torch.repeat_interleave(values, ends.diff(), output_size=n_entries)


def from_pairs(rows: Tensor, items: Tensor, n_users: int, n_items: int) -> Interactions:
    """CSR rows of (user, item) pairs in any order; duplicates count once."""
    keys = torch.unique(rows * max(1, n_items) + items)
    rows, items = keys // max(1, n_items), keys % max(1, n_items)
    offsets = torch.zeros(n_users + 1, dtype=torch.int64, device=keys.device)
    torch.cumsum(torch.bincount(rows, minlength=n_users), 0, out=offsets[1:])
    return Interactions(items, offsets, n_items)


def as_interactions(
    x: Any, n_items: int, device: torch.device | str = "cpu", *, as_stored: bool = False
) -> Interactions:
    """Histories in any of the accepted forms, as checked CSR rows on a device.

    Args:
        x: `Interactions`; a scipy sparse matrix or array, a torch tensor, sparse or dense, or a dense NumPy array, each
            [B, M], an entry > 0 meaning that the user has the item; or a pair (items [E], offsets [B + 1]).
        n_items: M.
        device: where the rows go.
        as_stored: of a CSR matrix with nothing to repair, keep the indices as they are, int32 or mapped from a file; on
            a CPU without a copy. The rows are then for `take`.

    Raises:
        TypeError: x is none of these, or its entries are no real numbers.
        ValueError: the width is not M (both are named), an id is out of range, a value is negative, NaN or infinite,
            ids are not integers, or offsets do not ascend from 0 to E. Unsorted ids, duplicates and zeros are repaired.
    """
    if isinstance(x, Interactions):
        _check_width((len(x), x.n_items), n_items)
        return x.to(device)
    if isinstance(x, tuple) and len(x) == 2:
        return _from_offsets(*x, n_items).to(device)
    if isinstance(x, Tensor) and x.layout != torch.strided:
        _check_width(x.shape, n_items)
        coo = _sound_tensor(x.detach()).to_sparse_coo().coalesce().cpu()
        rows, items = coo.indices()
        return _from_triplets(rows, items, coo.values(), x.shape[0], n_items).to(device)
    if isinstance(x, np.ndarray):
        x = _numbers(np.ma.filled(x, 0))
    if isinstance(x, Tensor):
        _check_width(x.shape, n_items)
        dense = x.detach().cpu()
        rows, items = dense.nonzero(as_tuple=True)
        return _from_triplets(rows, items, dense[rows, items], x.shape[0], n_items).to(device)
    if sp.issparse(x):
        _check_width(x.shape, n_items)
        return _from_scipy(x, n_items, as_stored).to(device)
    shape = f" of shape {x.shape}" if hasattr(x, "shape") else ""
    hint = "; scipy.sparse.csr_matrix((values, (users, items))) makes a matrix of columns" if shape else ""
    raise TypeError(
        f"histories must be [B, {n_items}], a scipy sparse matrix, a torch tensor or a NumPy array, or a pair "
        f"(items, offsets); got {type(x).__name__}{shape}{hint}"
    )


def item_vector(ids: Any, n_items: int, name: str) -> Tensor:
    """A vector of item ids in range, int64 on the CPU.

    Raises:
        TypeError, ValueError: it is none; the message says `name`.
    """
    try:
        vector = torch.as_tensor(sorted(ids) if isinstance(ids, (set, frozenset, range)) else ids).cpu()
    except (RuntimeError, OverflowError) as error:
        raise TypeError(f"{name} must be a vector of item ids: {error}") from None
    if vector.numel() == 0:
        return torch.empty(0, dtype=torch.int64)
    integers = not (vector.is_floating_point() or vector.is_complex() or vector.dtype == torch.bool)
    if vector.dim() != 1 or not integers:
        raise ValueError(f"{name} must be a vector of item ids; got {vector.dtype} of shape {tuple(vector.shape)}")
    worst = int(vector.min()) if int(vector.min()) < 0 else int(vector.max())
    if not 0 <= worst < n_items:
        raise ValueError(f"{name} must hold item ids from 0 to {n_items - 1}; got {worst}")
    return vector.long()


def left_out_rows(exclude: Any, n_users: int, n_items: int) -> Interactions:
    """Items that are not to be recommended: ids for all users, or a row per user in any form of `as_interactions`.

    Raises:
        TypeError, ValueError: as in `item_vector` and `as_interactions`, and of rows for another number of users.
    """
    shape = getattr(exclude, "shape", None)
    if isinstance(exclude, (list, set, frozenset, range)) or (shape is not None and len(shape) == 1):
        ids = item_vector(exclude, n_items, "exclude").unique()
        return Interactions(ids.repeat(n_users), torch.arange(n_users + 1) * len(ids), n_items)
    rows = as_interactions(exclude, n_items)
    if len(rows) != n_users:
        raise ValueError(f"exclude must have a row per user, {n_users}; got {len(rows)}")
    return rows


def _numbers(values: np.ndarray) -> Tensor:
    """The entries of a matrix in a dtype that torch computes with."""
    if values.dtype.kind not in "biuf":
        raise TypeError(f"entries of histories must be real numbers; got {values.dtype}")
    unusual = values.dtype.itemsize > 8 or (values.dtype.kind == "u" and values.dtype.itemsize > 1)
    return torch.from_numpy(np.require(values, np.float64 if unusual else None, ["C", "W"]))


def _sound_tensor(x: Tensor) -> Tensor:
    """The same sparse tensor, every index checked: torch believes what a tensor says of itself."""
    if x.sparse_dim() != 2:
        raise ValueError(f"histories must be sparse in users and items; got {x.sparse_dim()} sparse dimensions")
    try:
        if x.layout == torch.sparse_coo:
            return torch.sparse_coo_tensor(x._indices(), x._values(), x.shape, check_invariants=True)
        by_row = x.layout in (torch.sparse_csr, torch.sparse_bsr)
        ids = (x.crow_indices(), x.col_indices()) if by_row else (x.ccol_indices(), x.row_indices())
        return torch.sparse_compressed_tensor(*ids, x.values(), x.shape, layout=x.layout, check_invariants=True)
    except RuntimeError as error:
        raise ValueError(f"histories are a damaged sparse tensor: {str(error).splitlines()[0]}") from None


def _sound_matrix(x: Any) -> Any:
    """The same sparse matrix, every index checked and nothing else believed: compiled code walks it from here on."""
    try:
        if x.format == "coo":
            return type(x)((x.data, (x.row, x.col)), shape=x.shape)
        if x.format in ("csr", "csc", "bsr"):
            x = type(x)((x.data, x.indices, x.indptr), shape=x.shape)
            if (x.indptr[1:] < x.indptr[:-1]).any():
                raise ValueError("row starts do not ascend")  # SciPy looks at differences, which may wrap
            x.check_format(full_check=True)
        return x
    except (ValueError, TypeError, IndexError) as error:
        raise ValueError(f"histories are a damaged {x.format} matrix: {error}") from None


def _from_scipy(x: Any, n_items: int, as_stored: bool) -> Interactions:
    csr = _sound_matrix(x).tocsr()
    values = _numbers(csr.data[:1] if csr.data.strides == (0,) else csr.data)  # one number, for all entries
    if csr.has_canonical_format and bool((values > 0).all()) and bool(values.isfinite().all()):
        offsets = torch.from_numpy(csr.indptr.astype(np.int64))
        items = _readable(csr.indices) if as_stored else torch.from_numpy(csr.indices.astype(np.int64))
        _check_range(items, n_items)
        return Interactions(items, offsets, n_items)
    coo = csr.tocoo()
    rows, items = (torch.from_numpy(ids.astype(np.int64)) for ids in (coo.row, coo.col))
    return _from_triplets(rows, items, values.expand(len(rows)), x.shape[0], n_items)


def _readable(ids: np.ndarray) -> Tensor:
    """A vector over the same memory. torch warns of memory that cannot be written to; nobody writes to histories."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(ids)


def _check_width(shape: Any, n_items: int) -> None:
    if len(shape) != 2:
        raise ValueError(f"histories must be users x items, [B, {n_items}]; got shape {tuple(shape)}")
    if shape[1] != n_items:
        hint = "; is it items x users? then hand in its transpose" if shape[0] == n_items else ""
        raise ValueError(f"histories must have one column per item, [B, {n_items}]; got shape {tuple(shape)}{hint}")


def _from_triplets(rows: Tensor, items: Tensor, values: Tensor, n_users: int, n_items: int) -> Interactions:
    if values.is_complex():
        raise TypeError(f"entries of histories must be real numbers; got {values.dtype}")
    if values.is_floating_point() and not bool(values.isfinite().all()):
        raise ValueError("histories hold NaN or infinite values; every entry must be 0 or positive")
    if values.dtype != torch.bool and bool((values < 0).any()):
        raise ValueError(
            f"histories hold negative values (the least is {values.min().item()}); entries are 0 or positive"
        )
    _check_range(items, n_items)
    kept = values != 0
    return from_pairs(rows[kept], items[kept], n_users, n_items)


def _from_offsets(items: Any, offsets: Any, n_items: int) -> Interactions:
    try:
        items, offsets = (torch.as_tensor(ids).cpu() for ids in (items, offsets))
    except (RuntimeError, OverflowError) as error:
        raise TypeError(f"a pair (items, offsets) must hold vectors of integers: {error}") from None
    for name, ids in (("items", items), ("offsets", offsets)):
        integers = not (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool)
        if ids.dim() != 1 or ids.layout != torch.strided or not (integers or len(ids) == 0):
            raise ValueError(f"{name} must be a vector of integers; got {ids.dtype} of shape {tuple(ids.shape)}")
    items, offsets = items.long(), offsets.long()
    if len(offsets) == 0 or offsets[0] != 0 or offsets[-1] != len(items) or bool((offsets[1:] < offsets[:-1]).any()):
        raise ValueError(
            f"offsets must ascend from 0 to the number of items, {len(items)}, one more than there are users; "
            f"got {offsets.tolist() if len(offsets) < 8 else [*offsets[:3].tolist(), '...', int(offsets[-1])]}"
        )
    _check_range(items, n_items)
    rows = torch.repeat_interleave(torch.arange(len(offsets) - 1), offsets.diff())
    return from_pairs(rows, items, len(offsets) - 1, n_items)


def _check_range(items: Tensor, n_items: int) -> None:
    if len(items) and (int(items.min()) < 0 or int(items.max()) >= n_items):
        worst = int(items.min()) if int(items.min()) < 0 else int(items.max())
        raise ValueError(f"item ids must be 0 to {n_items - 1}; got {worst}")
