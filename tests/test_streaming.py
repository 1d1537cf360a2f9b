"""Data that memory does not hold: sorted on disk to the same bytes, in bounded memory, and trained on as they lie."""

from __future__ import annotations

import filecmp
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from cfsfl_fast.cli import main
from cfsfl_fast.datasets import (
    Dataset,
    Protocol,
    buckets,
    open_dataset,
    prepare,
    prepared,
    spilled,
    split_events,
    write_columns,
)
from cfsfl_fast.datasets.columns import column_chunks
from cfsfl_fast.datasets.dataset import item_counts
from cfsfl_fast.datasets.events import collect
from cfsfl_fast.datasets.table import Chunk
from cfsfl_fast.interactions import as_interactions
from tests.conftest import effort
from tests.processes import PATIENCE, environment
from tests.test_prepared import assert_equal
from tests.test_training import command

PROTOCOLS = [
    Protocol(held_out=2),
    Protocol(min_rating=2, min_item_users=2, min_user_items=2, held_out=1),
    Protocol(min_rating=1, held_out=2, min_fold_in_items=2),
    Protocol(min_item_users=3, held_out=1, target_share=0.5),
]


@st.composite
def some_chunks(draw: Any) -> list[Chunk]:
    """Events in chunks; identifiers of some are integers, close together or far apart, of others texts."""
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    spread = draw(st.sampled_from([1, 10**12]))
    n_users, n_items = draw(st.integers(1, 30)), draw(st.integers(1, 30))
    chunks = []
    for _ in range(draw(st.integers(0, 5))):
        n = draw(st.integers(0, 60))
        columns = [random.integers(-1, n_ids, n) * spread for n_ids in (n_users, n_items)]
        columns = [np.char.encode(ids.astype(str)) if draw(st.booleans()) else ids for ids in columns]
        chunks.append(Chunk(*columns, random.integers(0, 5, n).astype(np.float64)))
    return chunks


