"""Kills, full disks, folders that change under a reader: what stands at a place is whole, with nothing beside it."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import torch
from click.testing import CliRunner

from cfsfl_fast import CFSFL, CFSFLConfig, arrays, checkpoint, files, ops, resharding, stages, training, updates
from cfsfl_fast.cli import main
from cfsfl_fast.datasets import Dataset, open_dataset, prepared, save_dataset, synthetic_dataset
from cfsfl_fast.distributed import ALONE, Mesh
from cfsfl_fast.evaluation import evaluate
from cfsfl_fast.model import ITEM_TABLES
from cfsfl_fast.runs import Run
from cfsfl_fast.scarcity import OutOfMemoryError
from cfsfl_fast.sharded import Shard
from tests.chaos import TRAINING as OPTIONS
from tests.chaos import digests
from tests.conftest import ROOT
from tests.processes import PATIENCE, started
from tests.test_distributed import Nth
from tests.test_model import build, histories
from tests.test_training import QUICK, command

TRAINING = [f"--{name.replace('_', '-')}={value}" for name, value in OPTIONS.items()]


def test_a_few_kills_of_every_operation() -> None:
    """`make chaos` does many."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    names = {"prepare", "save", "recommend", "train", "train-parts"}
    arguments = [sys.executable, "-m", "tests.chaos", "--kills=1", "--steps=1", "--seed=1"]
    arguments += [f"--only={name}" for name in sorted(names)]
    found = subprocess.run(arguments, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=480)
    assert found.returncode == 0, found.stderr + found.stdout
    rows = {line.split()[0]: line.split()[1:] for line in found.stdout.splitlines()}
    assert set(rows) >= names
    assert int(rows["together"][0]) >= 10
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
        ("model", safetensors, "safe_open"),
        ("model", checkpoint, "_file_digest"),
        ("model", arrays, "map_npy"),
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

    *disturbed, undisturbed = read_disturbed(monkeypatch, module, name, write, read)
    assert all(found == {1} for found in disturbed)
    assert undisturbed == {0}
    assert disturbed


def read_disturbed(
    monkeypatch: pytest.MonkeyPatch,
    module: object,
    name: str,
    write: Callable[[int], None],
    read: Callable[[], set[int]],
) -> list[set[int]]:
    """What a reader of version 0 finds where version 1 is written before its first call of a function, before its
    second ... and at last not at all.
    """
    real, found = getattr(module, name), []
    calls = at = 0

    def disturbed(*arguments: object, **more: object) -> object:
        nonlocal calls
        calls += 1
        if calls == at:
            with monkeypatch.context() as undisturbed:
                undisturbed.setattr(module, name, real)
                write(1)
        return real(*arguments, **more)

    monkeypatch.setattr(module, name, disturbed)
    while calls >= at:
        calls, at = at + 1, at + 1  # nobody disturbs what writes
        write(0)
        calls = 0
        found.append(read())
    return found


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (checkpoint, "read_json"),
        (checkpoint, "verified"),
        (checkpoint, "opened"),
        (checkpoint, "_compare"),
        (checkpoint, "_file_digest"),
        (arrays, "map_npy"),
    ],
)
def test_a_part_of_a_model_is_never_of_two_versions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: object, name: str
) -> None:
    """Refused, where not everything is of one version."""
    place = tmp_path / "place"
    models = [build(seed=seed, steps=1 + seed) for seed in (0, 1)]
    for version, model in enumerate(models):
        model.item_ids = np.arange(model.n_items) + version

    def read() -> set[int]:
        try:
            part = CFSFL.part_from_pretrained(place, Mesh(items=Nth(1, 2)))
        except ValueError as error:
            return set() if re.search("was replaced while it was read|does not belong to", str(error)) else {-1}
        assert part.item_ids is not None
        rows = models[1].lookup.weight[slice(*Nth(1, 2).span(part.n_items))]
        return {int(torch.equal(part.lookup.weight, rows)), int(part.item_ids[0]), part.config.steps - 1}

    *disturbed, undisturbed = read_disturbed(
        monkeypatch, module, name, lambda version: models[version].save_pretrained(place), read
    )
    assert all(found in ({1}, set()) for found in disturbed)
    assert undisturbed == {0}
    assert disturbed


