"""The events of a source in memory: integer codes in file order, and the sorted identifiers that they stand for."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cfsfl_fast.datasets.table import Chunk, Ids

_INT64 = np.dtype(np.int64)
_DENSE_RANGE = 4


@dataclass(frozen=True)
class Events:
    """E events in file order, each (user, item) pair once.

    Attributes:
        users: codes [E] int32; event e is of the user `user_ids[users[e]]`.
        items: codes [E] int32, likewise.
        ratings: [E] float32 or float64 (float32 only where nothing is rounded), or None where the source has none.
        user_ids: [U] ascending; int64 in numeric order, or str in order of code points.
        item_ids: [I] ascending, likewise.
        name: name of the source.
        report: counts: `events_read`, `duplicates` (dropped, the first kept), `explicit_zeros`.
    """

    users: NDArray[np.int32]
    items: NDArray[np.int32]
    ratings: NDArray[Any] | None
    user_ids: Ids
    item_ids: Ids
    name: str = "events"
    report: dict[str, int] = field(default_factory=dict)


def collect(chunks: Iterable[Chunk], name: str, explicit_zeros: int = 0) -> Events:
    """All chunks as one `Events`; of several events of one (user, item) pair the first stays.

    Raises:
        ValueError: no events at all.
    """
    users, items = _Encoder(), _Encoder()
    ratings: list[NDArray[Any]] | None = []
    n_read = 0
    for chunk in chunks:
        n_read += len(chunk.users)
        users.add(chunk.users)
        items.add(chunk.items)
        if chunk.ratings is None:
            ratings = None
        elif ratings is not None:
            with np.errstate(over="ignore"):
                short = chunk.ratings.astype(np.float32)
            ratings.append(short if (short == chunk.ratings).all() else chunk.ratings)
    if n_read == 0:
        raise ValueError(f"{name}: expected events; found none")
    values = None if ratings is None else np.concatenate(ratings)
    del ratings
    user_ids, user_codes = users.finish()
    item_ids, item_codes = items.finish()
    keep = first_of_each(user_codes, item_codes, len(item_ids))
    report = {"events_read": n_read, "duplicates": 0, "explicit_zeros": explicit_zeros}
    if keep is not None:
        report["duplicates"] = n_read - len(keep)
        user_codes, item_codes = user_codes[keep], item_codes[keep]
        values = None if values is None else values[keep]
    return Events(user_codes, item_codes, values, user_ids, item_ids, name, report)


def encode(ids: Ids) -> tuple[Ids, NDArray[np.int32]]:
    """The distinct ids in ascending order and the code of every entry. ids int64 or bytes_ [n]."""
    if ids.dtype == _INT64:
        return _encode_integers([ids])
    encoder = _Encoder()
    encoder.add(ids)
    return encoder.finish()


def first_of_each(users: NDArray[np.int32], items: NDArray[np.int32], n_items: int) -> NDArray[np.int64] | None:
    """Positions of the first event of every pair, ascending, or None where every pair is there once."""
    pairs = users.astype(np.int64)
    pairs *= n_items
    pairs += items
    ordered = np.sort(pairs)
    if not (ordered[1:] == ordered[:-1]).any():
        return None
    del ordered
    order = np.argsort(pairs, kind="stable")
    ordered = pairs[order]
    first = np.concatenate(([True], ordered[1:] != ordered[:-1]))
    return np.sort(order[first])


class _Encoder:
    """Collects one column: integers as they are, text as provisional codes of a dictionary."""

    def __init__(self) -> None:
        self._integers: list[NDArray[Any]] = []
        self._codes: list[NDArray[np.int32]] = []
        self._code_of: dict[bytes, int] = {}
        self._is_text = False

    def add(self, ids: Ids) -> None:
        if not self._is_text and ids.dtype == _INT64:
            small = len(ids) == 0 or (ids.min() > -(2**31) and ids.max() < 2**31)
            self._integers.append(ids.astype(np.int32) if small else ids)
            return
        if not self._is_text:
            self._is_text = True
            for earlier in self._integers:
                self._add_text(earlier.astype("S20"))
            self._integers.clear()
        self._add_text(ids.astype("S20") if ids.dtype == _INT64 else ids)

    def finish(self) -> tuple[Ids, NDArray[np.int32]]:
        if not self._is_text:
            return _encode_integers(self._integers)
        texts, rank = ranked_texts(self._code_of)
        return texts, rank[np.concatenate(self._codes)]

    def _add_text(self, ids: Ids) -> None:
        if len(ids):
            self._codes.append(text_codes(ids, self._code_of))


def text_codes(ids: Ids, code_of: dict[bytes, int]) -> NDArray[np.int32]:
    """The code of every text in a dictionary, which new ones enter. ids bytes_ [n > 0] -> [n]"""
    heads = np.flatnonzero(np.concatenate(([True], ids[1:] != ids[:-1])))  # files are often grouped by user
    distinct, inverse = _distinct(ids[heads])
    codes = np.array([code_of.setdefault(text, len(code_of)) for text in distinct.tolist()], np.int32)
    return np.repeat(codes[inverse], np.diff(heads, append=len(ids)))


def ranked_texts(code_of: dict[bytes, int]) -> tuple[Ids, NDArray[np.int32]]:
    """The texts of a dictionary as str in order of code points, and the place of every code among them.

    Raises:
        ValueError: as an array they would take absurdly more memory than they are long.
    """
    found = [text.decode() for text in code_of]
    longest = max(found, key=len, default="")
    if (size := 4 * len(longest) * len(found)) > max(1 << 28, 256 * sum(map(len, found))):
        raise ValueError(
            f"{len(found):,} identifiers would take {size:,} bytes, as the longest of them has {len(longest)} "
            f"characters: {longest[:60]!r}..."
        )
    texts = np.array(found, dtype=np.str_)
    order = np.argsort(texts, kind="stable")
    rank = np.empty(len(order), np.int32)
    rank[order] = np.arange(len(order), dtype=np.int32)
    return texts[order], rank


def _distinct(texts: Ids) -> tuple[Ids, NDArray[Any]]:
    """Distinct texts in any order and the index of every entry; a 64-bit hash sorts faster than the bytes do."""
    words = -(-texts.dtype.itemsize // 8)
    padded = np.ascontiguousarray(texts.astype(f"S{8 * words}")).view(np.uint64).reshape(len(texts), words)
    hashed = np.zeros(len(texts), np.uint64)
    for w in range(words):
        hashed ^= padded[:, w]
        hashed *= np.uint64(0x9E3779B97F4A7C15)
        hashed ^= hashed >> np.uint64(29)
    _, first, inverse = np.unique(hashed, return_index=True, return_inverse=True)
    if (texts[first][inverse] != texts).any():  # two texts share a hash
        distinct, inverse = np.unique(texts, return_inverse=True)
        return distinct, inverse
    return texts[first], inverse


def _encode_integers(parts: list[NDArray[Any]]) -> tuple[Ids, NDArray[np.int32]]:
    """Distinct values ascending as int64, codes int32; by a table where the values lie close together."""
    values = np.concatenate(parts) if parts else np.empty(0, np.int64)
    low, high = (int(values.min()), int(values.max())) if len(values) else (0, -1)
    if lie_close(low, high, len(values)):
        present = np.zeros(high - low + 1, np.bool_)
        present[values - low] = True
        code = np.cumsum(present, dtype=np.int32) - np.int32(1)
        return np.flatnonzero(present).astype(np.int64) + low, code[values - low]
    distinct, inverse = np.unique(values, return_inverse=True)
    return distinct.astype(np.int64), inverse.astype(np.int32)


def lie_close(low: int, high: int, n: int) -> bool:
    """Whether n integers from low to high are few gaps, so that a table of all between takes little memory."""
    return high - low < max(_DENSE_RANGE * n, 1 << 16)
