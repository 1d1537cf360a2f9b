"""Tensor files of models in parts: every process writes and reads its own rows of one ordinary file.

A table's rows follow one another in a safetensors file, so a part of them is one range of bytes: the file is that of a
model in one process, which any number of processes can read. (`torch.distributed.checkpoint` would bring a format of
its own, whose `.metadata` is a pickle; this package reads none.) All processes must see the same file system.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cfsfl_fast import checkpoint, files
from cfsfl_fast.distributed import Group, Mesh
from cfsfl_fast.sharded import Shard

_DTYPES = {torch.float32: "F32", torch.float64: "F64", torch.int64: "I64", torch.int32: "I32"}


class _Entry(NamedTuple):
    """Where a whole tensor lies behind the header, and whether this process has rows of it alone."""

    shape: list[int]
    begin: int
    end: int
    is_part: bool


def write_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    metadata: dict[str, str],
    shard: Shard,
    mesh: Mesh,
    tables: tuple[str, ...],
) -> None:
    """`checkpoint.write_tensors` of tensors whose rows several processes have; called by all of them.

    Args:
        path: of the file.
        tensors: this process's.
        metadata: texts that the file carries.
        shard: which rows these are.
        mesh: the processes. The first of those with the same rows writes them.
        tables: names of the tensors that are parts, themselves or as one of the names between slashes.

    Raises:
        OSError: the disk is full, or the folder cannot be written to.
        ProcessError: that happened to another process.
    """
    entries = _layout(tensors, shard, tables)
    size = max(entry.end for entry in entries.values()) if entries else 0

    def header(digest: str) -> bytes:
        held: dict[str, Any] = {"__metadata__": checkpoint.described(metadata, digest)}
        for name, entry in entries.items():
            dtype = _DTYPES[tensors[name].dtype]
            held[name] = {"dtype": dtype, "shape": entry.shape, "data_offsets": [entry.begin, entry.end]}
        text = json.dumps(held, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return struct.pack("<Q", len(text)) + text

    blank = header("0" * 64)
    stack = contextlib.ExitStack()

    def stage() -> str:
        staged = stack.enter_context(files.replacing(path))
        with staged.open("wb") as file:
            file.write(blank)
            file.truncate(len(blank) + size)
        return str(staged)

    def write_own() -> None:
        if not mesh.data.is_first:
            return
        with staged.open("r+b") as file:
            for name, entry in entries.items():
                tensor = tensors[name]
                if entry.is_part or mesh.items.is_first:
                    row = math.prod(entry.shape[1:]) * tensor.element_size() if entry.is_part else 0
                    file.seek(len(blank) + entry.begin + shard.span[0] * row)
                    file.write(checkpoint.raw(tensor.detach().cpu().contiguous()))
            file.flush()
            os.fsync(file.fileno())

    def finish() -> None:
        with checkpoint.opened(staged) as (found, _), staged.open("r+b") as file:
            file.write(header(checkpoint.digest(found, metadata)))
        os.chmod(staged, 0o644)
        stack.close()

    try:
        staged = Path(mesh.everyone.first(stage))
        mesh.everyone.all_do(write_own)
        mesh.everyone.first(finish)
    except BaseException:
        with stack:  # what was staged goes
            raise


def read_tensors(
    path: Path, shard: Shard, everyone: Group, tables: tuple[str, ...]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """This process's part of the tensors of a file, whichever way it was written, and its metadata; called by all.

    Args:
        path, shard, tables: as in `write_tensors`.
        everyone: all processes; the first compares the digest, a tensor at a time.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is truncated or altered.
        ProcessError: the first process found one of these.
    """
    first, last = shard.span
    parts: list[tuple[str, dict[str, Tensor]]] = []

    def read(path: Path) -> tuple[str, dict[str, Tensor]]:
        tensors = {}
        with checkpoint.opened(path) as (found, metadata):
            for name in found:
                cut = _is_table(name, tables) and found.shape(name)[:1] == [shard.n_items]
                tensors[name] = found.rows(name, first, last) if cut else found[name]
        return metadata["sha256"], tensors

    while True:
        metadata = everyone.first(lambda: checkpoint.verified(path))
        everyone.all_do(lambda: parts.append(files.read_whole(path, read)))
        digest, tensors = parts.pop()
        if everyone.agree(digest == metadata["sha256"]):  # else another file took its place meanwhile
            del metadata["sha256"]
            return tensors, metadata


def _is_table(name: str, tables: tuple[str, ...]) -> bool:
    return not set(name.split("/")).isdisjoint(tables)


def _layout(tensors: Mapping[str, Tensor], shard: Shard, tables: tuple[str, ...]) -> dict[str, _Entry]:
    """Widest numbers first, which keeps them aligned."""
    entries, end = {}, 0
    for name in sorted(tensors, key=lambda name: (-tensors[name].element_size(), name)):
        tensor = tensors[name]
        is_part = _is_table(name, tables) and tensor.dim() > 0
        shape = [shard.n_items, *tensor.shape[1:]] if is_part else list(tensor.shape)
        begin, end = end, end + math.prod(shape) * tensor.element_size()
        entries[name] = _Entry(shape, begin, end, is_part)
    return entries
