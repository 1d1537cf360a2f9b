"""Prepared data on disk: what is written comes back, writing is all or nothing, and damage is named."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp

from cfsfl_fast.datasets import (
    Dataset,
    HeldOut,
    Protocol,
    is_prepared,
    load_source,
    open_dataset,
    prepare,
    prepared,
    save_dataset,
    synthetic_dataset,
)
from cfsfl_fast.datasets.dataset import pairs_to_csr

DATA = Path(os.environ.get("CFSFL_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))


def real(name: str) -> Any:
    return pytest.mark.skipif(not (DATA / name).is_file(), reason=f"{name} not found; set CFSFL_DATA to its folder")


def assert_equal(a: Dataset, b: Dataset) -> None:
    assert a.name == b.name
    assert a.report == b.report
    for x, y in zip(a.ids().values(), b.ids().values(), strict=True):
        assert x.dtype == y.dtype
        assert x.tolist() == y.tolist()
    for x, y in zip(a.matrices().values(), b.matrices().values(), strict=True):
        assert x.shape == y.shape
        assert x.dtype == y.dtype == np.float32
        assert np.array_equal(x.indptr, y.indptr)
        assert np.array_equal(x.indices, y.indices)
        assert np.array_equal(x.data, y.data)


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    return synthetic_dataset(300, 120, events_per_user=15, protocol=Protocol(min_user_items=5, held_out=30))


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    random = np.random.default_rng(0)
    rows = sorted({(f"u{u}", int(i)) for u, i in random.integers(0, 60, (1500, 2))})
    path = tmp_path / "events.csv"
    path.write_text("user,item,rating\n" + "".join(f"{u},{i},{(i % 5) + 0.5}\n" for u, i in rows))
    return path


def test_what_is_saved_is_opened(dataset: Dataset, tmp_path: Path) -> None:
    save_dataset(dataset, tmp_path / "out")
    opened = open_dataset(tmp_path / "out")
    opened.validate()
    assert_equal(opened, dataset)


def test_prepare_reads_splits_writes_and_opens(raw: Path, tmp_path: Path) -> None:
    protocol = Protocol(min_rating=1, min_user_items=5, held_out=6)
    prepared = prepare(raw, tmp_path / "deep" / "out", protocol=protocol)
    prepared.validate()
    assert_equal(prepared, load_source(raw, protocol=protocol))
    assert_equal(prepared, open_dataset(str(tmp_path / "deep" / "out")))
    assert prepared.user_ids.dtype.kind == "U"
    assert prepared.name == "events"
    assert prepared.report["source"] == "events.csv"
    assert prepared.report["protocol"]["held_out"] == 6


def test_presets_go_by_name(raw: Path, tmp_path: Path) -> None:
    assert_equal(prepare(raw, tmp_path / "a", protocol="none"), prepare(raw, tmp_path / "b"))


def test_indices_are_mapped_and_never_copied(dataset: Dataset, tmp_path: Path) -> None:
    save_dataset(dataset, tmp_path / "out")
    indices = open_dataset(tmp_path / "out").train.indices
    while indices.base is not None and not isinstance(indices, np.memmap):
        indices = indices.base
    assert isinstance(indices, np.memmap)
    assert indices.dtype == np.int32


def test_the_shared_ones_cannot_be_changed(dataset: Dataset, tmp_path: Path) -> None:
    save_dataset(dataset, tmp_path / "out")
    opened = open_dataset(tmp_path / "out")
    with pytest.raises(ValueError, match="read-only"):
        opened.train.data[0] = 2


def test_arrays_on_disk_are_plain_and_as_documented(dataset: Dataset, tmp_path: Path) -> None:
    save_dataset(dataset, tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert manifest["format_version"] == 2
    names = {path.stem for path in (tmp_path / "out").glob("*.npy")}
    assert names == set(manifest["arrays"])
    for name in names:
        array = np.load(tmp_path / "out" / f"{name}.npy", allow_pickle=False)
        checksum = hashlib.sha256(array.tobytes()).hexdigest()
        assert manifest["arrays"][name] == {
            "dtype": array.dtype.str, "shape": list(array.shape), "sha256": checksum
        }  # fmt: skip
        if name.endswith("_indptr"):
            assert array.dtype == np.int64
        if name.endswith("_indices"):
            assert array.dtype == np.int32


def test_polars_is_imported_only_when_needed() -> None:
    code = "import sys, cfsfl_fast.datasets.prepared as p; print([m for m in ('polars', 'pandas') if m in sys.modules])"
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_existing_things_are_left_alone(dataset: Dataset, raw: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    with pytest.raises(FileExistsError, match="exists and is no folder"):
        save_dataset(dataset, tmp_path / "file", overwrite=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    for source in (raw, tmp_path / "missing.csv"):  # refused before anything is read
        with pytest.raises(FileExistsError, match="no prepared data set: it is left alone"):
            prepare(source, tmp_path / "mine", overwrite=True)
    save_dataset(dataset, tmp_path / "out")
    with pytest.raises(FileExistsError, match="pass overwrite to replace it"):
        save_dataset(dataset, tmp_path / "out")
    (tmp_path / "out" / "notes.txt").write_text("precious")
    with pytest.raises(FileExistsError, match=r"other files \(notes\.txt\)"):
        save_dataset(dataset, tmp_path / "out", overwrite=True)
    assert (tmp_path / "file").read_text() == (tmp_path / "out" / "notes.txt").read_text() == "precious"
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "precious"


def test_overwrite_replaces_the_whole_and_leaves_nothing_behind(dataset: Dataset, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()  # empty: no need for overwrite
    save_dataset(dataset, tmp_path / "out")
    other = synthetic_dataset(200, 100, events_per_user=10, seed=9)
    save_dataset(other, tmp_path / "out", overwrite=True)
    assert_equal(open_dataset(tmp_path / "out"), other)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_failed_write_changes_nothing(dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_dataset(dataset, tmp_path / "out")
    written: list[int] = []

    def full_disk(descriptor: int) -> None:
        written.append(descriptor)
        if len(written) == 5:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_dataset(synthetic_dataset(200, 100, events_per_user=10), tmp_path / "out", overwrite=True)
    monkeypatch.undo()
    assert_equal(open_dataset(tmp_path / "out"), dataset)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_failed_read_leaves_no_folder(tmp_path: Path) -> None:
    (tmp_path / "bad.csv").write_text("user,item\n1,2\n1\n")
    with pytest.raises(ValueError, match=r"bad\.csv, line 3"):
        prepare(tmp_path / "bad.csv", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["bad.csv"]


ARRAYS = (
    "item_ids",
    "train_user_ids",
    "validation_user_ids",
    "test_user_ids",
    "train_indptr",
    "train_indices",
    "validation_fold_in_indptr",
    "validation_fold_in_indices",
    "validation_targets_indptr",
    "validation_targets_indices",
    "test_fold_in_indptr",
    "test_fold_in_indices",
    "test_targets_indptr",
    "test_targets_indices",
)


@pytest.mark.parametrize("name", ARRAYS)
def test_missing_truncated_longer_or_other_arrays_are_named(dataset: Dataset, tmp_path: Path, name: str) -> None:
    save_dataset(dataset, tmp_path / "out")
    path = tmp_path / "out" / f"{name}.npy"
    content = path.read_bytes()
    array = np.load(path)
    for damaged in (content[:-1], content[:100], b"", content + b"\0", b"\x93NUMPY\x07" + content[7:], b"{}" * 500):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"{name}\.npy: missing, truncated or damaged"):
            open_dataset(tmp_path / "out")
    for other in (array.astype(np.float32), array[:-1], array.reshape(1, -1)):
        np.save(path, other)
        with pytest.raises(ValueError, match=rf"{name}\.npy: expected .* found"):
            open_dataset(tmp_path / "out")
    path.unlink()
    with pytest.raises(ValueError, match=rf"{name}\.npy: missing, truncated or damaged"):
        open_dataset(tmp_path / "out")


@pytest.mark.parametrize(
    "matrix", ["train", "validation_fold_in", "validation_targets", "test_fold_in", "test_targets"]
)
@pytest.mark.parametrize(
    ("part", "place", "value"),
    [("indptr", 0, 1), ("indptr", 1, 10**9), ("indptr", -1, 3), ("indices", 4, -1), ("indices", 0, 10**6)],
)
def test_rows_that_point_outside_are_named(
    dataset: Dataset, tmp_path: Path, matrix: str, part: str, place: int, value: int
) -> None:
    save_dataset(dataset, tmp_path / "out")
    path = tmp_path / "out" / f"{matrix}_{part}.npy"
    array = np.load(path)
    array[place] = value
    np.save(path, array)
    with pytest.raises(ValueError, match=rf"{matrix}_{part}\.npy: expected"):
        open_dataset(tmp_path / "out")


def test_rows_that_are_not_ascending_are_found_by_validate(dataset: Dataset, tmp_path: Path) -> None:
    save_dataset(dataset, tmp_path / "out")
    path = tmp_path / "out" / "train_indices.npy"
    array = np.load(path)
    row = 7
    first = int(dataset.train.indptr[row])
    array[first + 1] = array[first]
    np.save(path, array)
    opened = open_dataset(tmp_path / "out")
    with pytest.raises(ValueError, match=f"train: row {row} is not ascending or names an item twice"):
        opened.validate()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 3}, "expected format version 1 or 2; found 3"),
        ({"name": "other", "sha256": "of another"}, "altered, its content does not have the checksum"),
        ({"n_items": "many"}, "expected 'n_items' to be of type int"),
        ({"n_items": 5}, "expected"),
        ({"arrays": {}}, r"item_ids\.npy: expected None; found"),
        ({"name": None}, "expected 'name' to be of type str"),
    ],
)
def test_damaged_manifest(dataset: Dataset, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    save_dataset(dataset, tmp_path / "out")
    path = tmp_path / "out" / "dataset.json"
    manifest = json.loads(path.read_text()) | change
    if "sha256" not in change:
        del manifest["sha256"]
        manifest["sha256"] = prepared._manifest_checksum(manifest)
    path.write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=message):
        open_dataset(tmp_path / "out")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "null", '{"a":' * 100_000])
def test_manifest_that_is_no_manifest(dataset: Dataset, tmp_path: Path, text: str) -> None:
    save_dataset(dataset, tmp_path / "out")
    (tmp_path / "out" / "dataset.json").write_text(text)
    with pytest.raises(ValueError, match=r"dataset\.json: damaged"):
        open_dataset(tmp_path / "out")
    assert not is_prepared(tmp_path / "out")


def test_a_folder_without_checksums_still_opens(
    dataset: Dataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_dataset(dataset, tmp_path / "out")
    path = tmp_path / "out" / "dataset.json"
    manifest = json.loads(path.read_text())
    del manifest["sha256"]
    arrays = {name: {k: v for k, v in of.items() if k != "sha256"} for name, of in manifest["arrays"].items()}
    path.write_text(json.dumps({**manifest, "format_version": 1, "arrays": arrays}))
    assert_equal(open_dataset(tmp_path / "out", verify=True), dataset)
    assert "without checksums" in caplog.text


def test_places_without_a_prepared_data_set(raw: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such data set"):
        open_dataset(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"dataset\.json is missing"):
        open_dataset(tmp_path)
    with pytest.raises(ValueError, match=r"events\.csv: expected a prepared folder or a compact \.npz"):
        open_dataset(raw)


def test_a_user_in_two_parts_is_found(dataset: Dataset) -> None:
    user_ids = dataset.test.user_ids.copy()
    user_ids[3] = dataset.user_ids[0]
    test = HeldOut(dataset.test.fold_in, dataset.test.targets, user_ids)
    both = Dataset("both", dataset.train, dataset.validation, test, dataset.item_ids, dataset.user_ids)
    with pytest.raises(ValueError, match="both: a user is in more than one part"):
        both.validate()


def test_describe_counts_what_is_there() -> None:
    train = pairs_to_csr(np.array([0, 0, 1, 1, 1]), np.array([0, 1, 0, 2, 3]), (2, 10))
    group = HeldOut(
        pairs_to_csr(np.array([0]), np.array([1]), (1, 10)), pairs_to_csr([0, 0], [2, 3], (1, 10)), np.array([7])
    )
    toy = Dataset("toy", train, group, group, np.arange(10), np.arange(2), {"test": {"skipped": 3}})
    lines = toy.describe().splitlines()
    assert lines[0] == "toy: 2 training users x 10 items, 5 events, density 25.000%"
    cells = {" ".join(line.split()[:3]): line.split() for line in lines}
    assert cells["items per user"][3:] == ["2", "2", "2", "3", "3", "3", "3", "2.5"]
    assert cells["users per item"][3] == "0"
    assert lines[6] == "share of events  most popular 1 % of the items  40.0%, 10 %  40.0%"
    assert lines[9].split() == ["validation", "1", "0", "1", "2", "2.0"]
    assert lines[10].split() == ["test", "1", "3", "1", "2", "2.0"]


def compact(path: Path, matrices: dict[str, sp.csr_matrix], first_users: dict[str, int], n_users: int) -> None:
    arrays: dict[str, Any] = {"n_users": n_users, "n_items": next(iter(matrices.values())).shape[1]}
    for name, matrix in matrices.items():
        rows = [matrix.indices[a:b] for a, b in zip(matrix.indptr, matrix.indptr[1:], strict=False)]
        arrays[f"{name}_counts"] = np.diff(matrix.indptr)
        arrays[f"{name}_deltas"] = np.concatenate([np.diff(row, prepend=0) for row in rows])
        arrays[f"{name}_first_user"] = first_users[name]
    np.savez(path, **arrays)


def test_compact_file_with_a_split_is_that_split(dataset: Dataset, tmp_path: Path) -> None:
    a, b = dataset.n_users, dataset.n_users + len(dataset.validation.user_ids)
    names = {"train": 0, "vad_tr": a, "vad_te": a, "test_tr": b, "test_te": b}
    matrices = dict(zip(names, dataset.matrices().values(), strict=True))
    compact(tmp_path / "c.npz", matrices, names, b + len(dataset.test.user_ids))
    opened = open_dataset(tmp_path / "c.npz")
    opened.validate()
    for x, y in zip(opened.matrices().values(), dataset.matrices().values(), strict=True):
        assert (x != y).nnz == 0
    assert opened.test.user_ids.tolist() == list(range(b, b + len(dataset.test.user_ids)))
    assert_equal(prepare(tmp_path / "c.npz", tmp_path / "out"), opened)
    again = load_source(
        tmp_path / "c.npz", protocol=Protocol(held_out=10)
    )  # an explicit protocol splits the union anew
    total = sum(matrix.nnz for matrix in matrices.values())
    assert again.report["events_read"] == total
    assert len(again.test.user_ids) == 10


def test_compact_file_without_a_split_is_split_by_users(dataset: Dataset, tmp_path: Path) -> None:
    compact(tmp_path / "c.npz", {"all": dataset.train}, {"all": 0}, dataset.n_users)
    opened = open_dataset(tmp_path / "c.npz")
    opened.validate()
    assert opened.report["protocol"] == Protocol.preset("none").to_dict()
    assert opened.report["events_read"] == dataset.train.nnz
    assert opened.report["test"]["held_out"] == dataset.n_users // 10


@real("ml-1m.npz")
@real("ml-1m_pro_sg.tar.xz")
def test_movielens_1m_is_the_same_from_both_files() -> None:
    one, two = open_dataset(DATA / "ml-1m.npz"), load_source(DATA / "ml-1m_pro_sg.tar.xz")
    assert (one.n_users, one.n_items, one.train.nnz) == (4834, 3497, 462_827)
    assert one.item_ids.tolist() == two.item_ids.tolist()
    for x, y in zip(one.matrices().values(), two.matrices().values(), strict=True):
        assert (x != y).nnz == 0
    one.validate()


@real("online-retail.npz")
def test_online_retail_keeps_its_stock_codes(tmp_path: Path) -> None:
    opened = open_dataset(DATA / "online-retail.npz")
    opened.validate()
    assert opened.report["events_read"] == 266_802
    assert opened.item_ids.dtype.kind == "U"
    save_dataset(opened, tmp_path / "out")
    assert_equal(open_dataset(tmp_path / "out"), opened)
