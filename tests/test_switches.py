"""Switches of the loop and of stage 3, each against an independent statement of what it leaves out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from cfsfl_fast import CFSFL, CFSFLConfig, backends, checkpoint
from cfsfl_fast.datasets import Dataset, Protocol, split_events
from cfsfl_fast.datasets.matrices import matrix_events
from cfsfl_fast.runs import Run, table
from cfsfl_fast.training import Noise, joint_step, recommender_step, view
from tests.conftest import clusters
from tests.test_model import build, histories
from tests.test_training import QUICK, problem, run, same, weights_of

INPUTS = ("history", "list", "reward", "history,list", "history,reward", "list,reward")


def step(**choices: Any) -> tuple[Tensor, dict[str, Tensor], CFSFL]:
    """L_C of one batch and the gradient of every parameter that has one."""
    model, x, users, config = problem(**choices)
    loss, _ = joint_step(model, view(x, users, config, 5), Noise(users, 8, config.noise == "fresh", (5,)), 1)
    named = dict(model.named_parameters())
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return loss, {name: g for name, g in zip(named, found, strict=True) if g is not None}, model


@pytest.mark.parametrize("reading", ["heldout", "full"])
@pytest.mark.parametrize("noise", ["shared", "fresh"])
def test_loss_of_all_steps_is_the_mean_of_each(reading: str, noise: str) -> None:
    choices = {"reading": reading, "noise": noise, "reward_weight": 0.0}
    parts = [step(steps=t, **choices) for t in range(3)]
    loss, gradients, _ = step(steps=2, loss_steps="all", **choices)
    assert loss.item() == pytest.approx(sum(part.item() for part, _, _ in parts) / 3, rel=1e-6)
    for name, found in gradients.items():
        expected = sum(part.get(name, torch.zeros_like(found)) for _, part, _ in parts) / 3
        assert torch.allclose(found, expected, atol=1e-6), name
    assert loss.item() != pytest.approx(parts[2][0].item(), rel=1e-4)


@pytest.mark.parametrize("action", ["straight_through", "topk_softmax", "softmax"])
def test_without_gradient_through_time_the_feedback_is_given(action: str) -> None:
    choices = {"steps": 2, "action": action, "reward_weight": 0.0}
    loss, found, model = step(**choices, gradient_through_time=False)
    whole, through, _ = step(**choices)
    assert torch.equal(loss, whole)

    # By hand: the last feedback is a number to the recommender.
    _, x, users, config = problem(**choices)
    batch, eps = view(x, users, config, 5), Noise(users, 8, False, (5,))
    with torch.no_grad():
        feedback = (
            model.run_loop(batch.encoded, batch.weights, batch.seen, steps=2, exclude=batch.exclude, noise=eps)
            .turns[-1]
            .feedback
        )
    hoist = model.recommender.hoist
    model.recommender.hoist = lambda *rows: model.recommender.with_constant(hoist(*rows))  # type: ignore[attr-defined]
    unit = F.normalize(feedback, dim=1)
    model.recommender.with_constant = lambda h: h + unit @ model.recommender.input.feedback  # type: ignore[attr-defined]
    by_hand = recommender_step(model, batch, eps, 1)
    named = {n: p for n, p in model.named_parameters() if n.startswith("recommender.")}
    for (name, _), expected in zip(named.items(), torch.autograd.grad(by_hand, named.values()), strict=True):
        assert torch.allclose(found[name], expected, atol=1e-5), name
    assert not torch.allclose(found["recommender.input.weight"], through["recommender.input.weight"], atol=1e-6)
    # The virtual user learns, from the last feedback.
    assert bool(found["feedback.0.weight"].any())
    assert bool(found["lookup.weight"].any())
    assert not torch.allclose(found["feedback.0.weight"], through["feedback.0.weight"], atol=1e-7)


@pytest.mark.parametrize("inputs", INPUTS)
def test_the_generator_sees_what_it_may(inputs: str) -> None:
    """v^1 by hand, from the list and the reward of a model that sees everything."""
    model, x = build(), histories()
    seen = build(feedback_inputs=inputs).unroll(x, steps=1)
    trace = model.unroll(x, steps=1)
    assert torch.equal(seen.ids, trace.ids)
    assert torch.equal(seen.rewards, trace.rewards)
    table = model.lookup.weight
    dense = torch.from_numpy(x.toarray())
    h = torch.zeros(len(dense), table.shape[1])
    if "history" in inputs:
        h = h + dense @ table / dense.sum(1, keepdim=True).clamp_min(1)
    if "list" in inputs:
        listed = (trace.ids[0] >= 0).float()
        rows = table[trace.ids[0].clamp_min(0)] * listed[:, :, None]
        h = h + rows.sum(1) / listed.sum(1, keepdim=True).clamp_min(1)
    v = torch.cat([h, trace.rewards[0][:, None] * ("reward" in inputs)], 1)
    for i, layer in enumerate(model.feedback):
        v = layer(v) if i == 2 else F.relu(layer(v))
    assert torch.allclose(seen.feedback[0], v, atol=1e-5)
    assert not torch.allclose(seen.feedback[0], trace.feedback[0], atol=1e-3)


def test_order_of_the_inputs_does_not_matter() -> None:
    x = histories()
    assert torch.allclose(build(feedback_inputs="reward,list,history")(x), build()(x), atol=1e-6)


def test_feedback_of_the_history_alone_settles_at_once() -> None:
    model, x = build(feedback_inputs="history"), histories()
    assert torch.equal(model(x, steps=1), model(x, steps=5))
    assert not torch.equal(model(x, steps=0), model(x, steps=1))


@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("action", ["straight_through", "softmax"])
def test_backends_agree_on_what_the_generator_sees(inputs: str, action: str) -> None:
    model, x = build(feedback_inputs=inputs, action=action).double(), histories()
    target = torch.randn(x.shape[0], model.n_items, dtype=torch.float64)
    found = {}
    for backend in ("torch", "reference"):
        with backends.use_backend(backend):
            scores = model(x)
            gradients = torch.autograd.grad((scores * target).sum(), list(model.parameters()), allow_unused=True)
            found[backend] = [scores, *(torch.zeros(()) if g is None else g for g in gradients)]
    for one, other in zip(found["torch"], found["reference"], strict=True):
        assert torch.allclose(one, other, atol=1e-9)
    single = model.float()
    with backends.use_backend("reference"):
        expected = single(x)
    assert torch.allclose(single(x), expected, atol=1e-5)


@pytest.mark.parametrize("wrong", ["", "history,", "history,history", "v", "history, list"])
def test_unknown_inputs_are_refused(wrong: str) -> None:
    with pytest.raises(ValueError, match=f"feedback_inputs must be history,list,reward or .*; got '{wrong}'"):
        CFSFLConfig(feedback_inputs=wrong)


# Stage 3 without a loop


def test_stage_3_without_loop_and_reward_is_stage_1s_update() -> None:
    loss, gradients, model = step(steps=0, reward_weight=0.0)
    _, x, users, config = problem(steps=0)
    plain = recommender_step(model, view(x, users, config, 5), Noise(users, 8, False, (5,)), 1)
    named = {name: p for name, p in model.named_parameters() if name in gradients}
    assert torch.equal(loss, plain)
    for (name, _), expected in zip(named.items(), torch.autograd.grad(plain, named.values()), strict=True):
        assert torch.equal(gradients[name], expected), name


def test_the_recommender_with_reward_estimator(toy: Dataset, tmp_path: Path) -> None:
    trained = run(toy, tmp_path / "r", steps=0, joint="always")
    report = trained.train()
    assert trained.stages == ["recommender", "control", "reward", "joint"]
    assert list(report["test"]) == ["most popular", "VAE", "VAE, trained on", "VAE+R"]
    assert report["gain"]["of"] == "VAE+R"
    assert "VAE+R minus 'VAE, trained on'" in table(report)
    assert CFSFL.from_pretrained(tmp_path / "r").config.steps == 0
    plain = run(toy, tmp_path / "plain", steps=0, joint="always", reward_weight=0.0, control=False)
    plain.train()
    assert plain.stages == ["recommender", "joint"]
    lines = [json.loads(line) for line in (tmp_path / "plain" / "metrics.jsonl").read_text().splitlines()]
    assert "reward_loss" not in lines[-1]
    assert "reward_loss" in json.loads((tmp_path / "r" / "metrics.jsonl").read_text().splitlines()[-1])
    reward = [weights_of(tmp_path / "plain" / "stages" / s)["reward.0.weight"] for s in ("recommender", "joint")]
    assert torch.equal(*reward)
    assert not same(weights_of(tmp_path / "plain"), weights_of(tmp_path / "r"))
    assert run(toy, tmp_path / "auto", steps=0, epochs=(1, 1, 1)).stages == ["recommender"]


# A run from another's stage 1


LATER = {"top_k": 4, "reward_weight": 0.5, "joint_learning_rate": 1e-3, "feedback_inputs": "list,reward"}


def test_a_run_from_anothers_stage_1_is_the_run_it_would_have_been(toy: Dataset, tmp_path: Path) -> None:
    run(toy, tmp_path / "base", steps=0).train()
    config = CFSFLConfig(**{**QUICK, **LATER})
    Run(toy, tmp_path / "whole", config, show_progress=False).train()
    started = Run(toy, tmp_path / "started", config, start=tmp_path / "base", show_progress=False)
    assert started.progress["stage"] == "control"
    CFSFL.from_pretrained(tmp_path / "started")
    del started
    resumed = Run(toy, tmp_path / "started", config, start=tmp_path / "gone", resume=True, show_progress=False)
    report = resumed.train()
    for folder in (".", "stages/recommender", "stages/control", "stages/joint"):
        assert same(weights_of(tmp_path / "whole" / folder), weights_of(tmp_path / "started" / folder)), folder
    assert report == checkpoint.read_json(tmp_path / "whole" / "report.json")
    lines = [
        [{k: v for k, v in json.loads(line).items() if "second" not in k} for line in path.read_text().splitlines()]
        for path in (tmp_path / "whole" / "metrics.jsonl", tmp_path / "started" / "metrics.jsonl")
    ]
    assert lines[0] == lines[1]
    per_user = [np.load(tmp_path / name / "users.npz", allow_pickle=False) for name in ("whole", "started")]
    assert all(np.array_equal(per_user[0][key], per_user[1][key]) for key in per_user[0])


def test_another_kind_of_virtual_user_may_start_from_it_too(toy: Dataset, tmp_path: Path) -> None:
    run(toy, tmp_path / "base", steps=0).train()
    config = CFSFLConfig(**{**QUICK, "feedback": "scores"})
    report = Run(toy, tmp_path / "started", config, start=tmp_path / "base", show_progress=False).train()
    assert report == Run(toy, tmp_path / "whole", config, show_progress=False).train()


def test_what_a_run_may_not_start_from(toy: Dataset, tmp_path: Path) -> None:
    base = tmp_path / "base"
    run(toy, base, steps=0, anneal_steps=50).train()

    def start(data: Dataset = toy, source: Path = base, **choices: Any) -> None:
        config = CFSFLConfig(**{**QUICK, "anneal_steps": 50, **choices})
        Run(data, tmp_path / "new", config, start=source, show_progress=False)

    for choices, words in (
        ({"seed": 1}, "its seed = 0, not 1"),
        ({"learning_rate": 0.5}, "its learning_rate = 0.01, not 0.5"),
        ({"epochs": (4, 2, 2)}, "its epochs of stage 1 = 3, not 4"),
        ({"anneal_steps": "auto"}, "its anneal_steps = 50, not 85"),
    ):
        with pytest.raises(ValueError, match=f"cannot be started from: {words}"):
            start(**choices)
    other = split_events(matrix_events(clusters(seed=1), "clusters"), Protocol(held_out=20))
    with pytest.raises(ValueError, match="was trained on other data"):
        start(other)
    with pytest.raises(FileNotFoundError, match=r"gone.config.json is missing"):
        start(source=tmp_path / "gone")
    unfinished = run(toy, tmp_path / "unfinished", anneal_steps=50)
    state = tmp_path / "unfinished" / "training.safetensors"
    checkpoint.write_tensors(state, {}, {"progress": json.dumps(unfinished.progress)})
    with pytest.raises(ValueError, match="stage 1 is not finished, at epoch 0"):
        start(source=tmp_path / "unfinished")
    assert not (tmp_path / "new").exists()


def test_users_metrics_are_kept(toy: Dataset, tmp_path: Path) -> None:
    report = run(toy, tmp_path / "run").train()
    found = np.load(tmp_path / "run" / "users.npz", allow_pickle=False)
    assert len(found["users"]) == report["users"]
    assert set(found["users"]) <= set(np.asarray(toy.test.user_ids))
    for system, figures in report["test"].items():
        for metric, (value, error) in figures.items():
            values = found[f"{system}/{metric}"]
            assert (values.mean(), values.std(ddof=1) / len(values) ** 0.5) == pytest.approx((value, error))
    gain = found["CF-SFL/NDCG@100"] - found["VAE, trained on/NDCG@100"]
    assert gain.mean() == pytest.approx(report["gain"]["NDCG@100"][0])
