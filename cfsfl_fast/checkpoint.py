"""Folders that hold a model: config.json, model.safetensors, item_ids.npy, memory.safetensors. No pickle.

A folder is whole or refused. Every tensor file carries the SHA-256 of its tensors; a model's carries those of its
neighbours too, so that a file that was truncated, altered or taken from another folder is noticed before it is used.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
from collections.abc import Mapping
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
    check_tensors(folder / MODEL, tensors, tensors)
    neighbours = {name: _file_digest(folder / name) for name in _NEIGHBOURS if (folder / name).exists()}
    write_tensors(folder / MODEL, tensors, {"files": json.dumps(neighbours, sort_keys=True)})


def load_model(folder: Path) -> SavedModel:
    """What `save_model` wrote.

    Raises:
        FileNotFoundError: the folder or one of its files is missing.
        ValueError: a file is truncated, altered or of a newer format.
    """
    return files.read_whole(folder, _load_model)


def _load_model(folder: Path) -> SavedModel:
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
    tensors, metadata = read_tensors(folder / MODEL)
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
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"{path}: {name} holds NaN or infinite values")


def read_weights(folder: Path, wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a folder's model, where they are those of a given one by name and shape.

    Raises:
        FileNotFoundError, ValueError: as in `read_tensors` and `check_tensors`.
    """
    tensors, _ = read_tensors(folder / MODEL)
    check_tensors(folder / MODEL, tensors, wanted)
    return tensors


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
            described = {**metadata, "sha256": _digest(held, metadata)}
            # One entry: of several, the library's order changes from call to call, and with it the file's bytes.
            save_file(held, staged, {_METADATA: json.dumps(described, sort_keys=True)})
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
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            found = file.metadata() or {}
            metadata = json.loads(found[_METADATA]) if _METADATA in found else dict(found)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, ValueError, RuntimeError, OverflowError, TypeError, MemoryError) as error:
        raise ValueError(f"{path} is truncated or altered ({error})") from None
    if not isinstance(metadata, dict) or metadata.pop("sha256", None) != _digest(tensors, metadata):
        raise ValueError(f"{path} is altered: its tensors do not have the digest that was written with them")
    return tensors, metadata


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


def _digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    sha = hashlib.sha256(json.dumps(dict(metadata), sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        if tensor.numel():
            sha.update(tensor.flatten().view(torch.uint8).numpy().data)
    return sha.hexdigest()


def _file_digest(path: Path) -> str:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    sha = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            sha.update(block)
    return sha.hexdigest()
