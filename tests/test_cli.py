"""The command line from raw ratings to recommendations, and what it says when it is used wrongly."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from cfsfl_fast.cli import main
from tests.conftest import clusters

SIZES = ["--steps=2", "--top-k=6", "--hidden-dim=24", "--latent-dim=8", "--lookup-dim=8", "--feedback-dim=8"]
OPTIONS = [*SIZES, "--batch-size=32", "--epochs=15,1,2", "--learning-rate=1e-2", "--joint-learning-rate=1e-3"]


def cfsfl(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def ratings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A MovieLens file: users from 1001, items in tens."""
    path = tmp_path_factory.mktemp("raw") / "ratings.csv"
    users, items = clusters().nonzero()
    rows = [f"{u + 1001},{10 * i + 10},4.5,{n}" for n, (u, i) in enumerate(zip(users, items, strict=True))]
    path.write_text("userId,movieId,rating,timestamp\n" + "\n".join(rows) + "\n")
    return path


@pytest.fixture(scope="module")
def trained(ratings: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A prepared folder and a run on it."""
    folder = tmp_path_factory.mktemp("trained")
    data, run = folder / "data", folder / "run"
    prepared = cfsfl("prepare", ratings, "--min-rating", "3.5", "--held-out", "20", "--out", data)
    assert prepared.exit_code == 0, prepared.output
    result = cfsfl("train", data, "--out", run, *OPTIONS)
    assert result.exit_code == 0, result.output
    assert [line.split("  ")[0] for line in result.stdout.splitlines()[1:5]] == [
        "most popular",
        "VAE",
        "VAE, trained on",
        "CF-SFL",
    ]
    return data, run


def test_describe(trained: tuple[Path, Path]) -> None:
    result = cfsfl("describe", trained[0])
    assert result.exit_code == 0
    assert "111 training users x 40 items" in result.output


def test_evaluate(trained: tuple[Path, Path]) -> None:
    data, run = trained
    report = json.loads((run / "report.json").read_text())
    found = json.loads(cfsfl("evaluate", run, data, "--json").stdout)
    assert found["NDCG@100"] == report["test"]["CF-SFL"]["NDCG@100"]
    assert found == json.loads(cfsfl("evaluate", run, data, "--json", "--batch-size", 3).stdout)
    plain = json.loads(cfsfl("evaluate", run / "stages/recommender", data, "--json").stdout)
    assert plain["NDCG@100"] == report["test"]["VAE"]["NDCG@100"]
    validation = cfsfl("evaluate", run, data, "--split", "validation", "--steps", "0")
    assert validation.exit_code == 0
    assert "NDCG@100" in validation.output


def test_recommend_in_the_users_own_ids(trained: tuple[Path, Path], tmp_path: Path) -> None:
    _, run = trained
    history = tmp_path / "history.csv"
    history.write_text("user,item\nann,10\nann,50\nann,90\nbob,20\nbob,60\ncy,77\nann,77\n")
    out = tmp_path / "recs.csv"
    result = cfsfl("recommend", run, "--history", history, "-n", 3, "--out", out)
    assert result.exit_code == 0, result.output
    assert "2 pairs" in result.stderr
    rows = list(csv.DictReader(out.open()))
    assert [row["user"] for row in rows] == ["ann"] * 3 + ["bob"] * 3 + ["cy"] * 3
    assert [row["rank"] for row in rows] == ["1", "2", "3"] * 3
    ann = {int(row["item"]) for row in rows[:3]}
    assert ann.isdisjoint({10, 50, 90})
    assert all((item // 10 - 1) % 4 == 0 for item in ann), "ann's cluster is 10, 50, 90, 130 ..."
    assert cfsfl("recommend", run, "--history", history, "-n", 3).stdout == out.read_text()


def test_generate_and_doctor(tmp_path: Path) -> None:
    assert cfsfl("generate", "--users", 300, "--items", 80, "--out", tmp_path / "data").exit_code == 0
    assert "80 items" in cfsfl("describe", tmp_path / "data").output
    doctor = cfsfl("doctor")
    assert doctor.exit_code == 0
    assert "auto takes" in doctor.output
    assert "reference  can run" in doctor.output


def test_a_config_file_and_options_that_win_over_it(trained: tuple[Path, Path], tmp_path: Path) -> None:
    data, run = trained
    result = cfsfl("train", data, "--out", tmp_path / "run", "--config", run / "config.json", "--steps", 0, "--seed", 7)
    assert result.exit_code == 0, result.output
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["steps"], config["seed"], config["hidden_dim"]) == (0, 7, 24)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("train DATA --out RUN", "holds a run already"),
        ("train DATA --out RUN --resume --top-k 7", "started with"),
        ("train DATA --out NEW --epochs 3,x,1", "--epochs takes three counts, as 100,5,25; got '3,x,1'"),
        ("train DATA --out NEW --epochs 3", "three counts >= 0, one per stage; got (3,)"),
        ("train DATA --out NEW --steps -1", "steps must be at least 0; got -1"),
        ("train DATA --out NEW --action best", "got 'best'"),
        ("train DATA --out NEW --device tpu", "device must be auto, cpu, cuda or cuda:N; got 'tpu'"),
        ("train DATA --out NEW --backend triton", "backend 'triton' cannot run"),
        ("train NOWHERE --out NEW", "NOWHERE"),
        ("train DATA --out NEW --config BAD", "is not json"),
        ("train DATA --out NEW --config UNKNOWN", "unknown config field 'depth'"),
        ("evaluate DATA DATA", "config.json is missing"),
        ("evaluate RUN OTHER", "the model knows 40 items, the data have"),
        ("evaluate RUN SHIFTED", "trained on other items: item 0 is"),
        ("recommend RUN --history NOWHERE", "NOWHERE"),
        ("recommend RUN --history BAD", "BAD"),
        ("recommend RUN --history GOOD -n -1", "at least 0; got -1"),
        ("prepare BAD --out NEW", "BAD"),
        ("describe BAD", "BAD"),
    ],
)
def test_wrong_use_ends_in_one_line_and_exit_code_2(
    trained: tuple[Path, Path], ratings: Path, tmp_path: Path, arguments: str, words: str
) -> None:
    data, run = trained
    (tmp_path / "BAD").write_bytes(b"\x00\xff{[")
    (tmp_path / "UNKNOWN").write_text('{"depth": 3}')
    (tmp_path / "GOOD").write_text("ann,10\n")
    if "OTHER" in arguments:
        cfsfl("generate", "--users", 300, "--items", 80, "--out", tmp_path / "OTHER")
    if "SHIFTED" in arguments:
        lines = [line.split(",") for line in ratings.read_text().splitlines()]
        moved = [",".join([u, i if u == "userId" else str(int(i) + 1), *rest]) for u, i, *rest in lines]
        (tmp_path / "ratings.csv").write_text("\n".join(moved) + "\n")
        cfsfl("prepare", tmp_path / "ratings.csv", "--held-out", "20", "--out", tmp_path / "SHIFTED")
    names = {"DATA": data, "RUN": run}
    result = cfsfl(*[names.get(a, tmp_path / a if a.isupper() else a) for a in arguments.split()])
    assert result.exit_code == 2
    assert words in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert "Traceback" not in result.output
    assert not (tmp_path / "NEW").exists() or "backend" in words


def test_a_malformed_line_is_named(tmp_path: Path) -> None:
    (tmp_path / "ratings.csv").write_text("userId,movieId,rating,timestamp\n1,2,4.0,0\n1,three,4.0,0\n1,4,x,0\n")
    result = cfsfl("prepare", tmp_path / "ratings.csv", "--out", tmp_path / "data")
    assert result.exit_code == 2
    assert "ratings.csv, line 3" in result.stderr


def test_compact_data_trains_directly(tmp_path: Path) -> None:
    matrix = clusters(60).tocsr()
    deltas = np.concatenate(
        [np.diff(matrix.indices[a:b], prepend=0) for a, b in zip(matrix.indptr, matrix.indptr[1:], strict=False)]
    )
    path = tmp_path / "small.npz"
    np.savez(path, n_users=60, n_items=40, all_counts=np.diff(matrix.indptr), all_deltas=deltas)
    result = cfsfl("train", path, "--out", tmp_path / "run", *OPTIONS, "--epochs", "1,0,0")
    assert result.exit_code == 0, result.output
