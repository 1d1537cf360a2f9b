"""A prepared data set on disk: plain `.npy` arrays and `dataset.json`, written atomically, opened by memory maps.

What is checked when: opening compares the manifest with its checksum, every array's type and length with the manifest,
and makes sure that no row start and no item id points outside; it reads the ids once, at the speed of memory. The
checksums of the arrays are compared on demand, `open_dataset(path, verify=True)`: about a second per gigabyte. Every
command that trains on data or gives figures of them asks for it.
"""

import hashlib
import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from cfsfl_fast import arrays as stored
from cfsfl_fast import files
from cfsfl_fast.datasets.buckets import BUCKET_EVENTS, split_chunks
from cfsfl_fast.datasets.dataset import Dataset, HeldOut, binary_csr, check_matrix
from cfsfl_fast.datasets.matrices import Compact, npz_format
from cfsfl_fast.datasets.protocol import Protocol, split_events
from cfsfl_fast.datasets.readers import STREAMED, Columns, Source, chunks_of, events_of, find_source
from cfsfl_fast.datasets.sources import is_zip
from cfsfl_fast.datasets.splits import read_split

log = logging.getLogger(__name__)

FORMAT_VERSION = 2  # 1 had no checksums
MANIFEST = "dataset.json"
ON_DISK_BYTES = 1 << 28
"""Larger sources are sorted on disk, where nobody says otherwise: in memory they would take ten times as much."""

_MATRICES = ("train", "validation_fold_in", "validation_targets", "test_fold_in", "test_targets")
_IDS = ("item_ids", "train_user_ids", "validation_user_ids", "test_user_ids")
_ARRAYS = _IDS + tuple(f"{name}_{part}" for name in _MATRICES for part in ("indptr", "indices"))


def load_source(
    source: str | Path,
    *,
    protocol: Protocol | str | None = None,
    format: str = "auto",
    user_column: str | int | None = None,
    item_column: str | int | None = None,
    rating_column: str | int | None = None,
    delimiter: str | None = None,
    header: bool | None = None,
    show_progress: bool = False,
) -> Dataset:
    """Reads and splits raw data in memory; what `prepare` writes to disk.

    Args:
        source, format, the columns, delimiter, header, show_progress: as in `read_events`.
        protocol: a `Protocol` or the name of a preset. None takes the split that the source brings, if it brings one,
            and the preset "none" otherwise.

    Raises:
        FileNotFoundError: nothing is at `source`.
        ValueError: what the reader or the protocol refuses, or a protocol for csv files that are split already; of a
            finished split also what `Dataset.validate` refuses, such as a test user who is a training user too.
    """
    columns = Columns(user_column, item_column, rating_column, delimiter, header)
    chosen = Protocol.preset(protocol) if isinstance(protocol, str) else protocol
    found = find_source(source, format, columns)
    if found.format == "split":
        if chosen is not None:
            raise ValueError(f"{found.path.name}: brings its own split; no protocol can be applied")
        dataset = read_split(found)
        dataset.validate()  # somebody else made it
        return _with_origin(dataset, found.path.name, found.format, None)
    if found.format == "compact" and chosen is None:
        compact = Compact(found.path)
        if compact.is_split:
            dataset = compact.dataset()
            dataset.validate()
            return _with_origin(dataset, found.path.name, found.format, None)
    chosen = chosen or Protocol.preset("none")
    dataset = split_events(events_of(found, columns, show_progress), chosen)
    return _with_origin(dataset, found.path.name, found.format, chosen)


def prepare(
    source: str | Path,
    out: str | Path,
    *,
    protocol: Protocol | str | None = None,
    format: str = "auto",
    user_column: str | int | None = None,
    item_column: str | int | None = None,
    rating_column: str | int | None = None,
    delimiter: str | None = None,
    header: bool | None = None,
    show_progress: bool = True,
    overwrite: bool = False,
    on_disk: bool | None = None,
    bucket_events: int = BUCKET_EVENTS,
) -> Dataset:
    """Reads raw data, applies the protocol and writes the folder `out`, all of it or nothing.

    Args:
        out: a new or empty folder; with `overwrite` also a prepared data set.
        on_disk: sort events on the disk that `out` is on, in bounded memory (`buckets`), or in memory; the answer is
            the same. None sorts sources of ON_DISK_BYTES and more on disk, where their format is read block by block.
        bucket_events: events that are sorted at once on disk.
        the others: as in `load_source`.

    Returns:
        The written data set, opened.

    Raises:
        FileExistsError: `out` holds something that must not be replaced; found out before anything is read.
        FileNotFoundError, ValueError, ImportError: as in `load_source`; or `on_disk` is asked for, and the source is a
            matrix or split already.
    """
    out = Path(out)
    _check_replaceable(out, overwrite)
    columns = Columns(user_column, item_column, rating_column, delimiter, header)
    found = find_source(source, format, columns)
    if on_disk is None:
        on_disk = found.format in STREAMED and sum(file.size for file in found.files) >= ON_DISK_BYTES
    if on_disk:
        chosen = Protocol.preset(protocol) if isinstance(protocol, str) else protocol or Protocol.preset("none")
        _prepare_on_disk(found, columns, chosen, out, show_progress, overwrite, bucket_events)
        return open_dataset(out)
    dataset = load_source(
        source,
        protocol=protocol,
        format=format,
        user_column=user_column,
        item_column=item_column,
        rating_column=rating_column,
        delimiter=delimiter,
        header=header,
        show_progress=show_progress,
    )
    save_dataset(dataset, out, overwrite=overwrite)
    return open_dataset(out)


