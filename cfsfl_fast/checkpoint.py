"""Folders that hold a model: config.json, model.safetensors, item_ids.npy, memory.safetensors. No pickle.

A folder is whole or refused. Every tensor file carries the SHA-256 of its tensors; a model's carries those of its
neighbours too, so that a file that was truncated, altered or taken from another folder is noticed before it is used.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cfsfl_fast import arrays, files
from cfsfl_fast.config import FORMAT_VERSION, CFSFLConfig

CONFIG, MODEL, ITEM_IDS, MEMORY = "config.json", "model.safetensors", "item_ids.npy", "memory.safetensors"
_NEIGHBOURS = (CONFIG, ITEM_IDS, MEMORY)
_METADATA = "cfsfl"
_FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


class SavedModel(NamedTuple):
    """What a folder holds."""

    n_items: int
    config: CFSFLConfig
    tensors: dict[str, Tensor]
    item_ids: np.ndarray | None
    memory: dict[str, Tensor] | None


def save_model(
    folder: Path,
    n_items: int,
    config: CFSFLConfig,
    tensors: Mapping[str, Tensor],
    item_ids: np.ndarray | None,
    memory: Mapping[str, Tensor] | None = None,
) -> None:
    """Writes a model's folder beside its place and moves it there; other files of an older folder go."""
    with files.replacing_folder(folder) as staged:
        write_description(staged, n_items, config, item_ids)
        if memory is not None:
            write_tensors(staged / MEMORY, memory, {})
        write_model(staged, tensors)


def write_description(folder: Path, n_items: int, config: CFSFLConfig, item_ids: np.ndarray | None) -> None:
    """Writes config.json and item_ids.npy: what does not change while a model trains."""
    if item_ids is not None:
        if len(item_ids) != n_items:
            raise ValueError(f"item_ids must have one id per item, {n_items}; got {len(item_ids)}")
        buffer = io.BytesIO()
        np.save(buffer, item_ids, allow_pickle=False)
        files.write_bytes(folder / ITEM_IDS, buffer.getvalue())
    described = {"format_version": FORMAT_VERSION, "n_items": n_items, **config.to_dict()}
    files.write_bytes(folder / CONFIG, (json.dumps(described, indent=2) + "\n").encode())


def write_model(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes model.safetensors into a folder that has its description; one rename, so it is there whole or not.

    Raises:
        ValueError: a tensor holds NaN or infinite values, and the file would be refused by who reads it.
    """
    check_finite(folder / MODEL, tensors)
    write_tensors(folder / MODEL, tensors, neighbours(folder))


def neighbours(folder: Path) -> dict[str, str]:
    """The metadata of a model's tensors: the digests of the files beside them."""
    found = {name: _file_digest(folder / name) for name in _NEIGHBOURS if (folder / name).exists()}
    return {"files": json.dumps(found, sort_keys=True)}


def load_model(folder: Path) -> SavedModel:
    """What `save_model` wrote.

    Raises:
        FileNotFoundError: the folder or one of its files is missing.
        ValueError: a file is truncated, altered or of a newer format.
    """
    return files.read_whole(folder, _load_model)


def read_description(folder: Path) -> tuple[int, CFSFLConfig]:
    """The number of items and the config of a folder.

    Raises:
        FileNotFoundError, ValueError: as in `load_model`.
    """
    described = read_json(folder / CONFIG)
    version = described.pop("format_version", None)
    if not isinstance(version, int) or not 1 <= version <= FORMAT_VERSION:
        raise ValueError(f"{folder / CONFIG}: format version {version}; this library reads 1 to {FORMAT_VERSION}")
    n_items = described.pop("n_items", None)
    if not isinstance(n_items, int) or n_items < 1:
        raise ValueError(f"{folder / CONFIG}: n_items must be at least 1; found {n_items!r}")
    try:
        config = CFSFLConfig.from_dict(described)
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG}: {error}") from None
    return n_items, config


def read_item_ids(folder: Path, n_items: int, metadata: dict[str, str]) -> np.ndarray | None:
    """The item ids of a folder, if it has them, once every file beside the model's tensors is the one that they name.

    Args:
        folder: of a model.
        n_items: M.
        metadata: of its tensors.

    Raises:
        FileNotFoundError, ValueError: as in `load_model`.
    """
    recorded = _parsed(folder / MODEL, metadata.get("files", ""))
    for name in _NEIGHBOURS:
        if (name in recorded or (folder / name).exists()) and _file_digest(folder / name) != recorded.get(name):
            raise ValueError(f"{folder / name} does not belong to {MODEL} beside it: altered, or from another model")
    item_ids = None
    if (folder / ITEM_IDS).exists():
        item_ids = np.array(arrays.map_npy(folder / ITEM_IDS))
        if item_ids.shape != (n_items,) or item_ids.dtype.kind not in "iuUS":
            found = f"{item_ids.dtype} of shape {item_ids.shape}"
            raise ValueError(f"{folder / ITEM_IDS}: expected {n_items} integers or texts, found {found}")
    return item_ids


