"""Files and folders that are there whole or not at all, whatever kills the process or the disk."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A place beside `path` to write to; at the end, if nothing was raised, it takes path's place in one rename."""
    staged = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        yield staged
        sync(staged)
        os.replace(staged, path)
    finally:
        staged.unlink(missing_ok=True)
    sync(path.parent)


@contextlib.contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """A new folder beside `folder` to fill; at the end it takes its place, and what stood there goes."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    staged = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.partial-"))
    try:
        staged.chmod(0o755)
        yield staged
        sync(staged)
        _move(staged, folder)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    sync(folder.parent)


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file, whole or not at all."""
    with replacing(path) as staged:
        staged.write_bytes(content)


def remove_staged(folder: Path) -> None:
    """Removes the files that a process left half written below a folder when it was killed."""
    for path in folder.rglob(".*.partial-*"):
        path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Waits until a file's or a folder's content is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


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
    shutil.rmtree(old, ignore_errors=True)