@settings(max_examples=effort(), deadline=None)
@given(chunks=some_chunks(), protocol=st.sampled_from(PROTOCOLS), bucket_events=st.sampled_from([1, 20, 1000]))
def test_sorted_on_disk_as_in_memory(
    chunks: list[Chunk], protocol: Protocol, bucket_events: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    scratch = tmp_path_factory.mktemp("scratch")
    with pytest.MonkeyPatch.context() as patch:
        for module in (spilled, buckets):
            patch.setattr(module, "BLOCK", 7)
        patch.setattr(spilled, "_MOST_PENDING", 5)
        try:
            expected: Dataset | str = split_events(collect(chunks, "made up"), protocol)
        except ValueError as error:
            expected = str(error)
        try:
            found: Dataset | str = buckets.split_chunks(
                chunks, protocol, "made up", scratch, bucket_events=bucket_events
            )
        except ValueError as error:
            found = str(error)
    if isinstance(expected, str) or isinstance(found, str):
        assert found == expected
        return
    found.validate()
    assert_equal(found, expected)
    assert list(found.report) == list(expected.report)
    assert [path.name for path in scratch.iterdir() if path.stat().st_size] in ([], ["train"]), "disk that nobody frees"


def written(folder: Path, n_events: int, n_users: int, n_items: int) -> Path:
    """Random events as arrays."""
    random = np.random.default_rng(0)
    write_columns(folder, [(random.integers(0, n_users, n_events), random.integers(0, n_items, n_events))])
    return folder


@pytest.mark.parametrize("kind", ["arrays", "csv"])
def test_the_folder_is_the_same_byte_for_byte(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = written(tmp_path / "raw", 5000, 200, 60)
    if kind == "csv":
        pairs = zip(*(np.load(source / f"{name}.npy").tolist() for name in ("users", "items")), strict=True)
        source = tmp_path / "events.csv"
        source.write_text("user,item\n" + "".join(f"u{u},{i}\n" for u, i in pairs))
    prepare(source, tmp_path / "memory", show_progress=False)
    monkeypatch.setattr(prepared, "ON_DISK_BYTES", 1)  # so that nobody has to ask
    prepare(source, tmp_path / "disk", show_progress=False, bucket_events=300)
    names = sorted(path.name for path in (tmp_path / "memory").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "disk").iterdir())
    same, *others = filecmp.cmpfiles(tmp_path / "memory", tmp_path / "disk", names, shallow=False)
    assert (sorted(same), others) == (names, [[], []])
    assert sorted(path.name for path in tmp_path.iterdir() if path != source) == ["disk", "memory"] + ["raw"] * (
        kind == "csv"
    )


def test_a_large_source_is_sorted_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, used = written(tmp_path / "raw", 1000, 50, 20), []
    split = prepared.split_chunks
    monkeypatch.setattr(prepared, "split_chunks", lambda *a, **k: used.append(1) or split(*a, **k))
    prepare(source, tmp_path / "small", show_progress=False)
    assert not used
    monkeypatch.setattr(prepared, "ON_DISK_BYTES", 8000)
    prepare(source, tmp_path / "large", show_progress=False)
    assert used
    prepare(source, tmp_path / "asked", show_progress=False, on_disk=False)
    assert len(used) == 1


def test_what_is_no_list_of_events_is_not_sorted(tmp_path: Path) -> None:
    sp.save_npz(tmp_path / "matrix.npz", sp.eye(40, format="csr"))
    with pytest.raises(ValueError, match=r"matrix.npz: of format 'scipy', which is read whole"):
        prepare(tmp_path / "matrix.npz", tmp_path / "out", on_disk=True)
    assert not (tmp_path / "out").exists()


def test_events_are_made_as_arrays_and_prepared(tmp_path: Path) -> None:
    sizes = ["--users=300", "--items=80", "--events-per-user=12"]
    made = CliRunner().invoke(main, ["generate", *sizes, "--raw", f"--out={tmp_path / 'raw'}"])
    assert made.exit_code == 0, made.output
    assert "events of 300 users and 80 items" in made.output
    for how in ("--on-disk", "--in-memory"):
        done = CliRunner().invoke(main, ["prepare", str(tmp_path / "raw"), f"--out={tmp_path / how}", how])
        assert done.exit_code == 0, done.output
    CliRunner().invoke(main, ["generate", *sizes, f"--out={tmp_path / 'whole'}"])
    names = ("--on-disk", "--in-memory", "whole")
    disk, memory, whole = (open_dataset(tmp_path / name).train for name in names)
    assert np.array_equal(disk.indices, memory.indices)
    assert (disk.shape, disk.nnz) == (whole.shape, whole.nnz)
    again = CliRunner().invoke(main, ["generate", *sizes, "--raw", f"--out={tmp_path / '--on-disk'}", "--overwrite"])
    assert again.exit_code == 2
    assert "is left alone" in again.output


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("users", np.arange(3.0), "users.npy: expected a row of integers or texts; found float64"),
        ("users", np.arange(4).reshape(2, 2), r"expected a row of integers or texts; found int64 of shape \[2, 2\]"),
        ("users", np.array([1, 2**63], np.uint64), "users.npy: expected integers below 2"),
        ("items", np.array(["a", "", "b"]), "items.npy, row 1: expected 1 to 512 bytes of text; found ''"),
        ("items", np.array(["a", "b" * 513]), "items.npy: expected texts of at most 512 bytes; found <U513"),
        ("items", np.array(["a", "\u20ac" * 200]), "items.npy, row 1: expected 1 to 512 bytes of text; found '\u20ac"),
        ("items", np.array(["a", "x\0y"]), r"items.npy, row 1: expected 1 to 512 bytes of text; found 'x\\x00y'"),
        ("items", np.array(["a", "\ud800"]), "items.npy: expected texts"),
        ("items", np.arange(5), r"expected arrays of one length; found \[2, 5\]"),
        ("ratings", np.array([1.0, np.nan]), "ratings.npy, row 1: expected a finite rating; found nan"),
        ("ratings", np.array(["1", "2"]), "ratings.npy: expected a row of numbers; found <U1"),
    ],
)
def test_arrays_that_hold_no_events_are_refused(name: str, array: Any, message: str, tmp_path: Path) -> None:
    n = 2 if "one length" in message else len(array)
    for column in ("users", "items"):
        np.save(tmp_path / f"{column}.npy", np.arange(n))
    np.save(tmp_path / f"{name}.npy", array)
    with pytest.raises(ValueError, match=message):
        list(column_chunks(tmp_path))


