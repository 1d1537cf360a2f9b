"""What `cfsfl plan` says: against what was allocated, and against what cannot fit."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from cfsfl_fast import CFSFLConfig, runs
from cfsfl_fast.cli import main
from cfsfl_fast.datasets import Dataset
from cfsfl_fast.interactions import as_interactions
from cfsfl_fast.plan import PROCESS, measured_rates, plan, scaling
from cfsfl_fast.scarcity import free_memory
from cfsfl_fast.stages import fresh_model
from cfsfl_fast.updates import Optimisers
from tests.conftest import ROOT
from tests.processes import PATIENCE, environment
from tests.test_training import QUICK

SMALL = CFSFLConfig(hidden_dim=32, latent_dim=16, lookup_dim=16, feedback_dim=8, batch_size=100, steps=2)


@pytest.mark.parametrize("recommender", ["vae", "mf"])
def test_tables_layers_and_moments_are_those_of_the_model(recommender: str) -> None:
    config = dataclasses.replace(SMALL, recommender=recommender)
    model = fresh_model(900, config, device="cpu")
    memory = plan(900, 50, config).memory
    assert memory["tables"] + memory["layers"] == 4 * sum(p.numel() for p in model.parameters())
    optimisers = Optimisers(model, "joint")
    parts = [group["params"] for o in (optimisers.main, optimisers.reward) for group in o.param_groups]
    assert memory["moments"] == 8 * sum(p.numel() for part in parts for p in part)


def test_narrow_tables_take_half() -> None:
    config = dataclasses.replace(SMALL, softmax="sampled", table_updates="rows", table_dtype="bf16")
    model = fresh_model(900, config, device="cpu")
    memory = plan(900, 50, config).memory
    assert memory["tables"] + memory["layers"] == sum(p.numel() * p.element_size() for p in model.parameters())
    wide = plan(900, 50, dataclasses.replace(config, table_dtype="fp32")).memory
    assert wide["tables"] - memory["tables"] == 2 * 900 * 2 * 32
    assert {part for part in memory if memory[part] != wide[part]} == {"tables"}


def test_a_virtual_user_who_judges_items_needs_a_memory_and_strangers() -> None:
    config = CFSFLConfig.preset("best", hidden_dim=32, latent_dim=16)
    model, memory = fresh_model(900, config, device="cpu"), plan(900, 50, config).memory
    assert model.memory is not None
    rows = as_interactions(np.eye(50, 900, dtype=np.float32), 900)
    model.memory.fit(rows, 1.0)
    assert memory["item memory"] == 3 * model.memory.precision.nbytes  # the inverse is float64 while it is made
    assert memory["folds"] == 2 * sum(p.nbytes for p in model.recommender.parameters())
    assert plan(25_000, 50_000, config).memory["item memory"] == 4 * 25_000**2  # and float32 of so many
    assert plan(40_000, 15_000, config, events_per_user=30).memory["item memory"] == 4 * 40_000**2 + 8 * 15_000**2
    with pytest.raises(ValueError, match="100000 x 100000 numbers; the most is 60000 items"):
        plan(100_000, 50, config)
    assert "item memory" not in plan(900, 50, SMALL).memory


def test_what_shards_share() -> None:
    one, four = plan(100_000, 5000, SMALL), plan(100_000, 5000, SMALL, devices=4, item_shards=4)
    for part in ("tables", "gradients", "moments"):
        assert four.memory[part] == pytest.approx(one.memory[part] / 4, rel=0.05), part
    assert four.flops == pytest.approx(one.flops / 4)
    assert sum(one.messages.values()) == 0
    copies = plan(100_000, 5000, SMALL, devices=4)
    assert copies.memory["tables"] == one.memory["tables"]
    assert copies.messages["gradients"] == pytest.approx(2 * 3 / 4 * one.memory["moments"] / 2)
    assert four.messages["gradients"] == 0 < four.messages["lists, codes"]
    mixed = plan(100_000, 5000, SMALL, devices=8, item_shards=4)
    assert mixed.messages["gradients"] == pytest.approx(copies.messages["gradients"] / 4 * (1 / 2) / (3 / 4), rel=0.05)


@pytest.mark.parametrize("stage", ["recommender", "joint"])
def test_measured_memory_is_what_was_planned(stage: str) -> None:
    small = {name: getattr(SMALL, name) for name in ("hidden_dim", "latent_dim", "lookup_dim", "batch_size", "steps")}
    options = [f"--{name.replace('_', '-')}={value}" for name, value in small.items()]
    bench = [sys.executable, str(ROOT / "benches" / "measure_updates.py"), "--items=400000", "--users=200"]
    asked = [*bench, f"--stage={stage}", *options]
    done = subprocess.run(asked, env=environment(), capture_output=True, text=True, timeout=PATIENCE, check=True)
    found = json.loads(done.stdout)
    assert found["bytes"] == pytest.approx(found["planned bytes"], rel=0.2)
    assert found["process bytes"] == pytest.approx(PROCESS, rel=0.4)


def test_the_command_prints_every_part_and_refuses_what_cannot_fit() -> None:
    asked = ["plan", "--items=1000000", "--users=100000", "--gflops=100", "--bandwidth=10", "--link=1", "--devices=2"]
    fits = CliRunner().invoke(main, [*asked, "--memory=64"])
    assert fits.exit_code == 0, fits.output
    for part in ("tables", "moments", "gradients", "in all", "GFLOP", "sent", "at 100 GFLOP/s"):
        assert part in fits.output
    tight = CliRunner().invoke(main, [*asked, "--memory=8"])
    assert tight.exit_code == 2
    assert "1,000,000 items needs 2" in tight.output
    assert "has 8 GB free: tables 5.06 GB" in tight.output


def test_a_run_that_cannot_fit_says_so_before_it_begins(
    toy: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "free_memory", lambda device: 1e5)
    with pytest.raises(ValueError, match=r"training on 40 items needs .* which has 100 kB free: tables"):
        runs.Run(toy, tmp_path / "run", CFSFLConfig(**QUICK))
    assert not (tmp_path / "run").exists()


def test_the_command_that_cannot_fit_says_so_before_anything_is_allocated(
    toy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "fresh_model", lambda *_, **__: pytest.fail("a model was made"))
    asked = ["train", str(toy_folder), f"--out={tmp_path / 'run'}", "--hidden-dim=900000000"]
    done = CliRunner().invoke(main, asked)
    assert done.exit_code == 2, done.output
    assert re.search(
        r"40 items needs [\d.]+ TB on each of 1 device\(s\), which has [\d.]+ .B free: tables", done.output
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("n_here", [1, 4])
def test_processes_of_one_machine_share_its_memory(
    n_here: int, toy: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = CFSFLConfig(**QUICK)
    enough = 2 * plan(toy.n_items, toy.n_users, config, mapped=True).total
    monkeypatch.setattr(runs, "free_memory", lambda device: enough - 2 * PROCESS)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(n_here))
    if n_here == 1:
        runs.Run(toy, tmp_path / "run", config)
        return
    with pytest.raises(ValueError, match="which has"):
        runs.Run(toy, tmp_path / "run", config)


def test_events_in_a_mapped_file_take_no_memory() -> None:
    mapped, held = (plan(900, 1000, SMALL, events_per_user=50, mapped=kept).memory for kept in (True, False))
    assert held["histories"] - mapped["histories"] == 4 * 1000 * 50
    assert mapped["histories"] == 40 * 1000


def test_efficiency_is_work_over_time() -> None:
    rates = 1e12, 1e11, 1e9
    rows = scaling(100_000, 50_000, SMALL, *rates)
    assert [(row.devices, row.item_shards) for row in rows[:4]] == [(1, 1), (2, 1), (2, 2), (4, 1)]
    assert rows[-1].devices == 64
    alone = sum(plan(100_000, 50_000, SMALL).seconds(*rates).values())
    assert (rows[0].same_batch, rows[0].grown_batch) == (1, 1)
    for row in rows[1:]:
        took = sum(row.shared.seconds(*rates).values())
        assert row.same_batch == pytest.approx(alone / (row.devices * took))
        assert row.shared == plan(100_000, 50_000, SMALL, devices=row.devices, item_shards=row.item_shards)
        if row.item_shards > 1:
            assert row.grown_batch == row.same_batch, "devices that share tables answer for the same users"
    grown = dataclasses.replace(SMALL, batch_size=400)
    took = sum(plan(100_000, 50_000, grown, devices=4).seconds(*rates).values())
    assert rows[3].grown_batch == pytest.approx(alone / took)


def test_the_command_prints_what_more_devices_come_to() -> None:
    asked = ["plan", "--items=20000", "--users=1000", "--gflops=100", "--bandwidth=10", "--memory=64", "--scaling"]
    refused = CliRunner().invoke(main, asked)
    assert refused.exit_code == 2
    assert "--scaling needs --link, GB/s between devices; got none" in refused.output
    told = CliRunner().invoke(main, [*asked, "--link=1"])
    assert told.exit_code == 0, told.output
    lines = [line.split() for line in told.output.splitlines() if line.endswith("%")]
    assert [line[:2] for line in lines[:3]] == [["1", "1"], ["2", "1"], ["2", "2"]]
    assert len(lines) == 13


def test_rates_and_free_memory_are_those_of_a_machine() -> None:
    rate, bandwidth = measured_rates(torch.device("cpu"))
    assert 1e8 < rate < 1e15
    assert 1e8 < bandwidth < 1e14
    assert free_memory(torch.device("cpu")) > 1e7


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"n_items": 0}, "items must be at least 1; got 0"),
        ({"n_users": -1}, "users must be at least 1; got -1"),
        ({"devices": 4, "item_shards": 3}, "item_shards must divide the devices; got 3 and 4"),
        ({"events_per_user": float("nan")}, "events_per_user must be at least 0; got nan"),
        (
            {"config": dataclasses.replace(SMALL, recommender="awae"), "devices": 2},
            "aWAE compares the users of a batch, which 2 processes would share; train it in one",
        ),
    ],
)
def test_odd_sizes_are_refused(sizes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan(**{"n_items": 10, "n_users": 10, "config": SMALL, **sizes})
