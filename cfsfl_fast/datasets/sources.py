"""Where bytes come from: a file, a folder, a zip or a tar, each plain or compressed, as blocks of whole lines.

Nothing is ever extracted to disk. Every fault of the bytes themselves (truncated or damaged compression, binary data,
an encoding that is not UTF-8) becomes a `ValueError` that names the file.
"""

import bz2
import codecs
import gzip
import lzma
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from types import TracebackType
from typing import IO, cast

from cfsfl_fast.arrays import check_ratio, damage_named, zip_members

BLOCK_BYTES = 4 << 20
LONGEST_LINE = 1 << 20
COMPRESSED_SUFFIXES = (".gz", ".xz", ".bz2")
TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".txz", ".tar.bz2")
_UTF16_OR_32 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)


@dataclass(frozen=True)
class SourceFile:
    """One readable file. `name` is how messages call it, `size` the bytes that a progress bar counts to."""

    name: str
    size: int
    opened: Callable[[], AbstractContextManager[BufferedReader]]

    @property
    def base_name(self) -> str:
        """Last part of the name, without a compression suffix: `ratings.csv` for `ml-20m/ratings.csv.gz`."""
        last = self.name.rsplit("/", 1)[-1]
        for suffix in COMPRESSED_SUFFIXES:
            last = last.removesuffix(suffix)
        return last


class Progress:
    """A tqdm bar over bytes, shown only when asked for and when stderr is a terminal."""

    def __init__(self, files: list[SourceFile], show: bool) -> None:
        total = sum(file.size for file in files)
        visible = show and sys.stderr.isatty()
        from tqdm import tqdm

        self._bar = tqdm(total=total, unit="B", unit_scale=True, desc="reading", disable=not visible)
        self._done = 0

    def at(self, position: int) -> None:
        """Tells that `position` bytes of the current file are read."""
        self._bar.update(position - self._done)
        self._done = position

    def next_file(self) -> None:
        """Starts counting the next file from zero."""
        self._done = 0

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()


def file_at(path: Path) -> SourceFile:
    """The file at `path` itself, even if it is an archive."""

    @contextmanager
    def opened() -> Iterator[BufferedReader]:
        with path.open("rb") as raw:
            yield raw

    return SourceFile(path.name, path.stat().st_size, opened)


def list_files(path: Path) -> list[SourceFile]:
    """The files that `path` offers: itself, or those of the folder (two levels deep), zip or tar that it is.

    Raises:
        FileNotFoundError: nothing is at `path`.
        ValueError: a damaged archive.
    """
    if not path.exists():
        raise FileNotFoundError(f"no such file or folder: {path}")
    if path.is_dir():
        found = sorted(p for pattern in ("*", "*/*") for p in path.glob(pattern) if p.is_file())
        return [_renamed(file_at(p), p.relative_to(path.parent).as_posix()) for p in found]
    if path.name.lower().endswith(TAR_SUFFIXES):
        return _tar_members(path)
    if is_zip(path):
        return _zip_members(path)
    return [file_at(path)]


def is_zip(path: Path) -> bool:
    """Whether the file starts as a zip archive does (`.npz` files do too)."""
    with path.open("rb") as raw:
        return raw.read(4) in (b"PK\x03\x04", b"PK\x05\x06")


def _renamed(file: SourceFile, name: str) -> SourceFile:
    return SourceFile(name, file.size, file.opened)


def _zip_members(path: Path) -> list[SourceFile]:
    def member(info: zipfile.ZipInfo) -> SourceFile:
        @contextmanager
        def opened() -> Iterator[BufferedReader]:
            with damage_named(path.name):
                check_ratio(info.file_size, info.compress_size)
                archive = zipfile.ZipFile(path)
                raw = archive.open(info)
            with archive, raw:
                yield cast(BufferedReader, raw)

        return SourceFile(f"{path.name}/{info.filename}", info.file_size, opened)

    infos = [info for info in zip_members(path) if not info.filename.endswith("/")]
    return [member(info) for info in sorted(infos, key=lambda info: info.filename)]


