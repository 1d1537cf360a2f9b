"""`cfsfl reproduce | sweep | plot`: cells that are shared, skipped and resumed, figures against direct computations."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

from cfsfl_fast import files, plots, tables
from cfsfl_fast.cli import main
from cfsfl_fast.config import CFSFLConfig
from cfsfl_fast.datasets import open_dataset, save_dataset, synthetic_dataset
from cfsfl_fast.evaluation import RANKS, seconds_to_answer
from cfsfl_fast.experiments import Laboratory, Row
from cfsfl_fast.reproduce import EXPERIMENTS, PUBLISHED, ablations, published
from tests.conftest import ROOT

OPTIONS = ["--steps=2", "--top-k=6", "--hidden-dim=24", "--latent-dim=8", "--lookup-dim=8", "--feedback-dim=8"]
OPTIONS += ["--batch-size=32", "--epochs=3,1,2", "--learning-rate=1e-2", "--joint-learning-rate=3e-3"]
OPTIONS += ["--feedback-learning-rate=1e-2"]


def cfsfl(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments])


def reproduce(what: str, data: Path, out: Path, *more: object) -> Result:
    return cfsfl("reproduce", what, data, "--out", out, *OPTIONS, *more)


def rows_of(path: Path) -> dict[str, dict[str, str]]:
    with path.open() as file:
        return {row["system"]: row for row in csv.DictReader(file)}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small data set on which systems differ."""
    folder = tmp_path_factory.mktemp("data") / "small"
    save_dataset(synthetic_dataset(260, 90, events_per_user=14.0, seed=1), folder)
    return folder


