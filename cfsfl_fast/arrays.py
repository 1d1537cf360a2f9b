"""NumPy arrays from files that nobody vouches for: no pickle, no allocation that the file's size does not explain."""

from __future__ import annotations

import contextlib
import errno
import gzip
import lzma
import math
import re
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib.format import header_data_from_array_1_0, write_array_header_1_0
from numpy.typing import NDArray

ALWAYS_BYTES = 1 << 28
LARGEST_RATIO = 200
"""Compressed data may always unpack to ALWAYS_BYTES, and beyond to LARGEST_RATIO times what they take in the file."""

_LENGTH_BYTES = {b"\x01\x00": 2, b"\x02\x00": 4}
_LONGEST_HEADER = 1 << 12
_HEADER = re.compile(
    r"\{'descr': '(?P<dtype>[<>|][biufcSUO]\d{1,9})', 'fortran_order': (?P<fortran>True|False), "
    r"'shape': \((?P<shape>(\d{1,18}(, ?\d{1,18})*,?)?)\),? ?\} *\n?"
)
"""Of a plain array; NumPy's own reader takes expressions, and stumbles over damaged ones in many ways."""
_DAMAGE = (
    ValueError,
    OverflowError,
    EOFError,
    RuntimeError,
    lzma.LZMAError,
    zlib.error,
    gzip.BadGzipFile,
    zipfile.BadZipFile,
    tarfile.TarError,
)


def map_npy(path: Path) -> NDArray[Any]:
    """The array of a `.npy` file, mapped read-only.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged, holds objects, or is shorter or longer than its header says; names the file.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        try:
            shape, fortran, dtype = _header(file, size)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: damaged or truncated ({error})") from None
        start = file.tell()
    if 0 in shape:
        return np.empty(shape, dtype)  # nothing cannot be mapped
    order: Any = "F" if fortran else "C"
    return np.asarray(np.memmap(path, dtype, "r", start, shape, order))


def write_npy(path: Path, array: NDArray[Any]) -> None:
    """Writes a `.npy` file; unlike `numpy.save`, with the system's own error where the disk is full.

    Raises:
        OSError: it cannot be written.
    """
    array = np.ascontiguousarray(array)
    with path.open("wb") as file:
        write_array_header_1_0(file, header_data_from_array_1_0(array))
        file.write(array.view(np.uint8).data if array.size else b"")


def check_npz(path: Path) -> None:
    """Looks at every header of an `.npz` before anything of it is loaded.

    Raises:
        ValueError: it is damaged, holds objects, an array is not as long as its header says, or all together would take
            absurdly more memory than the file is long; names the file.
    """
    with damage_named(path.name), zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        check_ratio(sum(member.file_size for member in members), path.stat().st_size)
        for member in members:
            with archive.open(member) as stream:
                _header(stream, member.file_size)


def zip_members(path: Path) -> list[zipfile.ZipInfo]:
    """What a zip archive says that it holds.

    Raises:
        ValueError: it is damaged or truncated; names the file.
    """
    with damage_named(path.name), zipfile.ZipFile(path) as archive:
        return archive.infolist()


@contextlib.contextmanager
def damage_named(name: str) -> Iterator[None]:
    """What Python's readers of archives and compressed data stumble over inside, as a ValueError with a file's name."""
    try:
        yield
    except _DAMAGE as error:
        raise ValueError(f"{name}: damaged or truncated ({error})") from error
    except OSError as error:
        if error.errno not in (None, errno.EINVAL):
            raise
        raise ValueError(f"{name}: damaged or truncated ({error})") from error  # of bz2; of a zip's places before 0


def check_ratio(unpacked: int, packed: int) -> None:
    """Refuses what only a decompression bomb does.

    Raises:
        ValueError: the unpacked bytes are more than ALWAYS_BYTES and than LARGEST_RATIO times the packed ones.
    """
    if unpacked > max(ALWAYS_BYTES, LARGEST_RATIO * packed):
        raise ValueError(
            f"{packed:,} compressed bytes that unpack to {unpacked:,}, over {LARGEST_RATIO} times as many: "
            "if they are meant to, store them uncompressed"
        )


def _header(stream: IO[bytes], size: int) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, order and dtype of an array that takes exactly `size` bytes, header included."""
    start = stream.read(8)
    if start[:6] != b"\x93NUMPY" or start[6:] not in _LENGTH_BYTES:
        raise ValueError("no header of an array, or of a format that is not read")
    length = int.from_bytes(stream.read(_LENGTH_BYTES[start[6:]]), "little")
    text = stream.read(length) if length <= _LONGEST_HEADER else b""
    header = _HEADER.fullmatch(text.decode("latin-1"))
    if header is None or len(text) != length:
        raise ValueError(f"expected the header of an array; found {text[:60]!r}")
    dtype, shape = np.dtype(header["dtype"]), tuple(int(n) for n in header["shape"].replace(",", " ").split())
    if dtype.hasobject or dtype.itemsize == 0:
        raise ValueError(f"an array of {dtype}")
    if (expected := stream.tell() + math.prod(shape) * dtype.itemsize) != size:
        raise ValueError(f"expected {expected:,} bytes; found {size:,}")
    return shape, header["fortran"] == "True", dtype