@pytest.mark.parametrize("name", ["verified", "opened", "_compare"])
def test_a_part_of_a_file_and_its_text_are_of_one_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """As a run's weights and its progress."""
    path = tmp_path / "training.safetensors"

    def write(version: int) -> None:
        checkpoint.write_tensors(path, {"lookup.weight": torch.full((5, 2), version)}, {"progress": str(version)})

    def read() -> set[int]:
        tensors, metadata = resharding.read_tensors(path, Shard(Nth(1, 2), 5), ALONE, ITEM_TABLES)
        return {int(metadata["progress"]), *tensors["lookup.weight"].flatten().tolist()}

    *disturbed, undisturbed = read_disturbed(monkeypatch, checkpoint, name, write, read)
    assert all(found == {1} for found in disturbed)
    assert undisturbed == {0}
    assert disturbed


# Disks


def limited(arguments: list[object], folder: Path, most_bytes: int) -> subprocess.CompletedProcess[str]:
    """A command in a process that may not write a file beyond so many bytes: as a full disk, for which nobody needs to
    be root.
    """

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, most_bytes))

    return subprocess.run(
        [sys.executable, "-m", "cfsfl_fast", *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        cwd=folder,
        capture_output=True,
        text=True,
        preexec_fn=limit,
        timeout=240,
    )


def test_a_full_disk_is_one_line_and_leaves_what_was_there(toy_folder: Path, tmp_path: Path) -> None:
    """Prepare, train and recommend on a disk too small for what they write, then on one that is not."""
    rows = "".join(f"{u},{i}\n" for u in range(300) for i in range(u % 7, 40, 7))
    (tmp_path / "raw.csv").write_text("user,item\n" + rows)
    prepare = ["prepare", "raw.csv", "--out", "data", "--overwrite"]
    train = ["train", toy_folder, "--out", "run", "--resume", "--device", "cpu", *TRAINING]
    recommend = ["recommend", "run", "--history", "raw.csv", "--out", "lists.csv", "--device", "cpu"]
    for arguments, place, too_few, enough in (
        (prepare, "data", 2_000, 100_000),
        (train, "run", 240_000, 1_000_000),  # the model fits, what training goes on from does not
        (recommend, "lists.csv", 5_000, 1_000_000),
    ):
        for attempt in range(2):
            before = digests(tmp_path)
            found = limited(arguments, tmp_path, too_few)
            assert found.returncode == 2, found.stdout + found.stderr
            assert os.strerror(errno.EFBIG) in found.stderr
            assert place in found.stderr
            assert len(found.stderr.strip().splitlines()) == 1
            if place == "run":
                assert "training.safetensors" in found.stderr
                CFSFL.from_pretrained(tmp_path / "run" / "stages" / "recommender")
            else:
                assert digests(tmp_path) == before
            if attempt == 0:
                done = limited(arguments, tmp_path, enough)
                assert done.returncode == 0, done.stderr
            if place == "run":
                break
    whole = limited([*train[:3], "whole", *train[4:]], tmp_path, 1_000_000)
    assert whole.returncode == 0, whole.stderr
    assert digests(tmp_path / "run") == digests(tmp_path / "whole")
    assert not list(tmp_path.rglob("*.partial-*"))


@pytest.mark.parametrize("most_bytes", [1_000, 9_000, 30_000])
def test_a_disk_that_fills_while_events_are_sorted_on_it(most_bytes: int, tmp_path: Path) -> None:
    rows = "".join(f"{u},{i}\n" for u in range(2000) for i in range(u % 7, 40, 7))
    (tmp_path / "raw.csv").write_text("user,item\n" + rows)
    asked = ["prepare", str(tmp_path / "raw.csv"), "--out", str(tmp_path / "data"), "--on-disk"]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, hard))
    try:
        found = CliRunner().invoke(main, asked)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert found.exit_code == 2, found.output
    assert os.strerror(errno.EFBIG) in found.stderr
    assert str(tmp_path / "data") in found.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["raw.csv"]
    assert CliRunner().invoke(main, asked).exit_code == 0


