"""What `cfsfl plan` says: against what was allocated, and against what cannot fit."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from cfsfl_fast import CFSFLConfig, runs
from cfsfl_fast.cli import main
from cfsfl_fast.datasets import Dataset
from cfsfl_fast.plan import PROCESS, measured_rates, plan
from cfsfl_fast.scarcity import free_memory
from cfsfl_fast.stages import fresh_model
from cfsfl_fast.training import Optimisers
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
    ],
)
def test_odd_sizes_are_refused(sizes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan(**{"n_items": 10, "n_users": 10, "config": SMALL, **sizes})
