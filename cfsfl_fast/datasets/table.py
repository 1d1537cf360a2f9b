"""Delimited lines to arrays, a block of bytes at a time: delimiters and digits are found and added up by NumPy.

A field is a pair of positions in the block. Identifiers are `int64` where every one of a block is a canonical integer
(`0`, `17`, `-3`; not `007`), otherwise UTF-8 `bytes_`. Because canonical integers and their text are one to one,
`EventCollector` can unify blocks of both kinds without reading again.
"""

import csv
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, NoReturn

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Ids = NDArray[Any]
_NEWLINE, _RETURN, _SPACE, _MINUS, _DOT, _ZERO = b"\n\r -.0"
_MAX_DIGITS = 18
MAX_ID_BYTES = 512
_MAX_TABLE_BYTES = 1 << 26
_MAX_FIXED_POINT = 15
_TEN_TO = 10.0 ** np.arange(_MAX_FIXED_POINT + 1)
_SEPARATOR = b"\x1f"


class Chunk(NamedTuple):
    """Some events in file order: `users` and `items` int64 or UTF-8 bytes_ [n], `ratings` float64 [n] or None."""

    users: Ids
    items: Ids
    ratings: NDArray[np.float64] | None


@dataclass(frozen=True)
class Layout:
    """How a line is cut: `user`, `item`, `rating` are column numbers; `expected` is how messages describe a line."""

    delimiter: bytes
    n_columns: int
    user: int
    item: int
    rating: int | None
    expected: str
    integer_ids: bool = False
    quotes: bool = False

    def without_rating(self) -> "Layout":
        """The same cut that does not look at ratings."""
        return replace(self, rating=None)