def _load_model(folder: Path) -> SavedModel:
    n_items, config = read_description(folder)
    tensors, metadata = read_tensors(folder / MODEL)
    item_ids = read_item_ids(folder, n_items, metadata)
    memory = read_tensors(folder / MEMORY)[0] if (folder / MEMORY).exists() else None
    return SavedModel(n_items, config, tensors, item_ids, memory)


def check_tensors(path: Path, found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Refuses the tensors of a file whose names, types or shapes are not the wanted ones, or that hold NaN.

    Raises:
        ValueError: naming the first of them.
    """
    if differing := sorted(set(found) ^ set(wanted)):
        where = "missing from" if differing[0] in wanted else "unknown in"
        raise ValueError(f"{path}: tensor {differing[0]!r} is {where} the file")
    for name, tensor in found.items():
        if tensor.shape != wanted[name].shape:
            expected = tuple(wanted[name].shape)
            raise ValueError(f"{path}: {name} has shape {tuple(tensor.shape)}, its config says {expected}")
        if tensor.dtype not in _FLOATS:
            raise ValueError(f"{path}: {name} holds {tensor.dtype}, expected {wanted[name].dtype}")
    check_finite(path, found)


def check_finite(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Refuses tensors that hold NaN or infinite values.

    Raises:
        ValueError: naming the first of them and the file that they are of.
    """
    for name, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"{path}: {name} holds NaN or infinite values")


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Writes a safetensors file with the digest of its tensors, whole or not at all.

    Raises:
        OSError: the disk is full, or the folder cannot be written to.
    """
    from safetensors import SafetensorError  # here, so that a machine which only computes need not have it
    from safetensors.torch import save_file

    held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with files.replacing(path) as staged:
        try:
            save_file(held, staged, described(metadata, digest(held, metadata)))
        except SafetensorError as error:
            number = re.search(r"\(os error (\d+)\)", str(error))
            if number is None:
                raise
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
        os.chmod(staged, 0o644)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of such a file.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is truncated or altered.
    """
    return files.read_whole(path, _read_tensors)  # the library opens a file twice, for the header and for the tensors


def _read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with opened(path) as (found, metadata):
        tensors = dict(found)
        _compare(path, tensors, metadata)
    return tensors, metadata


def verified(path: Path) -> dict[str, str]:
    """The metadata of such a file and its digest, "sha256"; its tensors are what was written, one at a time in memory.

    Raises:
        FileNotFoundError, ValueError: as in `read_tensors`.
    """

    def read(path: Path) -> dict[str, str]:
        with opened(path) as (found, metadata):
            digest = metadata.get("sha256", "")
            _compare(path, found, metadata)
        return {**metadata, "sha256": digest}

    return files.read_whole(path, read)


def _compare(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    if metadata.pop("sha256", None) != digest(tensors, metadata):
        raise _AlteredError(f"{path} is altered: its tensors do not have the digest that was written with them")


class _AlteredError(ValueError):
    """Said already what is wrong with the file."""


class Stored(Mapping[str, Tensor]):
    """The tensors of an open file, each read when it is asked for."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self._names = list(file.keys())

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._file.get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def shape(self, name: str) -> list[int]:
        """Of a tensor, which is not read."""
        return list(self._file.get_slice(name).get_shape())

    def rows(self, name: str, first: int, last: int) -> Tensor:
        """Rows first .. last - 1 of a tensor; the others are not read."""
        tensor: Tensor = self._file.get_slice(name)[first:last]
        return tensor


@contextlib.contextmanager
def opened(path: Path) -> Iterator[tuple[Stored, dict[str, str]]]:
    """The tensors of a file and its metadata with the digest, which is not compared. Inside, read and nothing else.

    Raises:
        FileNotFoundError, ValueError: as in `read_tensors`, also where a tensor is read.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            found = file.metadata() or {}
            metadata = json.loads(found[_METADATA]) if _METADATA in found else dict(found)
            if not isinstance(metadata, dict):
                raise TypeError(f"metadata of type {type(metadata).__name__}")
            yield Stored(file), metadata
    except _AlteredError:
        raise
    except (SafetensorError, ValueError, RuntimeError, OverflowError, TypeError, MemoryError) as error:
        raise ValueError(f"{path} is truncated or altered ({error})") from None


def described(metadata: dict[str, str], digest: str) -> dict[str, str]:
    """Metadata as a file holds it. One entry: of several, the library's order changes from call to call."""
    return {_METADATA: json.dumps({**metadata, "sha256": digest}, sort_keys=True)}


def read_json(path: Path) -> dict[str, Any]:
    """A json object.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a json object.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    return _parsed(path, path.read_bytes())


def _parsed(path: Path, text: bytes | str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not json ({error})") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: expected a json object, found {type(found).__name__}")
    return found


def raw(tensor: Tensor) -> memoryview:
    """A contiguous tensor's bytes, not copied."""
    if tensor.numel() == 0:
        return memoryview(b"")
    found: memoryview = tensor.flatten().view(torch.uint8).numpy().data
    return found


def digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """SHA-256 of tensors and metadata."""
    sha = hashlib.sha256(json.dumps(dict(metadata), sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        sha.update(raw(tensor))
    return sha.hexdigest()


def _file_digest(path: Path) -> str:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    sha = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            sha.update(block)
    return sha.hexdigest()
