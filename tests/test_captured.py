"""Inference and training in the shapes of captured graphs give what they give without: on the CPU through the same code
without a capture, on a GPU replayed.
"""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from torch import Tensor

from cfsfl_fast import CFSFL, CFSFLConfig, graphs
from cfsfl_fast.datasets import Dataset
from cfsfl_fast.evaluation import evaluate
from cfsfl_fast.interactions import as_interactions
from cfsfl_fast.reference import ACTIONS
from cfsfl_fast.runs import Run
from cfsfl_fast.updates import Optimisers, run_epoch
from tests.conftest import clusters, stop_at
from tests.test_model import M, build, histories
from tests.test_training import QUICK, SIZES

CUDA = pytest.param("cuda", marks=[
    pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
])  # fmt: skip
DEVICES = pytest.mark.parametrize("device", ["cpu", CUDA])


def agree(found: Any, expected: Any, device: str) -> None:
    """The same bits on the CPU. On a GPU products of other shapes round otherwise, and where two items are nearly tied
    a user's list, and all that follows from it, may be another.
    """
    for one, other in zip(found, expected, strict=True):
        if device == "cpu":
            assert torch.equal(one, other)
            continue
        assert one.shape == other.shape
        close = torch.isclose(one, other, atol=1e-4, rtol=1e-4) if one.is_floating_point() else one == other
        assert one.numel() == 0 or float(close.double().mean()) > 0.98


def pair(device: str, **choices: object) -> tuple[CFSFL, CFSFL]:
    """A model with the shapes of graphs and one without."""
    return tuple(build(graphs=mode, **choices).to(device) for mode in (True, False))  # type: ignore[return-value]


# Inference


@DEVICES
@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("reading", ["heldout", "full"])
def test_lists_and_scores(action: str, reading: str, device: str) -> None:
    shaped, plain = pair(device, action=action, reading=reading)
    x = histories()
    others = sp.csr_matrix(1 - x.toarray())[::-1]
    for _ in range(graphs.WARM_UP + 2):
        with torch.no_grad():
            agree([shaped(x)], [plain(x)], device)
        for options in ({}, {"n": M + 3}, {"exclude_seen": False}, {"exclude": [3, 5, 7]}, {"exclude": others},
                        {"exclude": others, "exclude_seen": False}, {"steps": 1}, {"n": 0},
                        {"candidates": [50, 4, 9], "exclude": [9]}, {"batch_size": 7}):  # fmt: skip
            agree(shaped.recommend(x, **options), plain.recommend(x, **options), device)
    assert len(shaped.graphs) >= 7
    assert len(plain.graphs) == 0
    assert device == "cpu" or shaped.graphs.replays > 0


@DEVICES
def test_batches_of_any_size_share_shapes(device: str) -> None:
    shaped, plain = pair(device)
    x = histories(300)
    for n in (*range(1, 12), 32, 33, 63, 64, 65, 200, 300):
        agree(shaped.recommend(x[:n], 5), plain.recommend(x[:n], 5), device)
    assert len(shaped.graphs) <= 8  # five numbers of users, some with two capacities
    assert shaped.recommend(x[:0], 5)[0].shape == (0, 5)


@DEVICES
def test_what_changes_between_calls_is_seen(device: str) -> None:
    """Weights in place, other weights, T, K, training mode, copies, devices."""
    shaped, plain = pair(device)
    x = histories()

    def check() -> None:
        for _ in range(graphs.WARM_UP + 2):
            agree(shaped.recommend(x, 9), plain.recommend(x, 9), device)

    check()
    for model in (shaped, plain):
        with torch.no_grad():
            model.recommender.output.bias.copy_(torch.linspace(-3, 3, M))
    check()
    for model in (shaped, plain):
        model.load_state_dict({name: value + 0.01 for name, value in model.state_dict().items()})
        model.recommender.code.weight = torch.nn.Parameter(model.recommender.code.weight.detach() * 2)
    check()
    for choices in ({"steps": 1}, {"top_k": 3}, {"reading": "full"}):
        for model in (shaped, plain):
            model.config = dataclasses.replace(model.config, **choices)
        check()
    shaped.train()
    check()
    assert shaped.training
    shaped = copy.deepcopy(shaped)
    assert len(shaped.graphs) == 0
    check()
    shaped.to("cpu")
    assert len(shaped.graphs) == 0
    agree(shaped.recommend(x, 9), plain.to("cpu").recommend(x, 9), device)
    shaped.to(device)
    plain.to(device)
    check()


