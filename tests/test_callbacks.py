"""Callbacks of training."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from cfsfl_fast.callbacks import TensorBoard
from cfsfl_fast.cli import main
from cfsfl_fast.metrics import Mean
from cfsfl_fast.stages import Epoch
from tests.test_cli import SIZES

EPOCHS = [
    Epoch("recommender", 0, 0, {}, {"NDCG@100": Mean(0.1, 0.01)}),
    Epoch("recommender", 1, 3, {"loss": 12.5}, {"NDCG@100": Mean(0.25, 0.01)}),
    Epoch("reward", 1, 3, {"reward_loss": 1.5}, None),
]


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard reads."""
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="pip install 'cfsfl-fast[tensorboard]'"
    )
    events = accumulator.EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_reads_what_was_written(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="pip install 'cfsfl-fast[tensorboard]'")
    callback = TensorBoard(tmp_path)
    for record in EPOCHS:
        callback(record)
    found = scalars(tmp_path)
    assert found["recommender/loss"] == [(1, 12.5)]
    assert [step for step, _ in found["recommender/NDCG@100"]] == [0, 1]
    assert [value for _, value in found["recommender/NDCG@100"]] == pytest.approx([0.1, 0.25])
    assert found["reward/reward_loss"] == [(1, 1.5)]


def test_a_run_with_tensorboard(toy_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="pip install 'cfsfl-fast[tensorboard]'")
    run = tmp_path / "run"
    result = CliRunner().invoke(
        main, ["train", str(toy_folder), "--out", str(run), *SIZES, "--epochs", "2,1,1", "--tensorboard"]
    )
    assert result.exit_code == 0, result.output
    found = scalars(run / "tensorboard")
    for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()):
        if "loss" in line:
            assert dict(found[f"{line['stage']}/loss"])[line["epoch"]] == pytest.approx(line["loss"], rel=1e-6)


def test_without_tensorboard_it_says_what_to_install(
    toy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    result = CliRunner().invoke(main, ["train", str(toy_folder), "--out", str(tmp_path / "run"), "--tensorboard"])
    assert result.exit_code == 2
    assert "pip install 'cfsfl-fast[tensorboard]'" in result.stderr
    assert not (tmp_path / "run").exists(), "it is said before anything is made"


def test_epochs_are_logged(toy_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "cfsfl_fast"):
        CliRunner().invoke(
            main, ["train", str(toy_folder), "--out", str(tmp_path / "run"), *SIZES, "--epochs", "2,0,0"]
        )
    said = [record.getMessage() for record in caplog.records if record.name == "cfsfl_fast.stages"]
    assert [line.split(":")[0] for line in said] == ["recommender 0", "recommender 1", "recommender 2"]
    assert "NDCG@100" in said[0]
    assert "loss" in said[2]