@pytest.fixture(scope="module")
def out(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Table 3 with two seeds."""
    folder = tmp_path_factory.mktemp("reproduced") / "out"
    result = reproduce("table3", data, folder, "--seeds", 2)
    assert result.exit_code == 0, result.output
    assert result.stdout == (folder / "table3.md").read_text()
    return folder


def per_user(out: Path, cell: str, seed: int, metric: str = "NDCG@100") -> np.ndarray:
    """A cell's metric of every test user, read without the code under test."""
    folder = out / "cells" / cell / f"seed-{seed}"
    system = json.loads((folder / "result.json").read_text())["system"]
    with np.load(folder / "users.npz", allow_pickle=False) as arrays:
        return arrays[f"{system}/{metric}"]


LOOP, CONTROL = "vae-T2", "vae-T0-reward_weight=0.0-joint=always"


def test_figures_are_those_of_the_cells(out: Path) -> None:
    found = rows_of(out / "table3.csv")
    row = found["CF-SFL, T = 2"]
    loop = np.stack([per_user(out, LOOP, seed) for seed in (0, 1)])
    control = np.stack([per_user(out, CONTROL, seed) for seed in (0, 1)])
    gains = loop - control
    n = loop.shape[1]
    assert n > 20
    for name, values in (("NDCG@100", loop), ("NDCG@100 minus VAE, trained on", gains)):
        assert float(row[name]) == pytest.approx(values.mean())
        users = values.mean(0)
        assert float(row[f"{name} error over users"]) == pytest.approx(users.std(ddof=1) / math.sqrt(n))
        seeds = abs(values[0].mean() - values[1].mean()) / 2
        assert float(row[f"{name} error over seeds"]) == pytest.approx(seeds)
    assert gains.any()
    assert float(row["Recall@20"]) == pytest.approx(
        np.mean([per_user(out, LOOP, seed, "Recall@20").mean() for seed in (0, 1)])
    )
    assert row["seeds"] == "2"
    assert (row["stage 1 epochs"], row["stage 3 epochs"]) == ("3.0", "2.0")
    assert float(row["stage 3 seconds per epoch"]) > 0
    assert float(row["microseconds per user"]) > 0
    assert found["most popular"]["stage 1 epochs"] == ""
    assert found["VAE, trained on"]["NDCG@100 minus VAE, trained on"] == ""
    assert row["control"] == "VAE, trained on"


def test_a_baseline_that_draws_has_a_cell_for_every_seed(out: Path, data: Path) -> None:
    for seed in (0, 1):
        found = json.loads((out / "cells" / "wmf" / f"seed-{seed}" / "result.json").read_text())
        assert found["choices"]["seed"] == seed
    assert not (out / "cells" / "ease" / "seed-1").exists()
    later = Laboratory(open_dataset(data), out, {"steps": 2, "seed": 1})  # as with --seed 1
    assert later.folder(Row("EASE", baseline="ease"), 1) == out / "cells" / "ease" / "seed-0"


def test_the_best_preset_is_compared_with_its_own_model_without_the_loop(out: Path) -> None:
    [folder] = (out / "cells").glob("recvae-T4-*feedback=scores*")
    gains = []
    for seed in (0, 1):
        with np.load(folder / f"seed-{seed}" / "users.npz", allow_pickle=False) as arrays:
            gains.append(arrays["CF-SFL, scores/NDCG@100"] - arrays["RecVAE + memory/NDCG@100"])
    row = rows_of(out / "table3.csv")["CF-SFL, preset best"]
    assert float(row["NDCG@100 minus VAE, trained on"]) == pytest.approx(np.mean(gains))
    assert row["control"] == "RecVAE + memory, preset best at T = 0"
    assert "(minus RecVAE + memory, preset best at T = 0)" in (out / "table3.md").read_text()


def test_published_figures_stand_beside_and_say_of_what(out: Path, data: Path) -> None:
    row = rows_of(out / "table3.csv")["VAE"]
    assert [row[f"published {name}"] for name in tables.METRICS] == ["0.395", "0.537", "0.426"]
    assert row["published on"] == "ML-20M (another data set)"
    markdown = (out / "table3.md").read_text()
    assert ".3950 / .5370 / .4260" in markdown
    assert "ML-20M (another data set)" in markdown
    assert "cfsfl reproduce table3 small --out out --seeds 2" in markdown
    assert str(data.parent) not in markdown
    dataset = open_dataset(data)

    class Published:
        n_users = 471_355

    figures, where = published(Published())  # type: ignore[arg-type]
    assert (figures, where) == (PUBLISHED["MSD"], "MSD")
    assert published(dataset)[1] == "ML-20M (another data set)"


def test_tables_share_cells_and_rows_share_stage_1(out: Path, data: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (out / "cells").rglob("*")}
    result = reproduce("figure3", data, out, "--seeds", 1)
    assert result.exit_code == 0, result.output
    assert {path: path.stat().st_mtime_ns for path in before if path.is_file()} == {
        path: at for path, at in before.items() if path.is_file()
    }
    for seed in (0, 1):
        lines = [
            [line for line in (json.loads(text) for text in path.read_text().splitlines()) if _first(line)]
            for path in (out / "cells").glob(f"vae-*/seed-{seed}/metrics.jsonl")
        ]
        assert len(lines) >= 4
        assert all(each == lines[0] for each in lines), "the seconds of stage 1 differ: it was trained again"
        of_recvae = [path.read_text() for path in (out / "cells").glob(f"recvae-*/seed-{seed}/metrics.jsonl")]
        alone, judged = sorted(of_recvae, key=len)
        assert judged.startswith(alone), "RecVAE's row is stage 1 of the best preset"
    found = float(rows_of(out / "figure3.csv")["VAE+R"]["NDCG@100"])
    assert found == per_user(out, "vae-T0-joint=always", 0).mean()


def _first(line: dict[str, Any]) -> bool:
    return line["stage"] == "recommender"


def test_times_are_measured_again(out: Path, data: Path) -> None:
    result = out / "cells" / LOOP / "seed-0" / "result.json"
    before = json.loads(result.read_text())
    result.write_text(json.dumps({**before, "microseconds": 1e9}))
    popular = out / "cells" / "most_popular" / "seed-0" / "result.json"
    unchanged = popular.read_bytes()
    assert reproduce("table3", data, out, "--time-again").exit_code == 0
    after = json.loads(result.read_text())
    assert 0 < after["microseconds"] < 1e8
    assert {**before, "microseconds": 0} == {**after, "microseconds": 0}
    assert popular.read_bytes() == unchanged
    assert float(rows_of(out / "table3.csv")["CF-SFL, T = 2"]["microseconds per user"]) == after["microseconds"]


def test_a_field_that_is_younger_than_a_cell_has_its_default(out: Path, data: Path) -> None:
    folder = out / "cells" / LOOP / "seed-0"
    files = {path: path.read_bytes() for path in (folder / "result.json", folder / "config.json")}
    try:
        for path in files:
            path.write_text(path.read_text().replace('"loss_steps": "last",', ""))
        assert reproduce("table3", data, out, "--seeds", 2).exit_code == 0
        assert cfsfl("train", data, "--out", folder, "--resume", "--no-control", *OPTIONS).exit_code == 0
        result = cfsfl("train", data, "--out", folder, "--resume", "--no-control", *OPTIONS, "--loss-steps", "all")
        assert "was started with loss_steps = 'last', not 'all'" in result.stderr
    finally:
        for path, content in files.items():
            path.write_bytes(content)


def test_another_config_or_other_data_are_refused(out: Path, data: Path, tmp_path: Path) -> None:
    result = reproduce("table3", data, out, "--learning-rate", "0.5")
    assert result.exit_code == 2
    assert "was trained with learning_rate = 0.01, not 0.5" in result.stderr
    save_dataset(synthetic_dataset(200, 90, events_per_user=14.0, seed=2), tmp_path / "other")
    result = reproduce("table3", tmp_path / "other", out)
    assert result.exit_code == 2
    assert "is of other data" in result.stderr


def test_killed_and_started_again_equals_never_killed(out: Path, data: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "cfsfl_fast", "reproduce", "table3", str(data), f"--out={tmp_path / 'killed'}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    cells = tmp_path / "killed" / "cells"
    for cell, n_lines in (("vae-T0", 2), (LOOP, 7)):  # in stage 1, in stage 3
        metrics = cells / cell / "seed-0" / "metrics.jsonl"
        process = subprocess.Popen([*command, *OPTIONS], env=environment, stderr=subprocess.PIPE)
        patience = time.monotonic() + 120
        while not (metrics.exists() and len(metrics.read_bytes().splitlines()) >= n_lines):
            assert process.poll() is None, process.stderr and process.stderr.read()
            assert time.monotonic() < patience
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (cells / LOOP / "seed-0" / "result.json").exists()
    result = reproduce("table3", data, tmp_path / "killed")
    assert result.exit_code == 0, result.output
    for cell in ("vae-T0", LOOP, CONTROL, "vae-T0-joint=always"):
        assert np.array_equal(per_user(tmp_path / "killed", cell, 0), per_user(out, cell, 0)), cell


def test_a_table_of_what_is_finished(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Laboratory, "_train", lambda *_: (_ for _ in ()).throw(ValueError("stopped here")))
    result = reproduce("table3", data, tmp_path / "out")
    assert (result.exit_code, result.stderr.strip()) == (2, "cfsfl: stopped here")
    found = rows_of(tmp_path / "out" / "table3.csv")
    assert found["most popular"]["seeds"] == "1"
    assert (found["VAE"]["seeds"], found["VAE"]["NDCG@100"]) == ("0", "")


def test_rows_may_be_left_out(out: Path, data: Path, tmp_path: Path) -> None:
    skip = ["--skip", "preset best", "--skip", "E", "--skip", "M", "--skip", "trained on"]  # EASE, VAE ..., SLIM, WMF
    result = reproduce("table3", data, tmp_path / "out", *skip)
    assert result.exit_code == 0, result.output
    found = rows_of(tmp_path / "out" / "table3.csv")
    assert list(found) == ["most popular", "CF-SFL, T = 2"]
    assert found["CF-SFL, T = 2"]["NDCG@100 minus VAE, trained on"] == ""
    assert "--skip 'preset best' --skip E --skip M --skip 'trained on'" in result.stdout
    left = [row.name for row in EXPERIMENTS["table3"]({"steps": 2}).without(["VAE", "VAE, trained on", "best"]).rows]
    assert [name for name in left if "VAE" in name] == ["RecVAE", "VAE+R"]
    for wrong, words in ((["--skip", "SVD"], "no row of table3 has 'SVD' in its name"), (["--skip", ""], "is left")):
        result = reproduce("table3", data, tmp_path / "none", *wrong)
        assert (result.exit_code, words in result.stderr) == (2, True)


def test_given_fields_win_over_what_a_row_usually_has(data: Path, tmp_path: Path) -> None:
    fields = {"epochs": (3, 1, 2), "steps": 2}
    laboratory, experiment = Laboratory(open_dataset(data), tmp_path, fields), EXPERIMENTS["table3"](fields)
    preset = CFSFLConfig.preset("best")

    def config(name: str, *given: str) -> CFSFLConfig:
        [row] = [row for row in experiment.given(given).rows if row.name == name]
        return laboratory.config(row, 0)

    best = "CF-SFL, preset best"
    assert config(best) == preset
    assert config(best, "epochs", "steps") == dataclasses.replace(preset, epochs=(3, 1, 2))
    assert config("RecVAE").epochs == preset.epochs
    assert config("RecVAE", *fields).epochs == (3, 1, 2)
    assert config("VAE", *fields).epochs == config("VAE").epochs == (3, 1, 2)


def test_a_baseline_without_its_package_is_left_out_with_a_warning(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "implicit.cpu.als", None)
    monkeypatch.setattr(Laboratory, "_train", lambda *_: None)
    result = reproduce("table3", data, tmp_path / "out", "--skip", "E", "--skip", "SLIM")
    assert result.exit_code == 0, result.output
    assert "table3 has no WMF: WMF needs implicit" in caplog.text
    assert "pip install 'cfsfl-fast[implicit]'" in caplog.text
    found = rows_of(tmp_path / "out" / "table3.csv")
    assert (found["WMF"]["seeds"], found["most popular"]["seeds"]) == ("0", "1")


def test_estimates() -> None:
    values = np.array([[1.0, 2.0, 6.0], [3.0, 2.0, 4.0]])
    found = tables.estimate(values)
    assert found.value == 3
    assert found.over_users == pytest.approx(np.std([2, 2, 5], ddof=1) / math.sqrt(3))
    assert found.over_seeds == 0
    assert math.isnan(tables.estimate(values[:1]).over_seeds)
    assert str(tables.Estimate(0.40371, 0.0073, 0.0002)) == ".4037 ± .0073 ± .0002"
    assert str(tables.Estimate(-0.0031, 0.0016, math.nan)) == "-.0031 ± .0016"


def test_rows_of_different_users_are_not_subtracted(out: Path, data: Path) -> None:
    laboratory = Laboratory(open_dataset(data), out, {"steps": 2})
    [row] = [row for row in EXPERIMENTS["table3"]({"steps": 2}).rows if row.baseline == "most popular"]
    results = laboratory.results(row, 1)
    shifted = {0: results[0].__class__(**{**results[0].__dict__, "users": results[0].users[::-1]})}
    with pytest.raises(ValueError, match="judged on different users"):
        tables.paired(results, shifted)


@pytest.mark.parametrize("steps", [2, 4, 8])
def test_an_ablation_changes_what_it_says(steps: int) -> None:
    rows = ablations({"steps": steps}).rows
    assert len({row.name for row in rows}) == len(rows)
    configs = [CFSFLConfig(**{"steps": steps, **row.changes}) for row in rows]
    assert len(set(configs)) == len(configs), "two rows are the same"
    assert {config.steps for config in configs} >= {0, 1, 2, 4, 8}
    assert {config.action for config in configs} == {"straight_through", "topk_softmax", "softmax", "hard"}
    names = {row.name for row in rows}
    assert all(set(row.controls) <= names for row in rows)


def test_a_lock_lets_one_in(tmp_path: Path) -> None:
    inside, order = threading.Event(), []

    def second() -> None:
        inside.wait()
        with files.locked(tmp_path / "cell"):
            order.append("second")

    thread = threading.Thread(target=second)
    thread.start()
    with files.locked(tmp_path / "cell"):
        inside.set()
        time.sleep(0.1)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]


def test_time_is_the_fastest_of_rounds_that_take_turns(data: Path) -> None:
    calls: list[tuple[str, int, int]] = []

    def answering(name: str) -> Any:
        def recommend(x: Any, n: int) -> Any:
            calls.append((name, len(x), n))
            time.sleep(0.03 if name == "slow" or len(calls) < 4 else 0.0)
            return torch.zeros(len(x), n), None

        return recommend

    fold_in = open_dataset(data).test.fold_in
    slow, fast = seconds_to_answer([answering("slow"), answering("fast")], fold_in, rounds=3)
    assert [name for name, _, _ in calls] == ["slow", "fast"] * 3
    assert {call[1:] for call in calls} == {(fold_in.shape[0], RANKS)}
    assert slow >= 0.03 > fast


# Sweeps and pictures


def test_sweep_is_evaluate_with_each_t(out: Path, data: Path, tmp_path: Path) -> None:
    run = out / "cells" / LOOP / "seed-0"
    result = cfsfl("sweep", run, data, "--steps", "0..3", "--out", tmp_path / "sweep.csv")
    assert result.exit_code == 0, result.output
    with (tmp_path / "sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["steps"] for row in rows] == ["0", "1", "2", "3"]
    for row in rows:
        found = json.loads(cfsfl("evaluate", run, data, "--steps", row["steps"], "--json").stdout)
        for name in tables.METRICS:
            assert [float(row[name]), float(row[f"{name} error"])] == found[name]
        assert float(row["microseconds per user"]) > 0
    listed = cfsfl("sweep", run, data, "--steps", "3,1", "--split", "validation").stdout.splitlines()
    assert [line.split(",")[0] for line in listed] == ["steps", "3", "1"]


@pytest.mark.parametrize("steps", ["", "a", "3..1", "-1", "1,,2", "0..x"])
def test_a_wrong_range_is_refused(out: Path, data: Path, steps: str) -> None:
    result = cfsfl("sweep", out / "cells" / LOOP / "seed-0", data, f"--steps={steps}")
    assert result.exit_code == 2
    assert f"--steps takes a range, as 0..12, or counts, as 0,2,8; got {steps!r}" in result.stderr


def texts(svg: Path) -> Iterator[str]:
    """What an svg says: matplotlib names each text in a comment."""
    parser = ElementTree.XMLParser(target=ElementTree.TreeBuilder(insert_comments=True))
    for element in ElementTree.parse(svg, parser).iter():
        if element.tag is ElementTree.Comment:
            yield (element.text or "").strip()


def pictured(out: Path) -> set[str]:
    """The texts of a figure's svg; the png beside it is a picture and not blank."""
    from matplotlib.image import imread

    image = imread(out.with_suffix(".png"))
    assert min(image.shape[:2]) > 400
    assert len(np.unique(image.reshape(-1, image.shape[2]), axis=0)) > 50
    return set(texts(out.with_suffix(".svg")))


def test_figure_3(out: Path, data: Path) -> None:
    assert reproduce("figure3", data, out, "--seeds", 1).exit_code == 0
    shown = pictured(out / "figure3")
    assert {"VAE, trained on", "VAE+R", *(f"CF-SFL, T = {t}" for t in (1, 2, 4, 8)), "joint phase"} <= shown


def test_figure_4(out: Path, data: Path) -> None:
    assert reproduce("figure4", data, out, "--seeds", 1).exit_code == 0
    words = {
        "trained on, no loop",
        "trained with T steps (bar: paired error to no loop)",
        "one model, answering with T steps",
        "feedback steps T",
    }
    assert words <= pictured(out / "figure4")
    with (out / "figure4-sweep-seed-0.csv").open() as file:
        assert [row["steps"] for row in csv.DictReader(file)] == [str(t) for t in range(13)]


def test_plots_of_runs_and_of_a_sweep(out: Path, data: Path, tmp_path: Path) -> None:
    train = ["train", data, "--out", tmp_path / "mine", *OPTIONS]
    assert cfsfl(*train).exit_code == 0
    other = out / "cells" / LOOP / "seed-1"
    result = cfsfl("plot", tmp_path / "mine", other, "--out", tmp_path / "curves", "--title", "two runs")
    assert result.stdout.split() == [str(tmp_path / "curves.png"), str(tmp_path / "curves.svg")]
    assert {"mine", "mine, control", "seed-1", "two runs"} <= pictured(tmp_path / "curves")
    assert cfsfl("sweep", other, data, "--steps", "0..2", "--out", tmp_path / "sweep.csv").exit_code == 0
    assert cfsfl("plot", tmp_path / "sweep.csv", "--out", tmp_path / "swept").exit_code == 0
    assert "trained on, no loop" not in pictured(tmp_path / "swept")
    (tmp_path / "wrong.csv").write_text("a,b\n1,2\n")
    for source, words in (("gone", "holds no run"), ("wrong.csv", "expected the columns that `cfsfl sweep` writes")):
        result = cfsfl("plot", tmp_path / source, "--out", tmp_path / "none")
        assert result.exit_code == 2
        assert words in result.stderr


def test_curves_start_where_the_joint_phase_does() -> None:
    def line(stage: str, value: float) -> dict[str, Any]:
        return {"stage": stage, "validation": {"NDCG@100": value}}

    runs = {
        "one": [[line("recommender", v) for v in (0.1, 0.2, 0.3)] + [line("joint", v) for v in (0.3, 0.4)]],
        "two": [
            [line("recommender", 0.1), line("recommender", 0.2), line("joint", 0.2), line("joint", 0.3)],
            [line("recommender", 0.1), line("recommender", 0.2), line("joint", 0.4), line("joint", 0.7)],
        ],
    }
    close = plots.learning_curves(runs).axes[1]
    drawn = {curve.get_label(): (list(curve.get_xdata()), list(curve.get_ydata())) for curve in close.lines}
    assert drawn["one"] == ([2, 3], [0.3, 0.4])
    assert drawn["two"][0] == [2, 3]
    assert drawn["two"][1] == pytest.approx([0.3, 0.5])
    with pytest.raises(ValueError, match="nothing to draw"):
        plots.learning_curves({"none": [[]]})