def test_a_read_only_folder_is_one_line(toy_folder: Path) -> None:
    """As a user who may not write there; root gives up what lets it write everywhere."""
    override, drop = 1, 24  # CAP_DAC_OVERRIDE, PR_CAPBSET_DROP
    prctl = ctypes.CDLL(None).prctl
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copytree(toy_folder, folder / "data")
        model = build()
        model.item_ids = np.arange(model.n_items)
        model.save_pretrained(folder / "model")
        (folder / "raw.csv").write_text("user,item\n1,2\n")
        for path in (folder, *folder.rglob("*")):
            path.chmod(0o555 if path.is_dir() else 0o444)
        commands = [
            ["generate", "--users", 300, "--items", 80, "--out", folder / "new"],
            ["train", folder / "data", "--out", folder / "run", *TRAINING],
            ["recommend", folder / "model", "--history", folder / "raw.csv", "--out", folder / "lists.csv"],
        ]
        try:
            for arguments in commands:
                found = subprocess.run(
                    [sys.executable, "-m", "cfsfl_fast", *map(str, arguments)],
                    env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
                    capture_output=True,
                    text=True,
                    preexec_fn=lambda: prctl(drop, override, 0, 0, 0) if os.geteuid() == 0 else 0,
                    timeout=240,
                )
                assert found.returncode == 2, found.stdout + found.stderr
                assert "Permission denied" in found.stderr
                assert str(arguments[-1 if arguments[0] != "train" else 3]) in found.stderr
                assert len(found.stderr.strip().splitlines()) == 1
        finally:
            folder.chmod(0o755)
            for path in folder.rglob("*"):
                path.chmod(0o755)


# Memory


def scarce(monkeypatch: pytest.MonkeyPatch, module: object, name: str, most: int, rows: Any) -> list[int]:
    """Makes an operation raise PyTorch's out-of-memory error for more than so many users; gives the sizes it saw."""
    real, seen = getattr(module, name), []

    def limited_operation(*arguments: Any, **more: Any) -> Any:
        seen.append(rows(*arguments))
        if seen[-1] > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB.")
        return real(*arguments, **more)

    monkeypatch.setattr(module, name, limited_operation)
    return seen


