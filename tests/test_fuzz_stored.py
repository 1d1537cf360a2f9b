"""What the library wrote itself, after accidents and with texts of anybody's: refused, or read as it was written.

make fuzz     # thousands of each, and a table of what came of them
"""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cfsfl_fast import CFSFL, CFSFLConfig, checkpoint, resharding
from cfsfl_fast.cli.inference import _part
from cfsfl_fast.datasets import Dataset, open_dataset, save_dataset, synthetic_dataset
from cfsfl_fast.datasets.prepared import _manifest_checksum
from cfsfl_fast.distributed import ALONE, Mesh
from cfsfl_fast.experiments import _read as read_result
from cfsfl_fast.model import ITEM_TABLES
from cfsfl_fast.runs import METRICS, STATE, USERS, Run, read_metrics, read_state
from cfsfl_fast.sharded import Shard
from tests.test_damage import in_range
from tests.test_distributed import Nth
from tests.test_fuzz import REFUSED, anything, attempt, edits, fuzzed, mutated
from tests.test_model import M, build
from tests.test_training import QUICK

Edits = list[tuple[str, float, int, bytes]]


@contextmanager
def altered(path: Path, changes: Edits) -> Iterator[bool]:
    """A file after some accidents, as it was again afterwards; whether they changed anything."""
    content = path.read_bytes()
    changed = mutated(content, changes)
    path.write_bytes(changed)
    try:
        yield changed != content
    finally:
        path.write_bytes(content)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model with item ids."""
    folder = tmp_path_factory.mktemp("stored") / "model"
    model = build()
    model.item_ids = np.arange(M)
    model.save_pretrained(folder)
    return folder


@fuzzed(1)
@given(st.sampled_from([checkpoint.CONFIG, checkpoint.MODEL, checkpoint.ITEM_IDS]), edits, st.integers(1, 4))
def test_model_folders(model_folder: Path, name: str, changes: Edits, parts: int) -> None:
    """Read whole, or by one of several processes."""

    def read() -> CFSFL:
        if parts == 1:
            return CFSFL.from_pretrained(model_folder)
        return CFSFL.part_from_pretrained(model_folder, Mesh(items=Nth(parts - 2, parts)))

    with altered(model_folder / name, changes) as is_changed:
        found = attempt("model folders", read, lambda _: None)
        assert (found == REFUSED) == is_changed


tensors = st.dictionaries(
    st.sampled_from(["lookup.weight", "recommender.output.bias", "optimiser/main/lookup.weight/exp_avg", "other"]),
    st.tuples(st.integers(0, 3), st.sampled_from([torch.float32, torch.float64, torch.int64, torch.int32])),
)


@fuzzed()
@given(tensors, st.integers(1, 9), st.integers(1, 5), st.text(max_size=5), st.one_of(st.none(), edits))
def test_files_that_several_processes_read(
    model_folder: Path, kinds: dict[str, Any], n_items: int, size: int, text: str, changes: Edits | None
) -> None:
    """Tables of any shape, written by one process, read by any number; whole, or refused by each."""
    path = model_folder.parent / "parts.safetensors"
    written = {
        name: torch.arange(n_items * max(1, width)).view(n_items, *([width] if width > 1 else [])).to(dtype)
        if width
        else torch.tensor(3).to(dtype)
        for name, (width, dtype) in kinds.items()
    }
    resharding.write_tensors(path, written, {"text": text}, Shard(ALONE, n_items), Mesh(), ITEM_TABLES)

    def read() -> list[Any]:
        return [resharding.read_tensors(path, Shard(Nth(r, size), n_items), ALONE, ITEM_TABLES) for r in range(size)]

    def check(found: list[Any]) -> None:
        assert all(metadata["text"] == text for _, metadata in found)
        assert all(part.keys() == written.keys() for part, _ in found)
        for name, tensor in written.items():
            is_table = tensor.dim() > 0 and not set(name.split("/")).isdisjoint(ITEM_TABLES)
            parts = [part[name] for part, _ in found]
            assert torch.equal(torch.cat(parts) if is_table else parts[0], tensor)

    with altered(path, changes or []) as is_changed:
        found = attempt("files that parts read", read, check)
        assert (found == REFUSED) == is_changed


# Runs


@pytest.fixture(scope="module")
def runs(toy: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped in its last stage, "run", and one like it that was not, "whole"."""
    folder = tmp_path_factory.mktemp("runs")

    def stop(_: Any) -> None:
        if (run.progress["stage"], run.progress["epoch"]) == ("joint", 1):
            raise KeyboardInterrupt

    run = Run(toy, folder / "run", CFSFLConfig(**QUICK), show_progress=False, on_epoch=stop)
    with pytest.raises(KeyboardInterrupt):
        run.train()
    Run(toy, folder / "whole", CFSFLConfig(**QUICK), show_progress=False).train()
    return folder


