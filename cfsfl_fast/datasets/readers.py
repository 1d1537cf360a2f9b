"""Raw interactions of any supported format as chunks or `Events`: which format it is, and how its lines are cut."""

import csv
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cfsfl_fast.datasets.columns import column_chunks, holds_columns
from cfsfl_fast.datasets.events import Events, collect
from cfsfl_fast.datasets.matrices import Compact, npz_format, read_scipy
from cfsfl_fast.datasets.sources import (
    BLOCK_BYTES,
    Progress,
    SourceFile,
    is_zip,
    list_files,
    read_blocks,
    read_head,
)
from cfsfl_fast.datasets.table import MAX_ID_BYTES, Chunk, Layout, Lines, parse_lines, split_cells, split_lines

FORMATS = (
    "movielens-csv",
    "movielens-dat",
    "movielens-data",
    "netflix",
    "msd",
    "csv",
    "parquet",
    "arrays",
    "scipy",
    "compact",
    "split",
)
STREAMED = frozenset(FORMATS) - {"scipy", "compact", "split", "parquet"}
"""Formats that are read a block at a time."""

SPLIT_FILES = ("train.csv", "validation_tr.csv", "validation_te.csv", "test_tr.csv", "test_te.csv")
USER_NAMES = ("userid", "user", "uid", "customerid", "visitorid", "reviewerid", "users")
ITEM_NAMES = ("itemid", "item", "movieid", "sid", "iid", "songid", "song", "bookid", "productid", "asin", "items")
RATING_NAMES = ("rating", "score", "count", "plays", "playcount", "ratings", "stars")
_WHOLE_FILES = ("ratings.csv", "ratings.dat", "u.data", "train_triplets.txt")
_NETFLIX_FILE = re.compile(r"(combined_data_\d+|mv_\d+)\.txt")
_DATA_SUFFIXES = (".csv", ".tsv", ".txt", ".dat", ".data", ".parquet", ".npz")
_PARQUET_ROWS = 1 << 20

_MOVIELENS_HEADER = "userId,movieId,rating,timestamp"
_STRICT = {
    "movielens-csv": Layout(b",", 4, 0, 1, 2, _MOVIELENS_HEADER, integer_ids=True),
    "movielens-dat": Layout(b"::", 4, 0, 1, 2, "UserID::MovieID::Rating::Timestamp", integer_ids=True),
    "movielens-data": Layout(b"\t", 4, 0, 1, 2, "user, item, rating and timestamp between tabs", integer_ids=True),
    "msd": Layout(b"\t", 3, 0, 1, 2, "user, song and play count between tabs"),
}
_NETFLIX = Layout(b",", 3, 0, 1, 1, "'movie_id:' or 'user,rating,date'", integer_ids=True)


@dataclass(frozen=True)
class Columns:
    """Where a csv, tsv or parquet keeps what; everything left None is found out.

    Attributes:
        user, item, rating: a name of the header, or a column number counted from 0.
        delimiter: one character between cells.
        header: whether the first line names the columns.
    """

    user: str | int | None = None
    item: str | int | None = None
    rating: str | int | None = None
    delimiter: str | None = None
    header: bool | None = None

    def __post_init__(self) -> None:
        if self.delimiter is not None and (len(self.delimiter) != 1 or self.delimiter in '"\n\r '):
            raise ValueError(f"delimiter must be one character, no quote, space or line end; got {self.delimiter!r}")
        if self.header is False:
            named = [value for value in (self.user, self.item, self.rating) if isinstance(value, str)]
            if named:
                raise ValueError(f"column {named[0]!r} is given by name, but header is False: give its number")


class Source(NamedTuple):
    """What was found at a path: the format, and the files to read in order."""

    format: str
    path: Path
    files: list[SourceFile]

    @property
    def name(self) -> str:
        """What messages and the data set call it."""
        return self.files[0].name if len(self.files) == 1 else self.path.name


def find_source(path: str | Path, format: str = "auto", columns: Columns | None = None) -> Source:
    """Looks at names and first bytes. An explicit `format` or explicit columns override what they say.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: an unknown format, nothing readable inside, or several files of which none is the obvious one.
    """
    source = _find(Path(path), format, columns)
    if columns is not None and columns != Columns() and source.format not in ("csv", "parquet"):
        found = f"found {source.format}"
        raise ValueError(f"{source.path.name}: columns, delimiter and header are options of csv and parquet; {found}")
    return source


