"""Events on disk in file order, as integer codes: what `events.collect` keeps in memory.

Disk    16 bytes an event while it is read, 20 while a column of identifiers becomes codes, 8 after that; 1 more where
        ratings filter.
Memory  the distinct identifiers, and a block of events.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from cfsfl_fast.datasets.events import lie_close, ranked_texts, text_codes
from cfsfl_fast.datasets.table import Chunk, Ids

BLOCK = 1 << 20
"""Events that are looked at together."""

_MOST_PENDING = 1 << 20


class SpilledEvents:
    """All chunks of a source in two files of codes, and one of which ratings pass.

    Args:
        chunks: in the order of the file.
        min_rating: an event passes if its rating is above this; None lets all pass.
        name: of the source.
        scratch: a folder for the files.

    Attributes:
        n_events: E.
        user_ids, item_ids: as in `Events`.
        user_counts: events of every user. [U] int64

    Raises:
        ValueError: no events at all; or ratings are asked for, and there are none.
    """

    def __init__(self, chunks: Iterable[Chunk], min_rating: float | None, name: str, scratch: Path) -> None:
        columns = _Column(scratch / "users"), _Column(scratch / "items")
        self._passing = None if min_rating is None else scratch / "passing"
        self.n_events, rated = 0, True
        with (self._passing or scratch / "none").open("wb") as passing:
            for chunk in chunks:
                for column, ids in zip(columns, (chunk.users, chunk.items), strict=True):
                    column.add(ids)
                self.n_events += len(chunk.users)
                rated = rated and chunk.ratings is not None
                if min_rating is not None and chunk.ratings is not None:
                    append(passing, chunk.ratings > np.float64(min_rating))
        if self.n_events == 0:
            raise ValueError(f"{name}: expected events; found none")
        if not rated and min_rating is not None:
            raise ValueError(f"{name}: the protocol keeps ratings above {min_rating}; found no ratings")
        users, items = columns
        self.user_ids, self.user_counts = users.finish()
        self.item_ids, _ = items.finish()
        self._codes = users.path, items.path

    def blocks(self) -> Iterator[tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.bool_]]]:
        """Codes of users and items, and whether the rating passes, BLOCK events at a time."""
        users, items = self._codes
        for begin in range(0, self.n_events, BLOCK):
            n = min(BLOCK, self.n_events - begin)
            passing = np.ones(n, np.bool_) if self._passing is None else _part(self._passing, np.bool_, begin, n)
            yield _part(users, np.int32, begin, n), _part(items, np.int32, begin, n), passing

    def remove(self) -> None:
        """Frees the disk; nothing can be read after that."""
        for path in (*self._codes, self._passing):
            if path is not None:
                path.unlink()


def append(file: IO[bytes], array: NDArray[Any]) -> None:
    """Writes an array's bytes; unlike its `tofile`, with the system's own error where the disk is full."""
    if array.size:
        file.write(np.ascontiguousarray(array).view(np.uint8).data)


class _Column:
    """One column of identifiers: integers as they are, texts as places in a dictionary, int64 both; then codes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._raw = path.with_suffix(".raw")
        self._file = self._raw.open("w+b")
        self._integers = np.empty(0, np.int64)
        self._pending: list[NDArray[np.int64]] = []
        self._n_pending = 0
        self._code_of: dict[bytes, int] | None = None

    def add(self, ids: Ids) -> None:
        if self._code_of is None and ids.dtype == np.int64:
            self._know(ids)
            append(self._file, ids)
            return
        if self._code_of is None:
            self._become_texts()
        append(self._file, self._text_codes(ids))

    def finish(self) -> tuple[Ids, NDArray[np.int64]]:
        """The distinct identifiers as `Events` has them, and how often each occurs; `path` then holds int32 codes."""
        if self._code_of is None:
            self._merge()
            found, code = self._integers, _integer_codes(self._integers)
        else:
            found, rank = ranked_texts(self._code_of)
            code = rank.__getitem__
        self._code_of, counts = {}, np.zeros(len(found), np.int64)
        self._file.seek(0)
        with self._file, self.path.open("wb") as coded:
            while len(ids := np.fromfile(self._file, np.int64, BLOCK)):
                codes = code(ids)
                append(coded, codes)
                counts += np.bincount(codes, minlength=len(found))
        self._raw.unlink()
        return found, counts

    def _know(self, ids: NDArray[np.int64]) -> None:
        new = np.unique(ids)
        if len(self._integers):
            at = np.minimum(np.searchsorted(self._integers, new), len(self._integers) - 1)
            new = new[self._integers[at] != new]
        self._pending.append(new)
        self._n_pending += len(new)
        if self._n_pending > max(_MOST_PENDING, len(self._integers) // 2):
            self._merge()

    def _merge(self) -> None:
        self._integers = np.unique(np.concatenate([self._integers, *self._pending]))
        self._pending, self._n_pending = [], 0

    def _become_texts(self) -> None:
        """Rewrites the integers so far as places in a dictionary."""
        self._code_of, self._integers, self._pending = {}, np.empty(0, np.int64), []
        at = 0
        self._file.seek(0)
        while len(ids := np.fromfile(self._file, np.int64, BLOCK)):
            self._file.seek(at)
            append(self._file, self._text_codes(ids))
            at += ids.nbytes
            self._file.seek(at)

    def _text_codes(self, ids: Ids) -> NDArray[np.int64]:
        assert self._code_of is not None
        if len(ids) == 0:
            return np.empty(0, np.int64)
        texts = ids.astype("S20") if ids.dtype == np.int64 else ids
        return text_codes(texts, self._code_of).astype(np.int64)


def _integer_codes(known: NDArray[np.int64]) -> Callable[[NDArray[np.int64]], NDArray[np.int32]]:
    """A function from integers to their places among the known ones, which ascend."""
    low, high = int(known[0]), int(known[-1])
    if not lie_close(low, high, len(known)):
        return lambda ids: np.searchsorted(known, ids).astype(np.int32)
    table = np.zeros(high - low + 1, np.int32)
    table[known - low] = np.arange(len(known), dtype=np.int32)
    return lambda ids: table[ids - low]


def _part(path: Path, dtype: Any, begin: int, n: int) -> NDArray[Any]:
    return np.fromfile(path, dtype, n, offset=begin * np.dtype(dtype).itemsize)