def _prepare_on_disk(
    found: Source,
    columns: Columns,
    protocol: Protocol,
    out: Path,
    show_progress: bool,
    overwrite: bool,
    bucket_events: int,
) -> None:
    if found.format in ("split", "scipy", "compact"):
        raise ValueError(f"{found.path.name}: of format {found.format!r}, which is read whole and not sorted on disk")
    out = out.resolve()
    with files.replacing_folder(out) as partial:
        scratch = partial.parent / "events"  # in the folder that is removed in the end, or after a kill
        scratch.mkdir()
        chunks = chunks_of(found, columns, show_progress)
        dataset = split_chunks(chunks, protocol, found.name, scratch, bucket_events=bucket_events)
        _write(_with_origin(dataset, found.path.name, found.format, protocol), partial)
        _check_replaceable(out, overwrite)  # again: somebody may have written there meanwhile


def save_dataset(dataset: Dataset, out: str | Path, *, overwrite: bool = False) -> None:
    """Writes a data set to the folder `out` through a temporary sibling and a rename.

    Raises:
        FileExistsError: as in `prepare`.
    """
    out = Path(out).resolve()
    _check_replaceable(out, overwrite)
    with files.replacing_folder(out) as partial:
        _write(dataset, partial)
        _check_replaceable(out, overwrite)  # again: somebody may have written there meanwhile


def _write(dataset: Dataset, folder: Path) -> None:
    arrays: dict[str, dict[str, Any]] = {}
    for name, array in _arrays(dataset).items():
        path = folder / f"{name}.npy"
        stored.write_npy(path, array)
        files.sync(path)
        arrays[name] = {**_kind(array), "sha256": _checksum(array)}
    manifest = {
        "format_version": FORMAT_VERSION,
        "name": dataset.name,
        "n_items": dataset.n_items,
        "report": dataset.report,
        "arrays": arrays,
    }
    manifest["sha256"] = _manifest_checksum(manifest)
    files.write_bytes(folder / MANIFEST, json.dumps(manifest, indent=2).encode())