@DEVICES
def test_a_saved_model_comes_back(device: str, tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    shaped, plain = pair(device)
    shaped.save_pretrained(tmp_path / "model")
    again = CFSFL.from_pretrained(tmp_path / "model", device, graphs=True)
    for _ in range(graphs.WARM_UP + 2):
        agree(again.recommend(histories(), 9), plain.recommend(histories(), 9), device)


@DEVICES
def test_gradients_and_sampling_are_not_captured(device: str) -> None:
    shaped, plain = pair(device)
    x = histories()
    for model in (shaped, plain):
        model(x).square().sum().backward()
    agree([p.grad for p in shaped.parameters()], [p.grad for p in plain.parameters()], device)
    shaped.train()
    with torch.no_grad():
        assert not torch.equal(shaped(x), shaped(x))
    assert len(shaped.graphs) == 0


@DEVICES
def test_evaluation(device: str, toy: Dataset) -> None:
    shaped, plain = (CFSFL(toy.n_items, **SIZES, graphs=mode).to(device).eval() for mode in (True, False))
    plain.load_state_dict(shaped.state_dict())
    fold_in, targets = (sp.vstack([rows] * 9) for rows in (toy.test.fold_in, toy.test.targets))
    found = [evaluate(m.recommend, fold_in, targets, device=device, batch_size=64) for m in (shaped, plain)]
    assert len(found[0].ndcg100) > 100
    agree([found[0].ndcg100], [found[1].ndcg100], device)


# Training

STAGES = ("recommender", "reward", "joint")


def epochs(device: str, n_users: int, mode: str | bool, n: int = 3, **choices: Any) -> tuple[list[Tensor], Any]:
    """Every weight and moment after some epochs of every stage, and the figures of the epochs."""
    config = CFSFLConfig(**{**SIZES, "batch_size": 16, "anneal_steps": 100, **choices})
    torch.manual_seed(0)
    model = CFSFL.from_config(40, config, graphs=mode)
    torch.nn.init.normal_(model.recommender.input.feedback)
    model.to(device)
    x = as_interactions(clusters(n_users), 40, device)
    figures, step = [], 0
    state: list[Tensor] = []
    for stage in STAGES:
        optimisers = Optimisers(model, stage)
        for epoch in range(n):
            order = torch.from_numpy(np.random.default_rng(epoch).permutation(n_users)).to(device)
            ticks = []
            sums, step = run_epoch(
                model, x, optimisers, stage, order, (1, epoch), step, lambda n, loss, t=ticks: t.append((n, loss()))
            )
            assert sum(users for users, _ in ticks) == n_users
            total = sums.reward_loss if stage == "reward" else sums.loss
            assert float(total) == pytest.approx(sum(users * loss for users, loss in ticks), rel=1e-5)
            figures.append((*(float(s) for s in sums), step, ticks[-1][1]))
        state += optimisers.state().values()
        if mode is True and device == "cuda":
            assert optimisers.updates is not None
            assert (optimisers.updates.graphs.replays > 0) == (n * n_users > 16 * graphs.WARM_UP)
    return [*model.state_dict().values(), *state], figures


@DEVICES
@pytest.mark.parametrize("choices", [
    {}, {"reading": "full", "noise": "fresh", "kl": "annealed"}, {"reward_batch": "fresh"},
    {"action": "softmax", "mask_kept": False}, {"action": "topk_softmax", "reward_loss": "literal"},
    {"loss_steps": "all"},
])  # fmt: skip
def test_updates(choices: dict[str, Any], device: str) -> None:
    """A number of users that batches divide: every product has the shape that it has without graphs."""
    found, plain = (epochs(device, 48, mode, **choices) for mode in (True, False))
    agree(found[0], plain[0], device)
    for one, other in zip(found[1], plain[1], strict=True):
        assert one == pytest.approx(other, rel=1e-4)


@DEVICES
def test_nobody_in_the_last_batch_changes_nothing(device: str) -> None:
    found, plain = (epochs(device, 41, mode, n=1) for mode in (True, False))
    for one, other in zip(found[0], plain[0], strict=True):
        # Adam's first steps are nearly lr * sign: entries whose gradient is rounding alone may go either way.
        close = torch.isclose(one, other, atol=2e-4, rtol=1e-3)
        assert float(close.double().mean()) > 0.99
    for one, other in zip(found[1], plain[1], strict=True):
        assert one == pytest.approx(other, rel=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("reward_batch", ["shared", "fresh"])
def test_a_replayed_update_has_the_bits_of_one_that_is_not(reward_batch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    replayed = epochs("cuda", 41, True, reward_batch=reward_batch)
    again = epochs("cuda", 41, True, reward_batch=reward_batch)
    monkeypatch.setattr(graphs, "WARM_UP", 1 << 30)
    eager = epochs("cuda", 41, True, reward_batch=reward_batch)
    for other in (again, eager):
        assert all(torch.equal(a, b) for a, b in zip(replayed[0], other[0], strict=True))
        assert replayed[1] == other[1]


def test_a_run_in_fixed_shapes_resumes(toy: Dataset, tmp_path: Path) -> None:
    config = CFSFLConfig(**QUICK)

    def run(folder: str, **more: Any) -> dict[str, Any]:
        return Run(toy, tmp_path / folder, config, show_progress=False, graphs=True, **more).train()

    whole = run("whole")
    stop_at(Run(toy, tmp_path / "stopped", config, show_progress=False, graphs=True), 4)
    assert run("stopped", resume=True)["test"] == whole["test"]