def test_rows_as_stored_are_the_rows(tmp_path: Path) -> None:
    data = prepare(written(tmp_path / "raw", 4000, 100, 50), tmp_path / "data", show_progress=False)
    stored, copied = (as_interactions(data.train, 50, as_stored=kept) for kept in (True, False))
    assert stored.items.dtype == torch.int32
    assert stored.items.data_ptr() == data.train.indices.ctypes.data, "a copy"
    users = torch.tensor([5, 0, 5, 70])
    for capacity in (None, 1000):
        mine, theirs = (rows.take(users, capacity) for rows in (stored, copied))
        assert mine.items.dtype == torch.int64
        assert torch.equal(mine.items, theirs.items)
        assert torch.equal(mine.offsets, theirs.offsets)
    assert np.array_equal(item_counts(data.train), np.bincount(data.train.indices, minlength=50))
    ragged = sp.csr_matrix((np.ones(4), [3, 1, 1, 0], [0, 3, 4]), (2, 50))
    repaired = as_interactions(ragged, 50, as_stored=True)
    assert (repaired.items.tolist(), repaired.offsets.tolist()) == ([1, 3, 0], [0, 2, 3])


BOUNDED = """
import resource, sys
from pathlib import Path
from cfsfl_fast import interactions
from cfsfl_fast.cli import main
from cfsfl_fast.datasets import Protocol, buckets, open_dataset, prepare, spilled
protocol = Protocol(held_out=200)  # their events are in memory
work, room = Path(sys.argv[1]), 1_000_000 * int(sys.argv[3])

def limited(*acts):
    used = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmData"))
    resource.setrlimit(resource.RLIMIT_DATA, (1024 * int(used.split()[1]) + room,) * 2)
    for act in acts:
        try:
            act()
            print("done")
        except SystemExit as end:
            print(f"ended with {end.code}")
        except MemoryError:
            print("lacks memory")

def prepared(how):
    return lambda: prepare(work / "raw", work / how, protocol=protocol, on_disk=how == "disk", bucket_events=200_000)

if sys.argv[2] == "prepare":
    spilled.BLOCK = buckets.BLOCK = 1 << 16
    limited(prepared("memory"), prepared("disk"))
else:
    data = open_dataset(work / "disk")
    asked = lambda source, out: ["train", source, f"--out={work / out}", *sys.argv[5:]]
    train = lambda source, out: sys.exit(main(asked(source, out), standalone_mode=False))
    try:
        train(sys.argv[4], "small")  # whatever training takes that has nothing to do with the data
    except SystemExit:
        pass
    copy = lambda: interactions.as_interactions(data.train, data.n_items)
    limited(copy, lambda: train(str(work / "disk"), "run"))
"""
"""Does two things where a process may take `room` MB more, mapped files aside."""


def bounded(work: Path, what: str, room: int, *more: str) -> list[str]:
    asked = [sys.executable, "-c", BOUNDED, str(work), what, str(room), *more]
    whole = {f"MALLOC_{name}_THRESHOLD_": "65536" for name in ("MMAP", "TRIM")}  # what is free is given back
    done = subprocess.run(asked, env=environment(**whole), capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    return [line for line in done.stdout.splitlines() if line.startswith(("done", "ended", "lacks"))]


@pytest.mark.skipif(sys.platform != "linux", reason="the limit counts a process's own pages on Linux alone")
def test_memory_stays_bounded(toy_folder: Path, tmp_path: Path) -> None:
    written(tmp_path / "raw", 6_000_000, 20_000, 500)
    # In memory: codes, pairs and their sort, 24 bytes an event at least; sorted: 75 bytes of 200,000, and blocks.
    assert bounded(tmp_path, "prepare", 48) == ["lacks memory", "done"]
    # A copy of the events as rows of int64 takes 35 MB.
    options = [*command(toy_folder, tmp_path / "run")[6:], "--epochs=1,0,0", "--batch-size=100"]
    assert bounded(tmp_path, "train", 28, str(toy_folder), *options) == ["lacks memory", "ended with None"]