def _find(path: Path, format: str, columns: Columns | None) -> Source:
    if format != "auto" and format not in FORMATS:
        raise ValueError(f"unknown format {format!r}; expected auto or one of {', '.join(FORMATS)}")
    if path.is_file() and is_zip(path) and (npz := npz_format(path)) is not None:
        return Source(npz if format == "auto" else format, path, [])
    files = list_files(path)
    if format in ("auto", "arrays") and holds_columns(path):
        return Source("arrays", path, files)
    if format in ("auto", "split"):
        by_name = {file.base_name: file for file in files}
        if set(SPLIT_FILES) <= set(by_name):
            return Source("split", path, files)
    chosen = _choose(files, path, format)
    if path.is_dir() and len(chosen) == 1:
        inside = path / chosen[0].name.split("/", 1)[-1]
        if is_zip(inside):
            return _find(inside, format, columns)
    if format in ("split", "scipy", "compact", "arrays"):
        raise ValueError(f"{path.name}: not of format {format!r}; found {chosen[0].name}")
    if format == "auto":
        format = _sniff(chosen[0], columns is not None and columns != Columns())
    return Source(format, path, chosen)


def read_events(
    source: str | Path,
    *,
    format: str = "auto",
    user_column: str | int | None = None,
    item_column: str | int | None = None,
    rating_column: str | int | None = None,
    delimiter: str | None = None,
    header: bool | None = None,
    show_progress: bool = False,
    block_bytes: int = BLOCK_BYTES,
) -> Events:
    """All events of a file, archive or folder in file order; of a repeated (user, item) pair the first.

    Args:
        source: MovieLens, Netflix, Million Song, csv, tsv, parquet, `.npz` or a folder of arrays; plain, compressed, or
            its folder.
        format: "auto" or one of `FORMATS`.
        user_column, item_column, rating_column: header name or number of a column of a csv, tsv or parquet.
        delimiter: of a csv; found out where None.
        header: whether the first line of a csv names the columns; found out where None.
        show_progress: a bar over bytes, if stderr is a terminal.
        block_bytes: how much is read and parsed at a time.

    Raises:
        FileNotFoundError: nothing is at `source`.
        ValueError: the file is not what it says; names the file and, for text, the line.
        ImportError: parquet without polars.
    """
    if block_bytes < 1:
        raise ValueError(f"block_bytes must be at least 1; got {block_bytes}")
    columns = Columns(user_column, item_column, rating_column, delimiter, header)
    return events_of(find_source(source, format, columns), columns, show_progress, block_bytes)


def events_of(source: Source, columns: Columns, show_progress: bool = False, block_bytes: int = BLOCK_BYTES) -> Events:
    """Like `read_events`, of a source that is already found."""
    if source.format == "split":
        raise ValueError(f"{source.path.name}: a finished split has no raw events; use prepare or open_dataset")
    if source.format == "scipy":
        return read_scipy(source.path)
    if source.format == "compact":
        return Compact(source.path).events()
    return collect(chunks_of(source, columns, show_progress, block_bytes), source.name)


def chunks_of(
    source: Source, columns: Columns, show_progress: bool = False, block_bytes: int = BLOCK_BYTES
) -> Iterator[Chunk]:
    """The events of a source that is no matrix and no finished split, in the order of its files."""
    if source.format == "arrays":
        yield from column_chunks(source.path)
        return
    with Progress(source.files, show_progress) as progress:
        if source.format == "parquet":
            yield from _parquet_chunks(source, columns)
        else:
            yield from _text_chunks(source, columns, progress, block_bytes)


def _choose(files: list[SourceFile], path: Path, format: str) -> list[SourceFile]:
    """The one file (or Netflix's many) that carries the events."""
    if len(files) == 1:
        return files
    netflix = [file for file in files if _NETFLIX_FILE.fullmatch(file.base_name)]
    if netflix and format in ("auto", "netflix"):
        return sorted(netflix, key=lambda file: file.base_name)
    known = [file for file in files if file.base_name in _WHOLE_FILES]
    if len(known) == 1:
        return known
    candidates = known or [file for file in files if file.base_name.lower().endswith(_DATA_SUFFIXES)]
    if len(candidates) == 1:
        return candidates
    shown = ", ".join(file.name for file in (candidates or files)[:8]) or "nothing"
    raise ValueError(f"{path.name}: expected one file with interactions; found {shown}")


def _sniff(file: SourceFile, columns_given: bool) -> str:
    head = read_head(file)
    if not head:
        raise ValueError(f"{file.name}: the file is empty")
    if head.startswith(b"PAR1"):
        return "parquet"
    if head.startswith(b"PK"):
        raise ValueError(f"{file.name}: a zip archive inside of {file.name.split('/')[0]} is not read; unpack it first")
    if columns_given:
        return "csv"
    first = head.split(b"\n", 1)[0].rstrip(b"\r")
    if first == _MOVIELENS_HEADER.encode():
        return "movielens-csv"
    if file.base_name == "ratings.dat" or re.match(rb"\d+::\d+::", first):
        return "movielens-dat"
    if _NETFLIX_FILE.fullmatch(file.base_name) or re.fullmatch(rb"\d+:", first):
        return "netflix"
    return {"u.data": "movielens-data", "train_triplets.txt": "msd"}.get(file.base_name, "csv")


