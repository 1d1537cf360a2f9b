"""Recommenders that have not seen a user: whom they were trained on, whose scores a user gets, and runs that go on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from cfsfl_fast import CFSFL, CFSFLConfig
from cfsfl_fast.datasets import Dataset
from cfsfl_fast.folds import Folds, parts
from cfsfl_fast.interactions import Interactions, as_interactions
from cfsfl_fast.runs import Run
from cfsfl_fast.stages import Trainer
from tests.conftest import clusters

M = 40
SIZES = {"top_k": 6, "steps": 2, "hidden_dim": 24, "latent_dim": 8, "lookup_dim": 8, "feedback_dim": 8}
QUICK = CFSFLConfig.preset("best", **{**SIZES, "batch_size": 32, "epochs": (4, 2, 0), "folds": 3})


def test_parts_are_random_and_of_one_size() -> None:
    found = parts(20, 3, 1)
    assert sorted(found.bincount().tolist()) == [6, 7, 7]
    assert torch.equal(found, parts(20, 3, 1))
    assert not torch.equal(found, parts(20, 3, 2))
    assert not torch.equal(found.sort().values, found)


@torch.no_grad()
def test_a_user_gets_the_scores_of_the_recommender_of_their_part() -> None:
    models = [CFSFL(M, recommender="mf", latent_dim=4).eval() for _ in range(3)]
    x = as_interactions(clusters(12), M)
    part = torch.tensor([2, 0, 1] * 4)
    users = torch.tensor([3, 4, 5, 11, -1])
    kept = x.take(torch.tensor([3, 4, 5, 11, 0]))
    found = Folds(models, part).scores(kept, users)
    for row, which in enumerate((2, 0, 1, 1)):
        torch.testing.assert_close(found[row], models[which](kept, steps=0)[row])
    assert bool(found[4].isfinite().all())


def test_no_recommender_has_seen_its_part(toy: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[tuple[Trainer, torch.Tensor]] = []
    start = Trainer.__init__

    def noted(self: Trainer, model: CFSFL, histories: Interactions, *arguments: Any, **options: Any) -> None:
        given.append((self, histories.exact().items))
        start(self, model, histories, *arguments, **options)

    monkeypatch.setattr(Trainer, "__init__", noted)
    run = Run(toy, tmp_path / "run", QUICK, show_progress=False)
    kept: list[Folds] = []

    def train() -> Folds:
        kept.append(Trainer.train_folds(run))
        return kept[0]

    monkeypatch.setattr(run, "train_folds", train)
    run.train()
    [folds] = kept
    assert len(given) == 4
    (_, everyone), *others = given
    for number, (trainer, items) in enumerate(others):
        mine = (folds.part != number).nonzero().squeeze(1)
        assert torch.equal(items, run.histories.take(mine).exact().items)
        assert len(items) < len(everyone)
        assert trainer.progress["best"]["recommender"]["epoch"] == run.progress["best"]["recommender"]["epoch"]
        assert trainer.model is folds.models[number]
        assert not trainer.model.training
    assert run.folds is None, "held no longer than they are needed"
    assert not list((tmp_path / "run").rglob("fold-*"))


def test_a_run_that_goes_on_reads_the_recommenders_it_had_trained(toy: Dataset, tmp_path: Path) -> None:
    """Killed while the second of three is trained, then while the reward learns."""

    class Killed(Exception):  # noqa: N818
        pass

    class Interrupted(Run):
        written, stop = 0, ""

        def keep_fold(self, number: int, model: CFSFL) -> None:
            super().keep_fold(number, model)
            self.written += 1
            if self.stop == "fold" and number == 1:
                raise Killed

        def save_state(self) -> None:
            super().save_state()
            if self.stop == "reward" and self.progress["stage"] == "reward":
                raise Killed

    def go_on(stop: str, folder: str = "run") -> Interrupted:
        run = Interrupted(toy, tmp_path / folder, QUICK, resume=(tmp_path / folder).exists(), show_progress=False)
        run.stop = stop
        if stop:
            with pytest.raises(Killed):
                run.train()
        else:
            run.train()
        return run

    assert [go_on(stop).written for stop in ("fold", "reward", "")] == [2, 1, 0]
    assert go_on("", "whole").written == 3
    for name in ("model.safetensors", "report.json"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