counts = st.one_of(st.integers(-2, 5), st.sampled_from([2**40, -(2**63), 10**30]), anything)
progresses = st.fixed_dictionaries(
    {},
    optional={
        "stage": st.one_of(st.sampled_from(["recommender", "control", "reward", "joint", "done", "../x"]), anything),
        **dict.fromkeys(["epoch", "step", "first_step", "lines", "last", "data"], counts),
        "best": st.one_of(
            anything,
            st.dictionaries(
                st.sampled_from(["recommender", "control", "reward", "joint", "elsewhere"]),
                st.one_of(anything, st.fixed_dictionaries({"epoch": counts, "score": counts})),
                max_size=2,
            ),
        ),
        "more": anything,
    },
)


@fuzzed(0.3)
@given(progresses)
def test_progress_of_anything(runs: Path, toy: Dataset, changes: dict[str, Any]) -> None:
    """A state whose checksums fit and whose progress does not: refused in words, or gone on from to an end."""
    out = runs / "copy"
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(runs / "run", out)
    held, progress = read_state(out / STATE)
    try:
        text = json.dumps(progress | changes)
        text.encode()
    except (TypeError, ValueError):
        return
    checkpoint.write_tensors(out / STATE, held, {"progress": text})

    def act() -> Any:
        run = Run(toy, out, CFSFLConfig(**QUICK), resume=True, show_progress=False)
        return run.train() if run.progress["epoch"] < 6 else None

    attempt("progress of anything", act, lambda _: None, FileNotFoundError)


@fuzzed()
@given(st.sampled_from([METRICS, "result.json", USERS]), edits)
def test_files_of_figures(runs: Path, name: str, changes: Edits) -> None:
    folder = runs / "whole"
    if not (folder / "result.json").exists():
        result = {"system": "CF-SFL", "microseconds": 3.0, "best": {}, "config": {"seed": 0}, "data": [1, 2, 3]}
        (folder / "result.json").write_text(json.dumps(result))

    with altered(folder / name, changes):
        attempt(f"figures: {name}", lambda: read_result(folder), lambda _: None)
        attempt(f"figures: {name}", lambda: read_metrics(folder), lambda _: None)


# Prepared data


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared folder."""
    folder = tmp_path_factory.mktemp("prepared") / "data"
    save_dataset(synthetic_dataset(60, 30, events_per_user=8), folder)
    return folder


@fuzzed(1)
@given(st.integers(0, 99), edits, st.booleans())
def test_prepared_folders(prepared: Path, which: int, changes: Edits, verify: bool) -> None:
    """Arrays that are mapped into memory: refused, or of rows and ids in range; verified, those that were written."""
    paths = sorted(prepared.iterdir())
    path = paths[which % len(paths)]
    before = open_dataset(prepared).matrices()["train"].copy()

    def check(data: Dataset) -> None:
        assert in_range(data)
        assert not verify or (data.matrices()["train"] != before).nnz == 0

    with altered(path, changes):
        what = "prepared data, verified" if verify else "prepared data"
        attempt(what, lambda: open_dataset(prepared, verify=verify), check)


@fuzzed(1)
@given(
    st.dictionaries(st.sampled_from(["n_items", "name", "report", "arrays", "format_version"]), anything, min_size=1)
)
def test_manifests_of_anything(prepared: Path, changes: dict[str, Any]) -> None:
    path = prepared / "dataset.json"
    content = path.read_bytes()
    manifest = json.loads(content) | changes
    del manifest["sha256"]
    try:
        text = json.dumps({**manifest, "sha256": _manifest_checksum(manifest)})
    except (TypeError, ValueError):
        return
    try:
        path.write_text(text)
        attempt("manifests", lambda: open_dataset(prepared), lambda data: data.describe() and None)
    finally:
        path.write_bytes(content)


# Outputs in parts


@fuzzed(2)
@given(st.one_of(st.text(max_size=6), st.from_regex(r"-?\d{1,3}/-?\d{1,22}", fullmatch=True)), st.integers(0, 40))
def test_shards_of_users(text: str, n: int) -> None:
    """Any text: refused, or a part that with the others of its kind is the whole."""

    def check(part: tuple[int, int]) -> None:
        number, _, parts = text.partition("/")
        assert 1 <= int(number) <= int(parts)
        if int(parts) < 1000:
            ends = [_part(f"{i + 1}/{int(parts)}", n) for i in range(int(parts))]
            assert part in ends
            assert ends[0][0] == 0
            assert ends[-1][1] == n
            assert all(a[1] == b[0] for a, b in itertools.pairwise(ends))

    attempt("--shard", lambda: _part(text, n), check)
