"""Algorithm 1: each loss against its statement, a known answer, repeating, resuming after a real kill."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from cfsfl_fast import CFSFL, CFSFLConfig, checkpoint, losses
from cfsfl_fast.datasets import Dataset, Protocol, split_events
from cfsfl_fast.datasets.matrices import matrix_events
from cfsfl_fast.interactions import as_interactions
from cfsfl_fast.runs import Run, table
from cfsfl_fast.training import Noise, joint_step, recommender_step, reward_step, view
from cfsfl_fast.updates import Optimisers, update
from tests.conftest import ROOT, clusters

SIZES = {"steps": 2, "top_k": 6, "hidden_dim": 24, "latent_dim": 8, "lookup_dim": 8, "feedback_dim": 8}
QUICK = {**SIZES, "batch_size": 32, "epochs": (3, 2, 2), "learning_rate": 1e-2, "joint_learning_rate": 3e-3}


def problem(**choices: Any) -> tuple[CFSFL, Any, Tensor, CFSFLConfig]:
    """A model with feedback that matters, and histories of 30 users."""
    config = CFSFLConfig(**{**SIZES, "batch_size": 30, "anneal_steps": 100, **choices})
    torch.manual_seed(0)
    model = CFSFL.from_config(40, config)
    torch.nn.init.normal_(model.recommender.input.feedback)
    users = torch.arange(7, 37)
    return model, as_interactions(clusters(37), 40).take(users), users, config


# The losses


def dense(x: Any) -> Tensor:
    rows = torch.zeros(len(x), x.n_items)
    rows[x.rows, x.items] = 1
    return rows


@pytest.mark.parametrize("reading", ["heldout", "full"])
@pytest.mark.parametrize("mask_kept", [True, False])
@pytest.mark.parametrize("kl", ["per_user", "annealed"])
def test_supervised_loss_is_the_elbo(reading: str, mask_kept: bool, kl: str) -> None:
    model, x, users, config = problem(reading=reading, mask_kept=mask_kept, kl=kl)
    batch, eps = view(x, users, config, 5), Noise(users, 8, False, (5,))
    found = recommender_step(model, batch, eps, step=7)

    kept = dense(batch.seen) if reading == "heldout" else None
    encoder = torch.zeros(30, 40)
    encoder[batch.encoded.rows, batch.encoded.items] = batch.weights
    r = model.recommender
    p = torch.tanh(encoder @ r.input.weight + r.input.bias)
    mu, logvar = F.linear(p, r.code.weight, r.code.bias).split(8, 1)
    u = torch.tanh(r.hidden(mu + eps(0) * torch.exp(logvar / 2)))
    s = F.linear(u, r.output.weight, r.output.bias)
    targets = dense(batch.targets)
    if kept is not None and mask_kept:
        s = s.masked_fill(kept > 0, -1e30)
    divergence = torch.distributions.kl_divergence(
        torch.distributions.Normal(mu, torch.exp(logvar / 2)), torch.distributions.Normal(0.0, 1.0)
    ).sum(1)
    weight = 0.0025 * 7 / 100 / 0.2 * dense(x).sum(1) if kl == "per_user" else 7 / 100
    expected = (-(F.log_softmax(s, 1) * targets).sum(1) + weight * divergence).mean()
    assert float(found) == pytest.approx(float(expected), rel=1e-5)


def test_the_readings_split_a_history_as_they_say() -> None:
    _, x, users, config = problem(reading="heldout")
    batch = view(x, users, config, 1)
    assert torch.equal(dense(batch.seen) + dense(batch.targets), dense(x))
    assert 0.35 < len(batch.seen.items) / len(x.items) < 0.65
    assert batch.mask is batch.exclude
    paper = view(x, users, dataclasses.replace(config, reading="full"), 1)
    assert torch.equal(dense(paper.seen), dense(x))
    assert torch.equal(dense(paper.targets), dense(x))
    assert paper.mask is paper.exclude is None
    # The same items are hidden from the encoder, at inverted dropout's weights.
    shown = torch.zeros(30, 40)
    shown[paper.encoded.rows, paper.encoded.items] = paper.weights
    assert torch.equal(shown > 0, dense(batch.seen) > 0)
    norm = dense(x).sum(1).sqrt()[x.rows]
    assert torch.allclose(shown[x.rows, x.items], (dense(batch.seen)[x.rows, x.items]) / norm * 2)


def test_a_users_dropout_and_noise_do_not_depend_on_the_batch() -> None:
    _, x, users, config = problem()
    some = torch.tensor([3, 11, 4])
    alone = view(x.take(some), users[some], config, 9)
    assert torch.equal(dense(alone.seen), dense(view(x, users, config, 9).seen)[some])
    whole, part = Noise(users, 8, True, (9,)), Noise(users[some], 8, True, (9,))
    assert torch.equal(whole(2)[some], part(2))
    assert not torch.equal(whole(1), whole(2))
    assert torch.equal(Noise(users, 8, False, (9,))(1), Noise(users, 8, False, (9,))(2))


@pytest.mark.parametrize("action", ["straight_through", "topk_softmax", "softmax"])
@pytest.mark.parametrize("reading", ["heldout", "full"])
def test_the_adversarial_term_moves_the_recommender_alone(action: str, reading: str) -> None:
    gradients = []
    for weight in (0.0, 3.0):
        model, x, users, config = problem(reward_weight=weight, action=action, reading=reading)
        loss, lists = joint_step(model, view(x, users, config, 5), Noise(users, 8, False, (5,)), 1)
        named = dict(model.named_parameters())
        wanted = [n for n in named if not n.startswith("reward.")]
        found = torch.autograd.grad(loss, [named[n] for n in wanted], allow_unused=True)
        gradients.append((float(loss), dict(zip(wanted, found, strict=True)), lists))
    (plain, without, lists), (more, with_it, _) = gradients
    batch = view(x, users, config, 5)
    expected = losses.adversarial(torch.logit(_rewards(model, batch, lists, action)), batch.share)
    if action == "straight_through":
        assert more - plain == pytest.approx(3 * float(expected), rel=1e-4)
    assert not torch.allclose(without["recommender.output.weight"], with_it["recommender.output.weight"], atol=1e-8)
    # The table's gradient comes through the loop alone: what the term adds, it adds through the feedback before it.
    model, x, users, config = problem(reward_weight=3.0, action=action, reading=reading, steps=0)
    loss, _ = joint_step(model, view(x, users, config, 5), Noise(users, 8, False, (5,)), 1)
    dlookup, dphi = torch.autograd.grad(loss, [model.lookup.weight, model.reward[0].weight], allow_unused=True)
    assert dlookup is None or not bool(dlookup.any())
    assert dphi is None or not bool(dphi.any())


def _rewards(model: CFSFL, batch: Any, lists: Any, action: str) -> Tensor:
    seen = dense(batch.seen)
    h = seen @ model.lookup.weight / seen.sum(1, keepdim=True).clamp_min(1) + model.lookup.weight[lists.ids].mean(1)
    for i, layer in enumerate(model.reward):
        h = layer(h) if i == 3 else F.relu(layer(h))
    return torch.sigmoid(h).squeeze(1)


@pytest.mark.parametrize("reading", ["heldout", "full"])
def test_reward_loss_tells_the_experts_list_from_the_recommended(reading: str) -> None:
    model, x, users, config = problem(reading=reading)
    batch = view(x, users, config, 5)
    _, lists = joint_step(model, batch, Noise(users, 8, False, (5,)), 1)
    loss, real, fake = reward_step(model, batch, lists)
    targets = dense(batch.targets)
    has = targets.sum(1) > 0
    expert = _of(model, dense(batch.seen), targets)[has]
    shown = _of(model, dense(batch.seen), F.one_hot(lists.ids, 40).sum(1).float())
    assert float(loss) == pytest.approx(float(-(expert.log().mean() + (1 - shown).log().mean())), rel=1e-5)
    assert (float(real), float(fake)) == pytest.approx((float(expert.mean()), float(shown.mean())), rel=1e-5)
    dlookup, dphi, dtheta = torch.autograd.grad(
        loss, [model.lookup.weight, model.reward[0].weight, model.recommender.output.weight], allow_unused=True
    )
    assert bool(dlookup.any())
    assert bool(dphi.any())
    assert dtheta is None


def _of(model: CFSFL, seen: Tensor, listed: Tensor) -> Tensor:
    """Rewards of dense lists."""
    table = model.lookup.weight
    h = seen @ table / seen.sum(1, keepdim=True).clamp_min(1) + listed @ table / listed.sum(1, keepdim=True).clamp_min(
        1
    )
    for i, layer in enumerate(model.reward):
        h = layer(h) if i == 3 else F.relu(layer(h))
    return torch.sigmoid(h).squeeze(1)


def test_the_literal_reward_loss_is_minus_equation_8() -> None:
    real, fake = torch.randn(9), torch.randn(9)
    r, f = real.sigmoid(), fake.sigmoid()
    printed = -f.log().mean() - (1 - r.log()).mean()
    share = losses.shares(torch.ones(9, dtype=torch.bool))
    found = losses.reward_loss(real, fake, "literal", share, share)
    assert float(found) == pytest.approx(-float(printed), rel=1e-5)


def test_means_leave_nobody_out() -> None:
    counted = torch.tensor([True, False, True])
    assert losses.shares(counted).tolist() == [0.5, 0, 0.5]
    assert float(losses.mean(torch.tensor([1.0, 9.0, 4.0]), losses.shares(counted))) == 2.5
    assert float(losses.mean(torch.ones(3), losses.shares(torch.zeros(3, dtype=torch.bool)))) == 0


def test_beta_rises_to_its_cap() -> None:
    steps = (0, 10, 20, 50)
    assert [losses.annealed_beta(step, 100, 0.2) for step in steps] == [0, 0.1, 0.2, 0.2]
    on_device = [float(losses.annealed_beta(torch.tensor(step), 100, 0.2)) for step in steps]
    assert on_device == pytest.approx([0, 0.1, 0.2, 0.2])


def test_an_update_is_adam_on_the_penalised_loss() -> None:
    model, x, users, config = problem()
    twin = problem()[0]
    loss = recommender_step(model, view(x, users, config, 5), Noise(users, 8, False, (5,)), 1)
    update(Optimisers(model, "recommender").main, loss)

    named = {n: p for n, p in twin.named_parameters() if n.startswith("recommender.") and "feedback" not in n}
    loss = recommender_step(twin, view(x, users, config, 5), Noise(users, 8, False, (5,)), 1)
    penalty = sum(p.square().sum() for p in named.values() if p.dim() == 2) * float(config.l2) / config.batch_size
    adam = torch.optim.Adam(named.values(), lr=config.learning_rate)
    (loss + penalty).backward()
    adam.step()
    for (name, found), expected in zip(model.named_parameters(), twin.parameters(), strict=True):
        # Adam's first step is lr * sign: entries whose gradient is rounding alone may go either way.
        close = torch.isclose(found, expected, atol=2e-5)
        assert float(close.double().mean()) > 0.999, name
    assert all(p.grad is None for p in model.parameters())


# Runs


def run(data: Dataset, out: Path, **choices: Any) -> Run:
    return Run(data, out, CFSFLConfig(**{**QUICK, **choices}), show_progress=False)


def weights_of(folder: Path) -> dict[str, Tensor]:
    return checkpoint.read_tensors(folder / checkpoint.MODEL)[0]


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def test_training_finds_the_clusters(tmp_path: Path) -> None:
    data = split_events(matrix_events(clusters(400), "clusters"), Protocol(held_out=40))
    report = run(data, tmp_path / "run", epochs=(20, 2, 4)).train()
    popular, plain, control, looped = (found["Recall@20"][0] for found in report["test"].values())
    assert popular < 0.7
    assert min(plain, control, looped) > 0.99
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["stage"] for line in lines].count("joint") == 5
    assert lines[-1]["expert_reward"] > 0
    assert "CF-SFL minus" in table(report)


def test_the_same_seed_gives_the_same_bits(toy: Dataset, tmp_path: Path) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        run(toy, tmp_path / name, seed=seed).train()
    assert same(weights_of(tmp_path / "a"), weights_of(tmp_path / "b"))
    assert not same(weights_of(tmp_path / "a"), weights_of(tmp_path / "c"))


@pytest.mark.parametrize(
    "choices", [{"noise": "fresh"}, {"reward_batch": "fresh"}, {"action": "softmax"}, {"steps": 0}]
)
def test_choices_train(toy: Dataset, tmp_path: Path, choices: dict) -> None:
    report = run(toy, tmp_path / "run", **choices).train()
    assert ("CF-SFL" in report["test"]) == (choices.get("steps") != 0)
    model = CFSFL.from_pretrained(tmp_path / "run")
    assert model.config.steps == choices.get("steps", 2)


def test_the_paper_preset_trains(toy: Dataset, tmp_path: Path) -> None:
    config = CFSFLConfig.preset("paper", **{**QUICK, "batch_size": 32})
    assert Run(toy, tmp_path / "run", config, show_progress=False).train()["steps"] == 2


def test_the_best_epoch_is_kept(toy: Dataset, tmp_path: Path) -> None:
    trained = run(toy, tmp_path / "run", epochs=(6, 1, 3), learning_rate=0.05)
    report = trained.train()
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    for stage, folder in (("recommender", "stages/recommender"), ("joint", ".")):
        scores = {line["epoch"]: line["validation"]["NDCG@100"] for line in lines if line["stage"] == stage}
        best = max(scores, key=lambda epoch: (scores[epoch], -epoch))
        assert report["best_epochs"][stage] == best
        model = CFSFL.from_pretrained(tmp_path / "run" / folder)
        held_out = toy.validation
        trained.model.load_state_dict(model.state_dict())
        steps = trained.config.steps if stage == "joint" else 0
        assert trained.judge(held_out, steps, None).summary()["NDCG@100"].value == scores[best]


def test_a_stage_ends_when_nothing_gets_better(toy: Dataset, tmp_path: Path) -> None:
    report = run(toy, tmp_path / "run", steps=0, epochs=(50, 0, 0), patience=3, learning_rate=0.0).train()
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert report["best_epochs"]["recommender"] == 0
    assert len(lines) == 1 + 3


def test_a_loss_that_is_nan_stops_the_run_and_loses_nothing(toy: Dataset, tmp_path: Path) -> None:
    trained = run(toy, tmp_path / "run")
    epoch = trained._epoch

    def poisoned(stage: str, number: int, n_epochs: int) -> dict[str, float]:
        if number == 3:
            with torch.no_grad():
                trained.model.recommender.hidden.weight.fill_(math.nan)
        return epoch(stage, number, n_epochs)

    trained._epoch = poisoned  # type: ignore[method-assign]
    with pytest.raises(FloatingPointError, match="loss is nan in epoch 3 of stage 'recommender'"):
        trained.train()
    CFSFL.from_pretrained(tmp_path / "run" / "stages" / "recommender")
    resumed = Run(toy, tmp_path / "run", CFSFLConfig(**QUICK), resume=True, show_progress=False)
    resumed.train()
    run(toy, tmp_path / "whole").train()
    assert same(weights_of(tmp_path / "run"), weights_of(tmp_path / "whole"))


def test_a_run_is_not_overwritten_nor_mixed_with_another(toy: Dataset, tmp_path: Path) -> None:
    run(toy, tmp_path / "run").train()
    with pytest.raises(FileExistsError, match="holds a run already"):
        run(toy, tmp_path / "run")
    with pytest.raises(ValueError, match="started with top_k = 6, not 9"):
        Run(toy, tmp_path / "run", CFSFLConfig(**{**QUICK, "top_k": 9}), resume=True)
    other = split_events(matrix_events(clusters(seed=1), "clusters"), Protocol(held_out=20))
    with pytest.raises(ValueError, match="was trained on other data"):
        Run(other, tmp_path / "run", CFSFLConfig(**QUICK), resume=True)
    again = Run(toy, tmp_path / "run", CFSFLConfig(**QUICK), resume=True, show_progress=False)
    assert again.train() == json.loads((tmp_path / "run" / "report.json").read_text())


def command(data: Path, out: Path) -> list[str]:
    options = [f"--{name.replace('_', '-')}={value}" for name, value in QUICK.items() if name != "epochs"]
    return [sys.executable, "-m", "cfsfl_fast", "train", str(data), f"--out={out}", "--epochs=3,2,2", *options]


def test_killed_and_resumed_equals_never_killed(toy: Dataset, toy_folder: Path, tmp_path: Path) -> None:
    run(toy, tmp_path / "whole").train()
    out = tmp_path / "killed"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    metrics = out / "metrics.jsonl"
    for n_lines in (2, 6, 10):  # in stage 1, in the control, in stage 3
        resume = ["--resume"] if out.exists() else []
        process = subprocess.Popen([*command(toy_folder, out), *resume], env=environment, stderr=subprocess.PIPE)
        patience = time.monotonic() + 120
        while not (metrics.exists() and len(metrics.read_bytes().splitlines()) >= n_lines):
            assert process.poll() is None, process.stderr and process.stderr.read()
            assert time.monotonic() < patience
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
    resumed = subprocess.run([*command(toy_folder, out), "--resume"], env=environment, capture_output=True, check=True)
    assert b"CF-SFL" in resumed.stdout
    for folder in (".", "stages/recommender", "stages/control", "stages/reward", "stages/joint"):
        assert same(weights_of(tmp_path / "whole" / folder), weights_of(out / folder)), folder
    dropped = ("seconds", "users_per_second")
    lines = [
        [
            {k: v for k, v in json.loads(line).items() if k not in dropped}
            for line in (folder / "metrics.jsonl").read_text().splitlines()
        ]
        for folder in (tmp_path / "whole", out)
    ]
    assert lines[0] == lines[1]
    assert not [path for path in out.rglob(".*")], "a staged file was left behind"


def test_order_of_users_differs_between_epochs() -> None:
    orders = [np.random.default_rng([0, 0, epoch]).permutation(50).tolist() for epoch in (1, 2)]
    assert orders[0] != orders[1]


def test_what_a_kill_left_half_written_is_removed(toy: Dataset, tmp_path: Path) -> None:
    run(toy, tmp_path / "run").train()
    for name in ("metrics.jsonl", "training.safetensors", "stages/joint/model.safetensors", "report.json"):
        path = tmp_path / "run" / name
        left = path.with_name(f".{path.name}.partial-1")
        left.mkdir()
        (left / path.name).write_bytes(b"half")
    Run(toy, tmp_path / "run", CFSFLConfig(**QUICK), resume=True, show_progress=False)
    assert not list((tmp_path / "run").rglob(".*"))