@dataclass(frozen=True)
class Lines:
    """The lines of a block that are not blank: line r is `data[start[r]:stop[r]]`, and `number[r]` in the file."""

    name: str
    data: bytes
    start: Ints
    stop: Ints
    number: Ints

    def select(self, rows: NDArray[Any]) -> "Lines":
        """Only the given rows (an index or a mask)."""
        return Lines(self.name, self.data, self.start[rows], self.stop[rows], self.number[rows])

    def without_first(self) -> "Lines":
        """All but the first line; its delimiters are wiped out so that nothing counts them."""
        until = int(self.start[1]) if len(self.start) > 1 else len(self.data)
        return replace(self.select(np.arange(len(self.start)) > 0), data=b"\n" * until + self.data[until:])

    def pieces(self) -> Iterator["Lines"]:
        """The same lines, in parts whose identifiers take at most _MAX_TABLE_BYTES as a table, however long one is."""
        longest = int((self.stop - self.start).max(initial=1))
        rows = max(1, _MAX_TABLE_BYTES // min(longest, MAX_ID_BYTES))
        for first in range(0, len(self.start), rows):
            last = first + rows
            begin, end = int(self.start[first]), int(self.start[last]) if last < len(self.start) else len(self.data)
            start, stop = self.start[first:last] - begin, self.stop[first:last] - begin
            yield Lines(self.name, self.data[begin:end], start, stop, self.number[first:last])

    def text(self, row: int) -> str:
        """The line without its end."""
        return self.data[int(self.start[row]) : int(self.stop[row])].decode()

    def malformed(self, row: int, expected: str, found: str | None = None) -> NoReturn:
        """Raises ValueError with file, line number, what was expected and what was found."""
        found = self.text(row).replace(_SEPARATOR.decode(), ",") if found is None else found
        shown = found if len(found) <= 80 else found[:77] + "..."
        raise ValueError(f"{self.name}, line {self.number[row]}: expected {expected}; found {shown!r}")


def split_lines(block: bytes, first_line: int, name: str) -> Lines:
    """The lines of a block that ends in a newline; `\\r\\n` counts as one line end and blank lines are left out."""
    buffer = np.frombuffer(block, np.uint8)
    end = np.flatnonzero(buffer == _NEWLINE)
    start = np.concatenate(([0], end[:-1] + 1))
    stop = end - ((end > start) & (buffer[end - 1] == _RETURN))
    number = first_line + np.arange(len(end))
    lines = Lines(name, block, start, stop, number)
    filled = stop > start
    return lines if filled.all() else lines.select(filled)


def parse_lines(lines: Lines, layout: Layout) -> Chunk:
    """Cuts and converts the lines of one block.

    Raises:
        ValueError: a line with another number of columns, an empty or unreadable field, a rating that is not finite.
    """
    if layout.quotes and b'"' in lines.data:
        lines, layout = _unquoted(lines, layout)
    buffer = np.frombuffer(lines.data, np.uint8)
    start, stop = _fields(buffer, lines, layout)
    users = _ids(buffer, *_trimmed(buffer, lines, start(layout.user), stop(layout.user)), lines, layout)
    items = _ids(buffer, *_trimmed(buffer, lines, start(layout.item), stop(layout.item)), lines, layout)
    if layout.rating is None:
        return Chunk(users, items, None)
    field = _trimmed(buffer, lines, start(layout.rating), stop(layout.rating))
    return Chunk(users, items, _ratings(buffer, *field, lines, layout))


def split_cells(line: str, delimiter: str, quotes: bool = True) -> list[str]:
    """The cells of one line, without spaces around them."""
    if quotes and '"' in line and len(delimiter) == 1:
        return [cell.strip(" ") for cell in next(csv.reader([line], delimiter=delimiter, strict=True))]
    return [cell.strip(" ") for cell in line.split(delimiter)]


def _fields(buffer: NDArray[np.uint8], lines: Lines, layout: Layout) -> tuple[Any, Any]:
    """Two functions from a column number to the start and the stop of that field in every line."""
    rows, cuts, width = len(lines.start), layout.n_columns - 1, len(layout.delimiter)
    at = np.flatnonzero(buffer == layout.delimiter[0])
    if width == 2:
        at = at[buffer[at + 1] == layout.delimiter[1]]
    whole = len(at) == rows * cuts
    table = at.reshape(rows, cuts) if whole else np.empty((0, cuts), np.int64)
    if not whole or (table[:, 0] < lines.start).any() or (table[:, -1] >= lines.stop).any():
        # Delimiters outside `lines` (Netflix's heading lines have none) cannot occur, so some line has too many or few.
        counts = np.searchsorted(at, lines.stop) - np.searchsorted(at, lines.start)
        lines.malformed(int(np.flatnonzero(counts != cuts)[0]), layout.expected)

    def start(column: int) -> Ints:
        return lines.start if column == 0 else table[:, column - 1] + width

    def stop(column: int) -> Ints:
        return lines.stop if column == cuts else table[:, column]

    return start, stop


def _trimmed(buffer: NDArray[np.uint8], lines: Lines, start: Ints, stop: Ints) -> tuple[Ints, Ints]:
    if b" " not in lines.data:
        return start, stop
    start, stop = start.copy(), stop.copy()
    while (blank := (start < stop) & (buffer[start] == _SPACE)).any():
        start += blank
    while (blank := (start < stop) & (buffer[stop - 1] == _SPACE)).any():
        stop -= blank
    return start, stop


def _ids(buffer: NDArray[np.uint8], start: Ints, stop: Ints, lines: Lines, layout: Layout) -> Ids:
    empty = start == stop
    if empty.any():
        lines.malformed(int(np.argmax(empty)), layout.expected)
    values, canonical = _integers(buffer, start, stop)
    if canonical.all():
        return values
    if layout.integer_ids:
        lines.malformed(int(np.argmin(canonical)), layout.expected)
    return _texts(buffer, start, stop, lines)


def _integers(buffer: NDArray[np.uint8], start: Ints, stop: Ints) -> tuple[Ints, NDArray[np.bool_]]:
    """Values of the fields as int64 and which of them are canonical integers of at most 18 digits."""
    negative = buffer[start] == _MINUS
    if signed := bool(negative.any()):
        start = start + negative
    length = stop - start
    values = np.zeros(len(start), np.int64)
    canonical = (length > 0) & (length <= _MAX_DIGITS)
    last = len(buffer) - 1
    for k in range(min(int(length.max(initial=0)), _MAX_DIGITS)):
        inside = k < length
        digit = buffer[np.minimum(start + k, last)] - np.uint8(_ZERO)  # wraps, so that every other byte is > 9
        canonical &= ~inside | (digit <= 9)
        values = np.where(inside, values * 10 + digit, values)
    zero_first = buffer[np.minimum(start, last)] == _ZERO
    canonical &= ~(zero_first & ((length > 1) | negative))
    return (np.where(negative, -values, values) if signed else values), canonical


def _texts(buffer: NDArray[np.uint8], start: Ints, stop: Ints, lines: Lines) -> Ids:
    length = stop - start
    width = int(length.max())
    if width > MAX_ID_BYTES:
        lines.malformed(int(np.argmax(length)), f"identifiers of at most {MAX_ID_BYTES} bytes")
    table = np.zeros((len(start), width), np.uint8)
    before = np.cumsum(length) - length
    inside = np.arange(width) < length[:, None]
    table[inside] = buffer[np.repeat(start - before, length) + np.arange(int(length.sum()))]
    return table.view(f"S{width}").ravel()


def _ratings(buffer: NDArray[np.uint8], start: Ints, stop: Ints, lines: Lines, layout: Layout) -> NDArray[np.float64]:
    length = stop - start
    mantissa = np.zeros(len(start), np.int64)
    decimals = np.zeros(len(start), np.int64)
    after_dot = np.zeros(len(start), np.bool_)
    plain = (length > 0) & (length <= _MAX_FIXED_POINT)
    last = len(buffer) - 1
    for k in range(min(int(length.max(initial=0)), _MAX_FIXED_POINT)):
        inside = k < length
        byte = buffer[np.minimum(start + k, last)]
        digit = byte - np.uint8(_ZERO)
        is_digit = inside & (digit <= 9)
        is_dot = inside & (byte == _DOT)
        plain &= is_digit | (is_dot & ~after_dot) | ~inside
        mantissa = np.where(is_digit, mantissa * 10 + digit, mantissa)
        decimals += is_digit & after_dot
        after_dot |= is_dot
    plain &= ~((length == 1) & after_dot)
    values = mantissa / _TEN_TO[decimals]  # one rounding: both sides are exact below 2^53
    for row in np.flatnonzero(~plain):
        values[row] = _rating(lines.data[start[row] : stop[row]].decode(), int(row), lines, layout)
    return values


def _rating(text: str, row: int, lines: Lines, layout: Layout) -> float:
    try:
        value = float(text if text.isascii() and text.isprintable() and "_" not in text else "")
    except ValueError:
        lines.malformed(row, layout.expected)
    if not np.isfinite(value):
        lines.malformed(row, "a finite rating", text)
    return value


def _unquoted(lines: Lines, layout: Layout) -> tuple[Lines, Layout]:
    """The same events with only their needed columns and no quotes; a slow path, line by line."""
    columns = [layout.user, layout.item] + ([] if layout.rating is None else [layout.rating])
    delimiter = layout.delimiter.decode()
    rewritten: list[bytes] = []
    for row in range(len(lines.start)):
        try:
            cells = split_cells(lines.text(row), delimiter)
        except csv.Error:
            lines.malformed(row, layout.expected)
        if len(cells) != layout.n_columns:
            lines.malformed(row, layout.expected)
        kept = [cells[column].encode() for column in columns]
        if not all(kept) or any(_SEPARATOR in cell for cell in kept):
            lines.malformed(row, layout.expected)
        rewritten.append(_SEPARATOR.join(kept))
    length = np.array([len(line) for line in rewritten], np.int64)
    stop = np.cumsum(length + 1) - 1
    plain = Lines(lines.name, b"\n".join(rewritten) + b"\n", stop - length, stop, lines.number)
    rating = None if layout.rating is None else 2
    return plain, Layout(_SEPARATOR, len(columns), 0, 1, rating, layout.expected, layout.integer_ids)
