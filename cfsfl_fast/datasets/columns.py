"""Raw events as plain arrays: a folder of `users.npy`, `items.npy` and, where there are ratings, `ratings.npy`.

Row e of each is event e. They are read through memory maps, a block at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.format import header_data_from_array_1_0, write_array_header_1_0
from numpy.typing import NDArray

from cfsfl_fast import files
from cfsfl_fast.arrays import map_npy
from cfsfl_fast.datasets.spilled import BLOCK, append
from cfsfl_fast.datasets.table import MAX_ID_BYTES, Chunk, Ids

_MOST_BYTES = 1 << 26
"""Of a block of texts."""

USERS, ITEMS, RATINGS = "users.npy", "items.npy", "ratings.npy"


def holds_columns(path: Path) -> bool:
    """Whether a folder holds events as arrays."""
    return (path / USERS).is_file() and (path / ITEMS).is_file()


def column_chunks(folder: Path) -> Iterator[Chunk]:
    """The events of a folder.

    Raises:
        ValueError: a damaged file; ids that are neither integers below 2^63 nor texts of 1 to 512 bytes; ratings that
            are no finite numbers; or arrays of different lengths.
    """
    users, items = (_column(folder, name, "iuU", "a row of integers or texts") for name in (USERS, ITEMS))
    ratings = _column(folder, RATINGS, "biuf", "a row of numbers") if (folder / RATINGS).exists() else None
    lengths = [len(column) for column in (users, items, ratings) if column is not None]
    if len(set(lengths)) > 1:
        raise ValueError(f"{folder.name}: expected arrays of one length; found {lengths}")
    rows = min(BLOCK, *(_MOST_BYTES // column.dtype.itemsize for column in (users, items)))
    for begin in range(0, len(users), rows):
        part = slice(begin, begin + rows)
        values = None
        if ratings is not None:
            values = ratings[part].astype(np.float64)
            if not np.isfinite(values).all():
                row = int(np.argmin(np.isfinite(values)))
                raise ValueError(
                    f"{folder.name}/{RATINGS}, row {begin + row}: expected a finite rating; found {values[row]}"
                )
        yield Chunk(
            _ids(users[part], f"{folder.name}/{USERS}", begin),
            _ids(items[part], f"{folder.name}/{ITEMS}", begin),
            values,
        )


def write_columns(folder: Path, blocks: Iterable[tuple[NDArray[Any], NDArray[Any]]], *, overwrite: bool = False) -> int:
    """Writes events as they come, the folder whole or not at all, and gives their number.

    Args:
        blocks: users and items of some events, int64 or int32 both.

    Raises:
        FileExistsError: the folder holds something; with `overwrite`, something else than such arrays.
    """
    if folder.exists():
        found = {path.name for path in folder.iterdir()} if folder.is_dir() else {folder.name}
        if found - ({USERS, ITEMS, RATINGS} if overwrite else set()):
            raise FileExistsError(f"{folder} exists and holds {sorted(found)[0]}: it is left alone")
    n_events = 0
    with files.replacing_folder(folder.resolve()) as staged:
        with (staged / USERS).open("wb") as users, (staged / ITEMS).open("wb") as items:
            for file in (users, items):
                _write_header(file, 0)
            start = users.tell()
            for block in blocks:
                for file, ids in zip((users, items), block, strict=True):
                    append(file, ids.astype(np.int32))
                n_events += len(block[0])
            for file in (users, items):
                file.seek(0)
                _write_header(file, n_events)
                assert file.tell() == start, "a header leaves room for the length to grow"
        for name in (USERS, ITEMS):
            files.sync(staged / name)
    return n_events


def _write_header(file: Any, n: int) -> None:
    write_array_header_1_0(file, {**header_data_from_array_1_0(np.empty(0, np.int32)), "shape": (n,)})


def _column(folder: Path, name: str, kinds: str, expected: str) -> NDArray[Any]:
    array = map_npy(folder / name)
    if array.ndim != 1 or array.dtype.kind not in kinds:
        raise ValueError(f"{folder.name}/{name}: expected {expected}; found {array.dtype} of shape {list(array.shape)}")
    if array.dtype.kind == "U" and array.dtype.itemsize > 4 * MAX_ID_BYTES:
        raise ValueError(f"{folder.name}/{name}: expected texts of at most {MAX_ID_BYTES} bytes; found {array.dtype}")
    return array


def _ids(ids: NDArray[Any], name: str, begin: int) -> Ids:
    if ids.dtype.kind != "U":
        if ids.dtype.kind == "u" and ids.size and ids.max() >= 2**63:
            raise ValueError(f"{name}: expected integers below 2^63; found {ids.max()}")
        return ids.astype(np.int64)
    try:
        texts = np.char.encode(ids, "utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{name}: expected texts; found what is none ({error})") from error
    lengths = np.char.str_len(texts)
    filled = np.count_nonzero(texts.view(np.uint8).reshape(len(texts), -1), axis=1)  # a NUL inside counts in the length
    wrong = (lengths == 0) | (lengths > MAX_ID_BYTES) | (filled < lengths)
    if wrong.any():
        row = int(np.argmax(wrong))
        raise ValueError(
            f"{name}, row {begin + row}: expected 1 to {MAX_ID_BYTES} bytes of text; found {ids[row][:60]!r}"
        )
    return texts
