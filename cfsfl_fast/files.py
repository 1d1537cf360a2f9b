"""Files and folders that are there whole or not at all, whatever kills the process or fills the disk.

What is written is staged in a folder beside its place, `.NAME.partial-*`, and moved there in one step. The process that
writes holds a lock on that folder, which the system drops when it dies: whoever writes to the same place next can tell
what a killed process left from what another is writing right now.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file to write; at the end, if nothing was raised, it takes the place of `path` in one rename.

    Raises:
        FileExistsError: `path` is a folder or a device.
        OSError: the disk is full, or the folder cannot be written to; names `path`, which is as it was.
    """
    if path.exists() and not path.is_file():
        raise FileExistsError(f"{path} is no regular file: it is left alone")
    with _staging(path) as staged:
        yield staged
        sync(staged)
        os.replace(staged, path)
    sync(path.parent)


@contextlib.contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """A new folder to fill; at the end, if nothing was raised, it takes folder's place, and what stood there goes.

    Raises:
        OSError: as in `replacing`.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _staging(folder) as staged:
        staged.mkdir()
        yield staged
        sync(staged)
        _move(staged, folder)
    sync(folder.parent)


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file, whole or not at all."""
    with replacing(path) as staged:
        staged.write_bytes(content)


def read_whole(place: Path, read: Callable[[Path], T]) -> T:
    """What `read` makes of a file or folder; again, where another took its place meanwhile: never a mixture of two.

    Raises:
        Exception: what `read` raises.
    """
    while True:
        try:
            handle = os.open(place, os.O_RDONLY)  # while it is open, no other folder gets its number
        except OSError:
            return read(place)
        try:
            found = read(place)
            if _is(handle, place):
                return found
        except (OSError, ValueError):
            if _is(handle, place):
                raise
        finally:
            os.close(handle)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Nobody else who asks for the same path's lock is inside; waits for whoever is. A killed process lets go."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with (path.parent / f".{path.name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def remove_staged(folder: Path) -> None:
    """Removes what killed processes left half written below a folder."""
    for path in list(folder.rglob(".*.partial-*")):
        _remove_if_left(path)


def sync(path: Path) -> None:
    """Waits until a file's or a folder's content is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def _staging(path: Path) -> Iterator[Path]:
    """A path of the same name in a locked folder beside it; what killed processes left of such folders goes first."""
    prefix = f".{path.name}.partial-"
    made: list[Path] = []
    lock = None
    try:
        for left in path.parent.iterdir():
            if left.name.startswith(prefix):
                _remove_if_left(left)
        while lock is None:  # another who looks for what is left may take the folder before it is locked
            made.append(Path(tempfile.mkdtemp(dir=path.parent, prefix=prefix)))
            lock = _locked(made[-1])
        yield made[-1] / path.name
    except OSError as error:
        elsewhere = error.filename is not None and prefix not in os.fsdecode(error.filename)
        if error.errno is None or elsewhere:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        for folder in made:
            shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _locked(folder: Path) -> int | None:
    """A handle on a folder that nobody else may lock while it is open; None where the folder is locked or gone."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno == errno.EWOULDBLOCK:
            os.close(handle)
            return None  # any other error: a file system without locks, where nothing is ever removed
    if _is(handle, folder):
        return handle
    os.close(handle)
    return None


def _remove_if_left(path: Path) -> None:
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return
    with contextlib.suppress(OSError):
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(path, ignore_errors=True)
    os.close(handle)


def _is(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except OSError:
        return False


_RENAME_EXCHANGE = 2
_AT_FDCWD = -100


def _move(staged: Path, folder: Path) -> None:
    """Exchanges the two where the system can, so that one of them stands at `folder` at every moment."""
    if not folder.exists():
        os.replace(staged, folder)
        return
    try:
        swap = ctypes.CDLL(None, use_errno=True).renameat2
        if swap(_AT_FDCWD, os.fsencode(staged), _AT_FDCWD, os.fsencode(folder), _RENAME_EXCHANGE) == 0:
            return
    except (AttributeError, OSError):
        pass
    old = staged.with_name(f"{staged.name}-old")
    os.replace(folder, old)
    try:
        os.replace(staged, folder)
    except OSError:
        os.replace(old, folder)
        raise