def open_dataset(path: str | Path, *, verify: bool = False) -> Dataset:
    """Opens a prepared folder through memory maps, or a compact `.npz` directly.

    A compact file that brings train, vad_tr, vad_te, test_tr and test_te is taken as that split; of any other the union
    of all matrices is split by the preset "none".

    Args:
        verify: also compare every array with its checksum, which reads all of it.

    Raises:
        FileNotFoundError: nothing is at `path`.
        ValueError: no prepared data set, of another version, or damaged; names the file.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no such data set: {path}")
    if path.is_file():
        if not is_zip(path) or npz_format(path) != "compact":
            raise ValueError(
                f"{path.name}: expected a prepared folder or a compact .npz; raw data needs `prepare` first"
            )
        return load_source(path)
    return files.read_whole(path, lambda folder: _open_folder(folder, verify))


def _open_folder(path: Path, verify: bool) -> Dataset:
    manifest = _read_manifest(path)
    if verify and manifest["format_version"] == 1:
        log.warning("%s was prepared without checksums: there is nothing to compare it with", path)
        verify = False
    arrays = {name: _open_array(path, name, manifest, verify) for name in _ARRAYS}
    n_items = manifest["n_items"]
    if len(arrays["item_ids"]) != n_items:
        raise ValueError(f"{path / 'item_ids.npy'}: expected {n_items} ids; found {len(arrays['item_ids'])}")
    matrices = {name: _open_matrix(path, name, arrays, n_items) for name in _MATRICES}
    rows = {"train": "train", "validation_fold_in": "validation", "test_fold_in": "test"}
    rows |= {"validation_targets": "validation", "test_targets": "test"}
    for name, users in rows.items():
        expected = len(arrays[f"{users}_user_ids"])
        if matrices[name].shape[0] != expected:
            found = matrices[name].shape[0]
            raise ValueError(f"{path / f'{name}_indptr.npy'}: expected {expected} rows; found {found}")
    validation, test = (
        HeldOut(matrices[f"{part}_fold_in"], matrices[f"{part}_targets"], arrays[f"{part}_user_ids"])
        for part in ("validation", "test")
    )
    ids = arrays["item_ids"], arrays["train_user_ids"]
    return Dataset(manifest["name"], matrices["train"], validation, test, *ids, manifest["report"])


def is_prepared(path: str | Path) -> bool:
    """Whether a folder holds a prepared data set (which may still turn out damaged)."""
    try:
        _read_manifest(Path(path))
    except (OSError, ValueError):
        return False
    return True


def _with_origin(dataset: Dataset, source: str, format: str, protocol: Protocol | None) -> Dataset:
    origin = {"source": source, "format": format, "protocol": None if protocol is None else protocol.to_dict()}
    return replace(dataset, name=source.split(".", 1)[0] or source, report={**origin, **dataset.report})


def _arrays(dataset: Dataset) -> dict[str, NDArray[Any]]:
    arrays: dict[str, NDArray[Any]] = dict(dataset.ids())
    for name, matrix in dataset.matrices().items():
        if not matrix.has_sorted_indices:
            matrix = matrix.sorted_indices()
        arrays[f"{name}_indptr"] = matrix.indptr.astype(np.int64, copy=False)
        arrays[f"{name}_indices"] = matrix.indices.astype(np.int32, copy=False)
    return arrays


def _check_replaceable(out: Path, overwrite: bool) -> None:
    if not out.exists() and not out.is_symlink():
        return
    if not out.is_dir():
        raise FileExistsError(f"{out} exists and is no folder")
    names = {entry.name for entry in out.iterdir()}
    if not names:
        return
    if not is_prepared(out):
        raise FileExistsError(f"{out} is not empty and holds no prepared data set: it is left alone")
    foreign = sorted(names - {MANIFEST, *(f"{name}.npy" for name in _ARRAYS)})
    if foreign:
        raise FileExistsError(f"{out} holds a prepared data set and other files ({foreign[0]}): it is left alone")
    if not overwrite:
        raise FileExistsError(f"{out} holds a prepared data set; pass overwrite to replace it")


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if not path.is_file():
        raise ValueError(f"{folder}: no prepared data set ({MANIFEST} is missing); prepare raw data first")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        version = manifest["format_version"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path}: damaged ({error})") from error
    if version not in (1, FORMAT_VERSION) or isinstance(version, bool):
        raise ValueError(f"{path}: expected format version 1 or {FORMAT_VERSION}; found {version!r}")
    checksum = manifest.pop("sha256", None)
    if version == FORMAT_VERSION and checksum != _manifest_checksum(manifest):
        raise ValueError(f"{path}: altered, its content does not have the checksum that was written with it")
    kinds = {"name": str, "n_items": int, "report": dict, "arrays": dict}
    for key, kind in kinds.items():
        if not isinstance(manifest.get(key), kind):
            raise ValueError(f"{path}: expected {key!r} to be of type {kind.__name__}; found {manifest.get(key)!r}")
    checked: dict[str, Any] = manifest
    return checked


def _open_array(folder: Path, name: str, manifest: dict[str, Any], verify: bool) -> NDArray[Any]:
    path = folder / f"{name}.npy"
    try:
        array = stored.map_npy(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: missing, truncated or damaged ({error})") from error
    described = manifest["arrays"].get(name)
    expected = {key: described.get(key) for key in ("dtype", "shape")} if isinstance(described, dict) else described
    if (found := _kind(array)) != expected:
        raise ValueError(f"{path}: expected {expected}; found {found}")
    kinds = "iU" if name in _IDS else "i"
    if array.dtype.kind not in kinds or array.ndim != 1:
        raise ValueError(f"{path}: expected a row of integers{' or texts' if kinds == 'iU' else ''}; found {found}")
    if verify and _checksum(array) != described.get("sha256"):
        raise ValueError(f"{path}: altered, its content does not have the checksum that was written with it")
    return array


def _kind(array: NDArray[Any]) -> dict[str, Any]:
    return {"dtype": array.dtype.str, "shape": list(array.shape)}


def _checksum(array: NDArray[Any]) -> str:
    return hashlib.sha256(array.view(np.uint8).data if array.size else b"").hexdigest()


def _manifest_checksum(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _open_matrix(folder: Path, name: str, arrays: dict[str, NDArray[Any]], n_items: int) -> sp.csr_matrix:
    indptr, indices = arrays[f"{name}_indptr"], arrays[f"{name}_indices"]
    where = str(folder / f"{name}_indptr.npy")
    if len(indptr) == 0 or indptr[0] != 0 or indptr[-1] != len(indices) or (indptr[1:] < indptr[:-1]).any():
        raise ValueError(f"{where}: expected row starts ascending from 0 to {len(indices)}; found others")
    if indptr[-1] < 2**31:
        indptr = indptr.astype(np.int32)  # scipy wants one type for both, and indices must not be copied
    matrix = binary_csr(indices, indptr, n_items)
    check_matrix(matrix, n_items, str(folder / f"{name}_indices.npy"))
    return matrix