def _text_chunks(source: Source, columns: Columns, progress: Progress | None, block_bytes: int) -> Iterator[Chunk]:
    for file in source.files:
        if source.format == "netflix":
            yield from _netflix_chunks(file, progress, block_bytes)
            continue
        if source.format == "csv":
            layout, has_header = csv_layout(file, columns)
        else:
            layout, has_header = _STRICT[source.format], source.format == "movielens-csv"
        for lines in _lines(file, progress, block_bytes):
            if has_header:
                has_header = False
                if source.format == "movielens-csv" and lines.text(0) != _MOVIELENS_HEADER:
                    lines.malformed(0, f"the header {_MOVIELENS_HEADER}")
                lines = lines.without_first()
            if len(lines.start):
                yield parse_lines(lines, layout)


def _lines(file: SourceFile, progress: Progress | None, block_bytes: int) -> Iterator[Lines]:
    for block, first_line in read_blocks(file, block_bytes, progress):
        yield from split_lines(block, first_line, file.name).pieces()


def _netflix_chunks(file: SourceFile, progress: Progress | None, block_bytes: int) -> Iterator[Chunk]:
    movie: int | None = None
    for lines in _lines(file, progress, block_bytes):
        buffer = np.frombuffer(lines.data, np.uint8)
        is_heading = buffer[lines.stop - 1] == ord(":")
        at = np.flatnonzero(is_heading).tolist()
        for row in at:
            if not re.fullmatch("[0-9]{1,9}:", lines.text(row)):
                lines.malformed(row, _NETFLIX.expected)
        movies = [int(lines.text(row)[:-1]) for row in at]
        if movie is None and not is_heading[0]:
            lines.malformed(0, "'movie_id:' before the first rating")
        movie_of = np.array([-1 if movie is None else movie, *movies], np.int64)[np.cumsum(is_heading)]
        movie = int(movie_of[-1])
        if not is_heading.all():
            ratings = parse_lines(lines.select(~is_heading), _NETFLIX)
            yield Chunk(ratings.users, movie_of[~is_heading], ratings.ratings)


def csv_layout(file: SourceFile, columns: Columns, by_position: bool = False) -> tuple[Layout, bool]:
    """How the lines of a csv or tsv are cut, and whether its first line is a header.

    Args:
        by_position: take the first column as user and the second as item where the header has unknown names.

    Raises:
        ValueError: an empty file, no delimiter, a column that is not there, or a header that names no user or item.
    """
    head = read_head(file).decode("utf-8", errors="replace")
    rows = [line for line in (line.rstrip("\r") for line in head.split("\n")) if line]
    if not rows:
        raise ValueError(f"{file.name}: the file is empty")
    delimiter = columns.delimiter or _find_delimiter(rows[0], file.name)
    try:
        cells = split_cells(rows[0], delimiter)
        second = split_cells(rows[1], delimiter) if len(rows) > 1 else []
    except csv.Error as error:
        raise ValueError(
            f"{file.name}, line 1: expected cells between {delimiter!r}; found {rows[0][:80]!r}"
        ) from error
    plain = [re.sub("[^a-z]", "", cell.lower()) for cell in cells]
    header = _has_header(cells, second, plain, columns)
    user = _column(columns.user, USER_NAMES, "user", 0, cells, plain, header, file.name, by_position)
    item = _column(columns.item, ITEM_NAMES, "item", 1, cells, plain, header, file.name, by_position)
    rating: int | None
    if columns.rating is not None:
        rating = _column(columns.rating, RATING_NAMES, "rating", 2, cells, plain, header, file.name)
    elif header:
        rating = next((plain.index(name) for name in RATING_NAMES if name in plain), None)
    else:
        free = [c for c in range(len(cells)) if c not in (user, item)]
        rating = free[0] if free and _is_number(cells[free[0]]) else None
    if user == item:
        raise ValueError(f"{file.name}: user and item are both column {user}")
    names = (
        cells if header else [{user: "user", item: "item", rating: "rating"}.get(c, "...") for c in range(len(cells))]
    )
    layout = Layout(delimiter.encode(), len(cells), user, item, rating, delimiter.join(names), quotes=True)
    return layout, header


def _find_delimiter(line: str, name: str) -> str:
    counts = {delimiter: line.count(delimiter) for delimiter in ("\t", ",", ";", "|")}
    best = max(counts, key=lambda delimiter: counts[delimiter])
    if counts[best] == 0:
        raise ValueError(f"{name}, line 1: expected cells between tabs, commas, ';' or '|'; found {line[:80]!r}")
    return best