def test_too_little_memory_halves_the_batch_of_an_answer(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, x = build(), histories(700)
    expected = model.recommend(x, 20, exclude=[3])
    judged = evaluate(model.recommend, x, x)
    seen = scarce(monkeypatch, ops, "linear_topk", 130, lambda u, *_: len(u))
    for _ in range(2):
        for one, other in zip(model.recommend(x, 20, exclude=[3]), expected, strict=True):
            assert torch.equal(one, other)
    found = evaluate(model.recommend, x, x)
    assert torch.equal(found.ndcg100, judged.ndcg100)
    assert torch.equal(found.recall50, judged.recall50)
    assert [record.message.split(" (")[0] for record in caplog.records] == [
        "no memory for 512 users at once: 256 from here on",
        "no memory for 256 users at once: 128 from here on",
    ]
    assert max(seen[2:]) <= 130, "once known, the limit holds"


def test_no_memory_at_all_ends_with_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    scarce(monkeypatch, ops, "linear_topk", 0, lambda u, *_: len(u))
    with pytest.raises(OutOfMemoryError, match="no memory for 23 users at once, the fewest there can be: CUDA out of"):
        model.recommend(histories())
    with pytest.raises(OutOfMemoryError, match="no memory for 22 users"):  # with a target; and not again and again
        evaluate(model.recommend, histories(), histories())


def test_other_errors_are_not_taken_for_a_lack_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("sizes do not match")

    monkeypatch.setattr(ops, "linear_topk", broken)
    with pytest.raises(RuntimeError, match="sizes do not match"):
        build().recommend(histories())


def test_an_update_that_does_not_fit_stops_the_run_and_loses_nothing(
    toy: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = CFSFLConfig(**{**QUICK, "batch_size": 40})
    calls = 0
    real = training.joint_step

    def joint_step(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB.")
        return real(*arguments)

    with monkeypatch.context() as scarcely:
        scarcely.setattr(training, "joint_step", joint_step)
        with pytest.raises(OutOfMemoryError) as raised:
            Run(toy, tmp_path / "run", config, show_progress=False).train()
    message = str(raised.value)
    assert "cpu has no memory for an update of 40 users in stage 'joint' (40 items)" in message
    assert "start a run with batch_size=20 or less, which trains another model" in message
    assert f"{tmp_path / 'run'} keeps the epochs before" in message
    Run(toy, tmp_path / "run", config, resume=True, show_progress=False).train()
    Run(toy, tmp_path / "whole", config, show_progress=False).train()
    assert digests(tmp_path / "run") == digests(tmp_path / "whole")


# Numbers that are none


def poison(monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    """The last update of a stage's second epoch, whose loss still was a number, leaves NaN."""
    real = stages.run_epoch

    def run_epoch(model: CFSFL, *arguments: Any) -> Any:
        found = real(model, *arguments)
        if arguments[2] == stage and arguments[4][-1] == 2:
            with torch.no_grad():
                model.reward[0].weight[0, 0] = torch.nan
        return found

    monkeypatch.setattr(stages, "run_epoch", run_epoch)


@pytest.mark.parametrize("stage", ["recommender", "reward", "joint"])
def test_weights_that_turn_nan_are_never_written(
    stage: str, toy: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = CFSFLConfig(**{**QUICK, "epochs": (2, 2, 2)})
    with monkeypatch.context() as poisoned:
        poison(poisoned, stage)
        with pytest.raises(FloatingPointError) as raised:
            Run(toy, tmp_path / "run", config, show_progress=False).train()
    assert str(raised.value) == (
        f"reward.0.weight holds NaN or infinite values after epoch 2 of stage {stage!r}: lower the learning rate; "
        f"{tmp_path / 'run'} keeps the epochs before"
    )
    for path in (tmp_path / "run").rglob("*.safetensors"):
        checkpoint.check_finite(path, checkpoint.read_tensors(path)[0])
    Run(toy, tmp_path / "run", config, resume=True, show_progress=False).train()
    Run(toy, tmp_path / "whole", config, show_progress=False).train()
    assert digests(tmp_path / "run") == digests(tmp_path / "whole")


@pytest.mark.parametrize("place", ["model", "state"])
def test_a_run_writes_no_nan(place: str, toy: Dataset, tmp_path: Path) -> None:
    """Wherever it comes from: a file that nobody could read takes no older one's place."""
    run = Run(toy, tmp_path / "run", CFSFLConfig(**QUICK), show_progress=False)
    run.train()
    before = digests(tmp_path / "run")
    with torch.no_grad():
        run.model.lookup.weight[3, 1] = torch.inf
    run.optimisers = updates.Optimisers(run.model, "joint")
    with pytest.raises(ValueError, match=r"run/.*\.safetensors: (model/)?lookup\.weight holds NaN or infinite values"):
        run.keep("joint") if place == "model" else run.save_state()
    assert digests(tmp_path / "run") == before


# One process of several

FAULTY = """
import os, resource, sys, torch
from cfsfl_fast import cli, stages
fault, real = sys.argv.pop(1) if os.environ["RANK"] == "1" else sys.argv.pop(1) and "", stages.run_epoch
def run_epoch(model, *arguments):
    if fault == "memory" and arguments[2] == "joint":
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB.")
    found = real(model, *arguments)
    if fault == "nan" and arguments[2] == "joint":
        with torch.no_grad():
            model.lookup.weight[0, 0] = torch.nan
    return found
stages.run_epoch = run_epoch
if fault == "disk":
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
cli.main(sys.argv[1:])
"""


@pytest.mark.parametrize(
    ("fault", "told", "told_by_the_other"),
    [
        ("nan", *["lookup.weight holds NaN or infinite values after epoch 1 of stage 'joint': lower"] * 2),
        ("memory", "cpu has no memory for an update of 32 users in stage 'joint'", "process 0 of 2 lost the others"),
        ("disk", os.strerror(errno.EFBIG), "another process failed, and says why"),
    ],
    ids=["nan", "memory", "disk"],
)
def test_a_fault_of_one_process_ends_all_and_keeps_what_was(
    fault: str, told: str, told_by_the_other: str, toy_folder: Path, tmp_path: Path
) -> None:
    """The second of two, which has half the rows of every item table."""
    asked = [*command(toy_folder, tmp_path / "run")[3:], "--item-shards=2"]
    with started(["-c", FAULTY, fault, *asked], 2) as running:
        errors = [process.communicate(timeout=PATIENCE)[1] for process in running]
        assert [process.returncode for process in running] == [2, 2], errors
    for error, words in zip(errors, (told_by_the_other, told), strict=True):
        assert words in error
        assert "Traceback" not in error
    kept = sorted(path.parent.name for path in (tmp_path / "run").rglob(checkpoint.MODEL))
    assert kept == (["recommender"] if fault == "disk" else ["control", "joint", "recommender", "reward", "run"])
    for path in (tmp_path / "run").rglob("*.safetensors"):
        checkpoint.check_finite(path, checkpoint.read_tensors(path)[0])
    assert not list((tmp_path / "run").rglob("*.partial-*"))
