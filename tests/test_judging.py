"""The virtual user's answer in scores: judged pages, what training sees of its users, and folders of such models."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from cfsfl_fast import CFSFL, CFSFLConfig, CFSFLRecommender, checkpoint, judging
from cfsfl_fast.datasets import Dataset
from cfsfl_fast.evaluation import evaluate
from cfsfl_fast.export import exported
from cfsfl_fast.folds import Folds, parts
from cfsfl_fast.interactions import Interactions, as_interactions
from cfsfl_fast.runs import Run
from cfsfl_fast.training import item_reward_step, prepare_item_reward, shown
from cfsfl_fast.virtual_user import weights
from tests.conftest import clusters

M, K, T = 40, 6, 2
SIZES = {"top_k": K, "steps": T, "hidden_dim": 24, "latent_dim": 8, "lookup_dim": 8, "feedback_dim": 8}
QUICK = {**SIZES, "batch_size": 32, "epochs": (3, 6, 0), "learning_rate": 1e-2}


def rows(n: int = 30) -> Interactions:
    return as_interactions(clusters(n + 7), M).take(torch.arange(7, n + 7))


def build(**choices: Any) -> CFSFL:
    """A model that has looked at its users, with an item reward of random weights."""
    torch.manual_seed(1)
    model = CFSFL.from_config(M, CFSFLConfig.preset("best", **{**SIZES, **choices})).eval()
    assert model.memory is not None
    x = as_interactions(clusters(), M)
    model.memory.fit(x, model.config.memory_ridge)
    model.memory.weight.fill_(5.0)
    prepare_item_reward(model, strangers(len(x)), x)
    return model


def strangers(n: int) -> Folds:
    """Two recommenders with random weights that are large enough to matter."""
    torch.manual_seed(2)
    models = [plain_model(CFSFLConfig.preset("best", **SIZES)) for _ in range(2)]
    return Folds(models, parts(n, 2, 3))


def plain_model(config: CFSFLConfig) -> CFSFL:
    model = CFSFL.from_config(M, dataclasses.replace(config, feedback="embedding")).eval()
    model.recommender.output.weight.data *= 3
    return model


@torch.no_grad()
def test_no_step_is_the_recommender_and_the_memory() -> None:
    model, x = build(), rows()
    s = CFSFL.forward(_without_memory(model), x, steps=0)
    expected = s + 5 * model.memory.scores(x)[0] + judging.closed(x)
    assert torch.equal(model(x, steps=0), expected)
    ids, scores = model.recommend(x, 7, steps=0)
    best = expected.sort(dim=1, descending=True, stable=True)
    assert torch.equal(ids, best.indices[:, :7])
    assert torch.equal(scores, best.values[:, :7])


def _without_memory(model: CFSFL) -> CFSFL:
    plain = CFSFL.from_config(M, dataclasses.replace(model.config, feedback="embedding")).eval()
    plain.recommender.load_state_dict(model.recommender.state_dict())
    return plain


@torch.no_grad()
def test_judged_items_come_first_by_reward_and_the_others_keep_their_order() -> None:
    model, x = build(), rows()
    before, _ = model.recommend(x, M, steps=0)
    after, scores = model.recommend(x, M)
    trace = model.unroll(x)
    for b in range(len(x)):
        page = before[b, : T * K]
        assert torch.equal(trace.ids[:, b].flatten(), page)
        g = dict(zip(page.tolist(), trace.feedback[:, b].flatten().tolist(), strict=True))
        s = _without_memory(model)(x, steps=0)[b]
        reward = {j: g[j] + 0.3 * float(s[j]) for j in g}
        assert set(after[b, : T * K].tolist()) == set(page.tolist())
        torch.testing.assert_close(scores[b, : T * K], torch.tensor([reward[j] for j in after[b, : T * K].tolist()]))
        assert torch.equal(after[b, T * K :], before[b, T * K :])
        kept = scores[b, scores[b] > judging.NO_SCORE]
        assert bool((kept.diff() <= 1e-6).all())
    torch.testing.assert_close(trace.rewards, trace.feedback.sigmoid().mean(2))
    assert not torch.equal(before, after)


def test_batches_candidates_and_exclusions() -> None:
    model, x = build(), rows()
    ids, scores = model.recommend(x, 20)
    for b in (0, 3, 29):
        alone = model.recommend(x.take(torch.tensor([b])), 20)
        assert torch.equal(alone[0][0], ids[b])
        assert torch.equal(alone[1][0], scores[b])
    some = model.recommend(x, 20, batch_size=7)
    assert torch.equal(some[0], ids)
    assert torch.equal(some[1], scores)
    allowed = [1, 2, 3, 5, 8, 13, 21, 34]
    listed, values = model.recommend(x, 20, candidates=allowed, exclude=[5], exclude_seen=False)
    assert set(listed.unique().tolist()) == set(allowed) - {5} | {-1}
    assert listed.shape == values.shape == (30, 20)
    assert bool((values[:, 7:] == judging.NO_SCORE).all())
    own = model.recommend(x, M, exclude_seen=False)[0]
    assert bool((own.sort(1).values == torch.arange(M)).all())
    nobody = model.recommend(np.zeros((2, M)), 5)
    assert bool(nobody[1].isfinite().all())
    assert model.recommend(np.zeros((0, M)), 5)[0].shape == (0, 5)


def test_more_steps_than_items_end_the_pages() -> None:
    model, x = build(), rows(3)
    trace = model.unroll(x, steps=9)
    assert trace.ids.shape == (9, 3, K)
    for b in range(3):
        listed = trace.ids[:, b].flatten()
        assert sorted(listed[listed >= 0].tolist() + x.take(torch.tensor([b])).items.tolist()) == list(range(M))
    assert bool(trace.rewards.isfinite().all())


def test_the_shapes_of_graphs_give_the_same_answers() -> None:
    model, x = build(), rows()
    other = CFSFL.from_config(M, model.config, graphs=True).eval()
    other.load_state_dict(model.state_dict())
    other.restore_memory(model.memory.tensors())
    for one, two in zip(model.recommend(x, 20), other.recommend(x, 20), strict=True):
        assert torch.equal(one, two)


def test_a_step_without_a_memory_is_refused() -> None:
    model = CFSFL.from_config(M, CFSFLConfig.preset("best", **SIZES)).eval()
    with pytest.raises(ValueError, match="2 steps need an item memory"):
        model.recommend(rows(), 5)
    assert model.recommend(rows(), 5, steps=0)[0].shape == (30, 5)


# Learning


def test_the_reward_learns_from_what_was_hidden_of_users_who_are_left_out() -> None:
    model, whole, users = build(), rows(), torch.arange(30)
    folds = strangers(30)
    loss, real, others = item_reward_step(model, folds, whole, users, (5, 6))
    kept, targets = shown(whole, users, 5, 6)
    share = len(kept.items) / len(whole.items)
    assert 0.7 < share < 0.9
    assert len(kept.items) + len(targets.items) == len(whole.items)
    s = torch.stack([folds.models[folds.part[b]](kept, steps=0)[b] for b in range(30)])
    scores = s + 5 * model.memory.scores(kept, whole)[0]
    losses, rewards = [], {True: [], False: []}
    for b in range(30):
        mine = kept.take(torch.tensor([b])).items
        hidden = set(targets.take(torch.tensor([b])).items.tolist())
        order = [j for j in scores[b].sort(descending=True, stable=True).indices.tolist() if j not in mine][: T * K]
        if not hidden & set(order):
            continue
        only = Interactions(mine, torch.tensor([0, len(mine)]), M)
        them = model.memory.scores(only, whole.take(torch.tensor([b])))[1]
        evidence = model.memory.evidence(only, torch.tensor([order]), s[b, order][None], K, them)
        g = judging.judged(model.memory, weights(model.reward), evidence)[0]
        y = torch.tensor([float(j in hidden) for j in order])
        losses.append(F.binary_cross_entropy_with_logits(g, y, reduction="none"))
        for j, value in zip(order, g.sigmoid().tolist(), strict=True):
            rewards[j in hidden].append(value)
    torch.testing.assert_close(loss, torch.cat(losses).mean())
    torch.testing.assert_close(real, torch.tensor(np.mean(rewards[True]), dtype=torch.float32))
    torch.testing.assert_close(others, torch.tensor(np.mean(rewards[False]), dtype=torch.float32))
    loss.backward()
    changed = {name for name, p in model.named_parameters() if p.grad is not None}
    assert changed == {name for name, _ in model.named_parameters() if name.startswith("reward.")}


def test_gradients_of_the_reward() -> None:
    model, whole = build(), rows(8)
    kept, targets = shown(whole, torch.arange(8), 1)
    scores = strangers(8).scores(kept, torch.arange(8))
    ids, evidence = judging.lists(model.memory, scores, kept, whole, T, K)
    memory = model.memory.double()
    flat = [t.detach().double().requires_grad_() for layer in weights(model.reward) for t in layer]

    def loss(*flat: torch.Tensor) -> torch.Tensor:
        layers = list(zip(flat[::2], flat[1::2], strict=True))
        return judging.reward_loss(memory, layers, ids, evidence.double(), targets)[0]

    assert torch.autograd.gradcheck(loss, flat, fast_mode=True)


def test_evidence_is_standardised_on_training_users() -> None:
    model = build()
    x = as_interactions(clusters(), M)
    everyone = torch.arange(len(x))
    kept, _ = shown(x, everyone, model.config.seed)
    ids, evidence = judging.lists(model.memory, strangers(len(x)).scores(kept, everyone), kept, x, T, K)
    seen = (evidence[ids >= 0] - model.memory.centre) / model.memory.spread
    torch.testing.assert_close(seen.mean(0), torch.zeros(19), atol=1e-3, rtol=0)
    # columns that do not vary stay 0
    assert bool(((seen.std(0) - 1).abs() < 1e-2).logical_or(seen.std(0) < 1e-2).all())


# Runs and folders


def test_a_run_learns_resumes_and_reports(toy: Dataset, tmp_path: Path) -> None:
    config = CFSFLConfig.preset("best", **QUICK)
    whole = Run(toy, tmp_path / "whole", config, show_progress=False)
    report = whole.train()
    assert list(report["test"]) == ["most popular", "RecVAE", "RecVAE + memory", "CF-SFL, scores"]
    assert report["gain"]["over"] == "RecVAE + memory"
    plain = CFSFL.from_pretrained(tmp_path / "whole" / "stages" / "recommender")  # a folder without a memory
    alone = evaluate(plain.recommend, toy.test.fold_in, toy.test.targets).summary()
    assert report["test"]["RecVAE"] == {name: list(found) for name, found in alone.items()}
    assert report["test"]["CF-SFL, scores"]["NDCG@100"][0] > 2 * report["test"]["most popular"]["NDCG@100"][0]
    lines = [line for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines() if '"reward"' in line]
    assert len(lines) == 7

    class Stopped(Exception):  # noqa: N818
        pass

    class Interrupted(Run):
        stop_after = 2

        def save_state(self) -> None:
            super().save_state()
            if self.progress["stage"] == "reward" and self.progress["epoch"] == self.stop_after:
                raise Stopped

    with pytest.raises(Stopped):
        Interrupted(toy, tmp_path / "stopped", config, show_progress=False).train()
    again = Run(toy, tmp_path / "stopped", config, resume=True, show_progress=False)
    assert again.train() == report
    for name in (checkpoint.MODEL, checkpoint.MEMORY):
        assert (tmp_path / "stopped" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    (tmp_path / "stopped" / "report.json").unlink()  # killed while reporting
    assert Run(toy, tmp_path / "stopped", config, resume=True, show_progress=False).train() == report
    loaded = CFSFL.from_pretrained(tmp_path / "whole")
    for one, other in zip(loaded.recommend(toy.test.fold_in), whole.model.recommend(toy.test.fold_in), strict=True):
        assert torch.equal(one, other)


def test_a_folder_keeps_the_memory_and_notices_another(tmp_path: Path) -> None:
    model, x = build(), rows()
    model.save_pretrained(tmp_path / "model")
    loaded = CFSFL.from_pretrained(tmp_path / "model")
    for one, other in zip(model.recommend(x), loaded.recommend(x), strict=True):
        assert torch.equal(one, other)
    other = build(memory_ridge=7.0)
    other.save_pretrained(tmp_path / "other")
    shutil.copy(tmp_path / "other" / checkpoint.MEMORY, tmp_path / "model" / checkpoint.MEMORY)
    with pytest.raises(ValueError, match="does not belong to"):
        CFSFL.from_pretrained(tmp_path / "model")
    (tmp_path / "model" / checkpoint.MEMORY).unlink()
    with pytest.raises(FileNotFoundError, match="memory"):
        CFSFL.from_pretrained(tmp_path / "model")


def test_an_estimator_learns_to_judge(tmp_path: Path) -> None:
    fitted = CFSFLRecommender.from_config(CFSFLConfig.preset("best", **QUICK), device="cpu")
    fitted.fit(clusters(), show_progress=False)
    ids, scores = fitted.recommend(np.arange(160), clusters(), N=3)
    missing = 10 - np.asarray(clusters().sum(1)).ravel()  # of a cluster's ten items
    found = (ids % 4 == np.arange(160)[:, None] % 4).sum(1)
    assert np.array_equal(found, missing.clip(max=3))
    fitted.save(tmp_path / "model")
    again = CFSFLRecommender.load(tmp_path / "model").recommend(np.arange(160), clusters(), N=3)
    assert np.array_equal(again[0], ids)
    assert np.array_equal(again[1], scores)
    with pytest.raises(ValueError, match="fitted as a whole"):
        fitted.partial_fit(clusters())
    with pytest.raises(ValueError, match="an exported program cannot hold"):
        exported(fitted.model_, 3)
