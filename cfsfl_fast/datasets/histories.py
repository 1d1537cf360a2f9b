"""Histories of users that come after training: (user, item) pairs by external ids, to recommend for."""

from pathlib import Path

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from cfsfl_fast.datasets.dataset import pairs_to_csr
from cfsfl_fast.datasets.events import encode
from cfsfl_fast.datasets.readers import Columns, csv_layout
from cfsfl_fast.datasets.sources import list_files, read_blocks
from cfsfl_fast.datasets.table import Ids, parse_lines, split_lines


def read_histories(
    path: str | Path,
    item_ids: Ids,
    *,
    user_column: str | int | None = None,
    item_column: str | int | None = None,
    delimiter: str | None = None,
    header: bool | None = None,
) -> tuple[Ids, sp.csr_matrix, int]:
    """Reads a csv or tsv of external user and item ids, one pair a line; further columns are not looked at.

    Args:
        path: the file, plain or compressed.
        item_ids: [M] int64 or str; the item of every column of the answer.
        user_column, item_column, delimiter, header: as in `read_events`.

    Returns:
        User ids [N] in order of first appearance (int64 if all are integers, else str); their histories, CSR [N, M] of
        float32 ones, empty for users without a known item; and how many distinct pairs named an unknown item.

    Raises:
        FileNotFoundError: nothing is at `path`.
        ValueError: no pairs, or a malformed line, with its number.
    """
    files = list_files(Path(path))
    if len(files) != 1:
        raise ValueError(f"{path}: expected one file of pairs; found {len(files)}")
    file = files[0]
    layout, has_header = csv_layout(file, Columns(user_column, item_column, None, delimiter, header), by_position=True)
    layout = layout.without_rating()
    users: list[Ids] = []
    items: list[Ids] = []
    for block, first_line in read_blocks(file):
        lines = split_lines(block, first_line, file.name)
        if has_header and len(lines.start):
            has_header, lines = False, lines.without_first()
        if len(lines.start):
            chunk = parse_lines(lines, layout)
            users.append(chunk.users)
            items.append(chunk.items)
    if not users:
        raise ValueError(f"{file.name}: expected pairs of user and item; found none")
    user_ids, user_codes = encode(_joined(users))
    found_ids, item_codes = encode(_joined(items))
    pairs = np.unique(user_codes.astype(np.int64) * len(found_ids) + item_codes)
    first = np.full(len(user_ids), len(user_codes), np.int64)
    np.minimum.at(first, user_codes, np.arange(len(user_codes)))
    order = np.argsort(first)
    rank = np.argsort(order)
    column = ItemIndex(np.asarray(item_ids)).columns(found_ids)[pairs % len(found_ids)]
    known = column >= 0
    rows = rank[pairs // len(found_ids)]
    histories = pairs_to_csr(rows[known], column[known], (len(user_ids), len(item_ids)))
    return user_ids[order], histories, int((~known).sum())


def _joined(parts: list[Ids]) -> Ids:
    if all(part.dtype.kind == "i" for part in parts):
        return np.concatenate(parts)
    return np.concatenate([part.astype("S20") if part.dtype.kind == "i" else part for part in parts])


class ItemIndex:
    """The columns of items by their ids.

    Args:
        item_ids: [M] int64 or str.
    """

    def __init__(self, item_ids: Ids) -> None:
        self._ids = {item_ids.dtype.kind: item_ids}
        self._orders: dict[str, NDArray[np.int64]] = {}

    def columns(self, found: Ids) -> NDArray[np.int64]:
        """Column of every found id, -1 where it is unknown; integers and texts meet as texts. [n] -> [n]"""
        if found.dtype.kind not in self._ids:
            if "U" not in self._ids:
                (ids,) = self._ids.values()
                self._ids["U"] = ids.astype(np.str_)
            found = found.astype(np.str_)
        kind = found.dtype.kind
        ids = self._ids[kind]
        if kind not in self._orders:
            self._orders[kind] = np.argsort(ids, kind="stable")
        order = self._orders[kind]
        at = order[np.minimum(np.searchsorted(ids, found, sorter=order), len(ids) - 1)]
        return np.where(ids[at] == found, at, -1)