def _has_header(cells: list[str], second: list[str], plain: list[str], columns: Columns) -> bool:
    if columns.header is not None:
        return columns.header
    if any(isinstance(value, str) for value in (columns.user, columns.item, columns.rating)):
        return True
    if any(name in plain for name in USER_NAMES) and any(name in plain for name in ITEM_NAMES):
        return True
    pairs = zip(cells, second, strict=False)
    return any(not _is_number(above) and _is_number(below) for above, below in pairs)


def _column(
    given: str | int | None,
    names: tuple[str, ...],
    role: str,
    default: int,
    cells: list[str],
    plain: list[str],
    header: bool,
    file_name: str,
    by_position: bool = False,
) -> int:
    if isinstance(given, str):
        if given not in cells:
            raise ValueError(f"{file_name}, line 1: expected a column {given!r}; found {', '.join(cells)}")
        return cells.index(given)
    if given is None and header:
        known = [plain.index(name) for name in names if name in plain]
        if not known and not by_position:
            raise ValueError(
                f"{file_name}, line 1: which column is the {role}? give {role}_column; found {', '.join(cells)}"
            )
        if known:
            return known[0]
    number = default if given is None else given
    if not 0 <= number < len(cells):
        raise ValueError(f"{file_name}, line 1: expected a column {number} for the {role}; found {len(cells)} columns")
    return number


def _is_number(text: str) -> bool:
    return re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", text) is not None


def _parquet_chunks(source: Source, columns: Columns) -> Iterator[Chunk]:
    try:
        polars: Any = import_module("polars")
    except ImportError as error:
        raise ImportError("parquet needs polars: pip install 'cfsfl-fast[data]'") from error
    file = source.files[0]
    with _parquet_errors(polars, file.name), file.opened() as raw:
        frame = polars.scan_parquet(raw.read())
        names = frame.collect_schema().names()
    plain = [re.sub("[^a-z]", "", name.lower()) for name in names]
    chosen = [
        names[_column(columns.user, USER_NAMES, "user", 0, names, plain, True, file.name)],
        names[_column(columns.item, ITEM_NAMES, "item", 1, names, plain, True, file.name)],
    ]
    if columns.rating is not None or any(name in plain for name in RATING_NAMES):
        chosen.append(names[_column(columns.rating, RATING_NAMES, "rating", 2, names, plain, True, file.name)])
    with _parquet_errors(polars, file.name):
        table = frame.select(chosen).collect()
    for start in range(0, table.height, _PARQUET_ROWS):
        part = table.slice(start, _PARQUET_ROWS)
        for name in chosen:
            if part[name].null_count():
                row = start + int(part[name].is_null().arg_max())
                raise ValueError(f"{file.name}, row {row}: expected a value in column {name!r}; found none")
        with _parquet_errors(polars, file.name):
            users, items = (_parquet_ids(part[name], file.name) for name in chosen[:2])
        ratings = None
        if len(chosen) == 3:
            kind = part[chosen[2]].dtype
            if not kind.is_numeric():
                raise ValueError(f"{file.name}: expected numbers in column {chosen[2]!r}; found {kind}")
            ratings = part[chosen[2]].cast(polars.Float64).to_numpy()
            if not np.isfinite(ratings).all():
                row = start + int(np.argmin(np.isfinite(ratings)))
                raise ValueError(f"{file.name}, row {row}: expected a finite rating; found {ratings[row - start]}")
        yield Chunk(users, items, ratings)


@contextmanager
def _parquet_errors(polars: Any, name: str) -> Iterator[None]:
    """What polars says of a damaged file, its panics included, as a ValueError."""
    try:
        yield
    except BaseException as error:
        damaged = isinstance(error, (polars.exceptions.PolarsError, OSError))
        if not damaged and type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"{name}: not a readable parquet file ({error})") from error


def _parquet_ids(series: Any, name: str) -> Any:
    if series.dtype.is_integer():
        ids = series.to_numpy()
        if ids.dtype.kind == "u" and ids.size and ids.max() >= 2**63:
            raise ValueError(f"{name}: expected integers below 2^63 in column {series.name!r}; found {ids.max()}")
        return ids.astype(np.int64)
    if series.dtype.is_float():
        raise ValueError(f"{name}: expected integers or texts in column {series.name!r}; found {series.dtype}")
    texts = series.cast(str)
    lengths = texts.str.len_bytes()
    if len(texts) and not 0 < lengths.min() <= lengths.max() <= MAX_ID_BYTES:
        found = f"{lengths.min()} to {lengths.max()} bytes"
        raise ValueError(f"{name}: expected 1 to {MAX_ID_BYTES} bytes in column {series.name!r}; found {found}")
    if texts.str.contains("\0", literal=True).any():
        raise ValueError(f"{name}: expected texts in column {series.name!r}; found binary data")
    return np.char.encode(texts.to_numpy().astype(np.str_), "utf-8")
