"""Kills, full disks, folders that change under a reader: what stands at a place is whole, with nothing beside it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from cfsfl_fast import CFSFL, checkpoint, files
from cfsfl_fast.datasets import open_dataset, prepared, save_dataset, synthetic_dataset
from tests.conftest import ROOT
from tests.test_model import build


def test_a_few_kills_of_every_operation() -> None:
    """`make chaos` does many."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    arguments = [sys.executable, "-m", "tests.chaos", "--kills=1", "--steps=1", "--seed=1"]
    found = subprocess.run(arguments, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert found.returncode == 0, found.stderr + found.stdout
    rows = {line.split()[0]: line.split()[1:] for line in found.stdout.splitlines()}
    assert set(rows) >= {"prepare", "save", "recommend", "train"}
    assert int(rows["together"][0]) >= 8
    assert int(rows["together"][-1]) == 0


# Files


def test_what_a_dead_writer_left_goes_and_what_a_living_one_writes_stays(tmp_path: Path) -> None:
    path = tmp_path / "list.csv"
    left = tmp_path / ".list.csv.partial-dead"
    left.mkdir()
    (left / "list.csv").write_text("half")
    with files.replacing(path) as staged:
        staged.write_text("one")
        files.write_bytes(path, b"two")  # another, meanwhile
        assert path.read_text() == "two"
        assert staged.read_text() == "one"
        assert not left.exists()
    assert path.read_text() == "one"
    assert list(tmp_path.iterdir()) == [path]


def test_a_device_or_folder_is_not_replaced_by_a_file(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "folder", Path("/dev/null")):
        with pytest.raises(FileExistsError, match="is no regular file: it is left alone"):
            files.write_bytes(path, b"text")


def test_an_error_leaves_the_older_file_and_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "list.csv"
    files.write_bytes(path, b"older")

    def stopped() -> None:
        with files.replacing(path) as staged:
            staged.write_bytes(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert path.read_bytes() == b"older"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_is_replaced_while_it_is_read_is_read_again(tmp_path: Path) -> None:
    def write(text: str) -> None:
        with files.replacing_folder(tmp_path / "folder") as staged:
            (staged / "one").write_text(text)
            (staged / "two").write_text(text)

    meanwhile = iter(("b", "c"))

    def read(folder: Path) -> tuple[str, str]:
        one = (folder / "one").read_text()
        if text := next(meanwhile, ""):
            write(text)
        return one, (folder / "two").read_text()

    write("a")
    assert files.read_whole(tmp_path / "folder", read) == ("c", "c")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        files.read_whole(tmp_path / "nowhere", read)


@pytest.mark.parametrize(
    ("kind", "module", "name"),
    [
        ("model", checkpoint, "read_json"),
        ("model", checkpoint, "_read_tensors"),
        ("model", checkpoint, "safe_open"),
        ("model", checkpoint, "_file_digest"),
        ("model", np, "load"),
        ("data", prepared, "_read_manifest"),
        ("data", prepared, "_open_array"),
        ("data", prepared, "_open_matrix"),
    ],
)
def test_a_reader_never_mixes_two_versions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, module: object, name: str
) -> None:
    """A writer replaces the folder right before the reader opens any one of its files."""
    place = tmp_path / "place"
    data = [synthetic_dataset(60, 30, events_per_user=8, seed=seed) for seed in (0, 1)]
    models = [build(seed=seed) for seed in (0, 1)]
    for version, model in enumerate(models):
        model.item_ids = np.arange(model.n_items) + version

    def write(version: int) -> None:
        if kind == "model":
            models[version].save_pretrained(place)
        else:
            save_dataset(data[version], place, overwrite=True)

    def read() -> set[int]:
        """The version of every part."""
        if kind == "model":
            model = CFSFL.from_pretrained(place)
            assert model.item_ids is not None
            return {int(torch.equal(model.lookup.weight, models[1].lookup.weight)), int(model.item_ids[0])}
        found = open_dataset(place).matrices()
        theirs = data[1].matrices()
        return {int(np.array_equal(matrix.indices, theirs[part].indices)) for part, matrix in found.items()}

    real, calls = getattr(module, name), 0

    def disturbed(*arguments: object, **more: object) -> object:
        nonlocal calls
        calls += 1
        if calls == at:
            with monkeypatch.context() as undisturbed:
                undisturbed.setattr(module, name, real)
                write(1)
        return real(*arguments, **more)

    monkeypatch.setattr(module, name, disturbed)
    for at in range(1, 30):
        calls = at  # nobody is disturbed
        write(0)
        calls = 0
        found = read()
        if calls < at:
            break
        assert found == {1}
    assert found == {0}
    assert at > 1