def _tar_members(path: Path) -> list[SourceFile]:
    def member(info: tarfile.TarInfo) -> SourceFile:
        @contextmanager
        def opened() -> Iterator[BufferedReader]:
            with damage_named(path.name):
                archive = tarfile.open(path)  # noqa: SIM115
                raw = archive.extractfile(info)
            assert raw is not None  # list_files keeps regular files only
            with archive, raw:
                yield cast(BufferedReader, raw)

        return SourceFile(f"{path.name}/{info.name}", info.size, opened)

    with damage_named(path.name), tarfile.open(path) as archive:
        infos = [info for info in archive.getmembers() if info.isreg()]
    return [member(info) for info in sorted(infos, key=lambda info: info.name)]


def _decompressed(raw: BufferedReader) -> IO[bytes]:
    magic = raw.peek(6)[:6]
    if magic.startswith(b"\x1f\x8b"):
        return cast(IO[bytes], gzip.GzipFile(fileobj=raw))
    if magic == b"\xfd7zXZ\x00":
        return lzma.LZMAFile(raw)
    if magic.startswith(b"BZh"):
        return bz2.BZ2File(raw)
    return raw


def read_head(file: SourceFile, size: int = 1 << 16) -> bytes:
    """The first `size` bytes (or fewer), decompressed, without a UTF-8 byte order mark."""
    with file.opened() as raw, damage_named(file.name):
        return _decompressed(raw).read(size).removeprefix(codecs.BOM_UTF8)


def read_blocks(
    file: SourceFile, block_bytes: int = BLOCK_BYTES, progress: Progress | None = None
) -> Iterator[tuple[bytes, int]]:
    """Blocks of whole lines of one file and the number of each block's first line (the file's first line is 1).

    Every block ends in a newline, also the last one. A UTF-8 byte order mark is taken off.

    Raises:
        ValueError: truncated or damaged compression, NUL bytes, not UTF-8, a line of over 1 MiB, or nothing at all.
    """
    if progress is not None:
        progress.next_file()
    line, rest, at_start, n_read = 1, b"", True, 0
    with file.opened() as raw:
        stream = _decompressed(raw)
        while True:
            with damage_named(file.name):
                data = stream.read(block_bytes)
                n_read += len(data)
                if stream is not raw:
                    check_ratio(n_read, raw.tell())
            if at_start and data:
                while len(data) < 4:  # a tiny block size must not split the byte order mark
                    more = stream.read(block_bytes)
                    if not more:
                        break
                    data += more
                if data.startswith(_UTF16_OR_32):
                    raise ValueError(f"{file.name}, line 1: expected UTF-8 text; found UTF-16 or UTF-32")
                data = data.removeprefix(codecs.BOM_UTF8)
                at_start = False
            elif at_start:
                raise ValueError(f"{file.name}: the file is empty")
            if progress is not None:
                progress.at(raw.tell())
            if not data:
                break
            cut = data.rfind(b"\n") + 1
            if cut == 0:
                rest += data
                if len(rest) > LONGEST_LINE:
                    raise ValueError(f"{file.name}, line {line}: expected lines of text; found one of over 1 MiB")
                continue
            block, rest = rest + data[:cut], data[cut:]
            yield _checked(block, file.name, line), line
            line += block.count(b"\n")
        if rest:
            yield _checked(rest + b"\n", file.name, line), line


def _checked(block: bytes, name: str, line: int) -> bytes:
    nul = block.find(b"\0")
    if nul >= 0:
        at = line + block.count(b"\n", 0, nul)
        raise ValueError(f"{name}, line {at}: expected text; found binary data")
    if not block.isascii():
        try:
            block.decode("utf-8")
        except UnicodeDecodeError as error:
            at = line + block.count(b"\n", 0, error.start)
            found = f"byte 0x{block[error.start]:02x}"
            raise ValueError(f"{name}, line {at}: expected UTF-8 text; found {found}") from error
    return block
