"""Algorithm 1 over one model: its stages in order, what each starts from, validation, patience and the best weights.

In memory; `runs.Run` keeps the same in a folder.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cfsfl_fast import backends, scarcity
from cfsfl_fast.config import CFSFLConfig
from cfsfl_fast.datasets import HeldOut
from cfsfl_fast.distributed import ALONE, Group
from cfsfl_fast.evaluation import Evaluation, evaluate
from cfsfl_fast.folds import Folds, parts
from cfsfl_fast.interactions import Interactions
from cfsfl_fast.metrics import Mean
from cfsfl_fast.model import CFSFL, ITEM_TABLES
from cfsfl_fast.progress import bar
from cfsfl_fast.sharded import Shard
from cfsfl_fast.training import prepare_item_reward
from cfsfl_fast.updates import Optimisers, run_epoch

log = logging.getLogger(__name__)

STAGES = ("recommender", "control", "reward", "joint")
"""In order; the first is what the others start from, the joint stage by way of the reward estimator's. With
feedback="scores" the reward's is the last.
"""


MEMORY_WEIGHTS = (10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0)
RECOMMENDER_WEIGHTS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)
"""Of `judging`'s beta and alpha: what validation users choose among."""

UNCHOSEN_WEIGHT = 40.0
"""beta where there are none."""


@dataclass(frozen=True)
class Epoch:
    """What an epoch came to.

    Attributes:
        stage: of Algorithm 1: "recommender", "control", "reward" or "joint".
        epoch: of the stage, from 1; 0 is the stage's start.
        step: updates of the recommender so far.
        figures: means over users of the losses and rewards, and the time taken: "seconds", "users_per_second".
        validation: of the model as it is now, by metric; None where the stage has none.
    """

    stage: str
    epoch: int
    step: int
    figures: dict[str, float]
    validation: dict[str, Mean] | None

    def to_dict(self) -> dict[str, Any]:
        """As a line of metrics.jsonl holds it."""
        line: dict[str, Any] = {"stage": self.stage, "epoch": self.epoch, "step": self.step, **self.figures}
        if self.validation is not None:
            line["validation"] = {name: found.value for name, found in self.validation.items()}
            line["validation_error"] = {name: found.error for name, found in self.validation.items()}
        return line


OnEpoch = Callable[[Epoch], None]
"""Called after every epoch, and once at a stage's start where there is a validation."""


def fresh_model(
    n_items: int, config: CFSFLConfig, *, device: torch.device | str, shard: Shard | None = None, **run_time: Any
) -> CFSFL:
    """A model with the first weights of the config's seed; torch's own random numbers stay where they were.

    shard: the rows of its item tables that this process has; None for all.
    run_time: backend, precision, deterministic and graphs.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        if shard is None:
            model = CFSFL.from_config(n_items, config, **run_time)
        else:
            model = CFSFL.part(n_items, config, shard, **run_time)
    return model.to(device)


class Trainer:
    """Trains a model by Algorithm 1.

    Args:
        model: with a resolved config; it is on the device to train on.
        histories: of the training users, on the model's device.
        validation: users by whose NDCG@100 a stage's best epoch is chosen; with None it is the last.
        show_progress: progress bars on stderr, where that is a terminal.
        on_epoch: called with every epoch's figures.
        group: processes that train this model together, each with the same arguments.
    """

    def __init__(
        self,
        model: CFSFL,
        histories: Interactions,
        validation: HeldOut | None,
        *,
        show_progress: bool = True,
        on_epoch: OnEpoch | None = None,
        group: Group = ALONE,
    ) -> None:
        self.model, self.histories, self.validation = model, histories, validation
        self.config, self.device = model.config, model.device
        self.show_progress, self.on_epoch = show_progress and group.is_first, on_epoch
        self.group = group
        self.progress: dict[str, Any] = {"stage": STAGES[0], "epoch": 0, "step": 0, "best": {}}
        self.optimisers: Optimisers | None = None
        self.kept: dict[str, dict[str, Tensor]] = {}
        self.folds: Folds | None = None
        self.label = ""

    @property
    def stages(self) -> list[str]:
        """The stages that the config asks for."""
        config, wanted = self.config, {"recommender"}
        if config.judges_items:
            wanted |= {"reward"} if config.steps and config.epochs[1] else set()
        elif config.has_joint_stage:
            wanted |= {"joint"}
            wanted |= {"reward"} if config.uses_reward else set()
            wanted |= {"control"} if config.control else set()
        return [stage for stage in STAGES if stage in wanted]

    @property
    def systems(self) -> dict[str, str]:
        """What tables call the recommender after each of the stages that rank."""
        recommender = self.model.recommender
        name = recommender.label + ("-(beta=0)" if self.config.kl == "none" and recommender.samples else "")
        if self.config.judges_items:
            return {"recommender": name, "reward": "CF-SFL, scores"}
        after = "CF-SFL" if self.config.steps else f"{name}+R" if self.config.reward_weight else f"{name}, stage 3"
        return {"recommender": name, "control": f"{name}, trained on", "joint": after}

    def run(self) -> None:
        """Runs every stage that is not finished; the model then has the last stage's best weights.

        Raises:
            FloatingPointError: a loss is NaN or infinite.
            OutOfMemoryError: the device has no memory for an update.
        """
        with backends.flushed_denormals(), self.model.running():
            while self.progress["stage"] != "done":
                self._stage(self.progress["stage"])
                self._next()
        self.model.eval()

    def go_on(self, stage: str, optimisers: Optimisers, done: int, epochs: int) -> None:
        """Trains the model on by one stage, the KL term at its cap.

        Args:
            optimisers: of the stage; they keep their moments.
            done: epochs of the stage so far, which key the random numbers.
            epochs: how many more.

        Raises:
            FloatingPointError: a loss is NaN or infinite.
        """
        self.optimisers = optimisers
        self.progress["step"] = self.config.anneal_steps
        with backends.flushed_denormals(), self.model.running():
            for epoch in range(done + 1, done + epochs + 1):
                self._tell(Epoch(stage, epoch, self.progress["step"], self._epoch(stage, epoch, done + epochs), None))
        self.model.eval()

    def judge(self, held_out: HeldOut, steps: int, label: str | None) -> Evaluation:
        """The model's metrics on held-out users after some feedback steps; label: of a progress bar."""

        def recommend(x: Any, n: int) -> tuple[Tensor, Tensor]:
            return self.model.recommend(x, n, steps=steps)

        return evaluate(
            recommend,
            held_out.fold_in,
            held_out.targets,
            device=self.device,
            progress=label if self.show_progress else None,
            group=self.group,
        )

    # A stage

    def _stage(self, stage: str) -> None:
        """Trains one stage from its base, or from where it stood, and keeps its best weights."""
        n_epochs = self.config.epochs[{"recommender": 0, "reward": 1}.get(stage, 2)]
        judged = stage == "reward" and self.config.judges_items
        ranked = (stage != "reward" or judged) and self.validation is not None
        self.begin(stage)
        if self.optimisers is None:
            if base := self._base(stage):
                self.load(base)
            if judged:
                self.prepare_judging()
            self.optimisers = Optimisers(self.model, stage)
            if ranked:
                self._done(stage, 0, {}, ranked)
            else:
                self._keep_best(stage, 0, ranked)
        elif judged:
            self.remember()
            self.train_folds()
        while self.progress["epoch"] < n_epochs and not self._out_of_patience(stage, ranked):
            epoch = self.progress["epoch"] + 1
            self._done(stage, epoch, self._epoch(stage, epoch, n_epochs), ranked)
            self.progress["epoch"] = epoch
            self.save_state()
        self.optimisers = None

    def steps_after(self, stage: str) -> int:
        """T of the model that a stage trains."""
        return self.config.steps if stage == self.stages[-1] and stage != STAGES[0] else 0

    def remember(self) -> None:
        """Fills the model's item memory."""
        assert self.model.memory is not None
        if self.model.memory.is_empty:
            self.model.memory.fit(self.histories, self.config.memory_ridge)

    def prepare_judging(self) -> None:
        """Fills the item memory, weighs it against the recommender for T = 0, and measures the evidence."""
        self.remember()
        assert self.model.memory is not None
        self.model.memory.weight.fill_(UNCHOSEN_WEIGHT)
        self._weigh("weight", MEMORY_WEIGHTS, 0)
        prepare_item_reward(self.model, self.train_folds(), self.histories)

    def train_folds(self) -> Folds:
        """Trains the recommenders that the item reward learns beside, as long as stage 1's best weights were."""
        config, histories = self.config, self.histories
        part = parts(len(histories), config.folds, config.seed).to(self.device)
        best = max(1, self.progress["best"][STAGES[0]]["epoch"])
        models = []
        for number in range(config.folds):
            others = histories.take((part != number).nonzero().squeeze(1))
            anneal = max(1, round(int(config.anneal_steps) * len(others) / max(1, len(histories))))
            theirs = dataclasses.replace(
                config, feedback="embedding", steps=0, joint="auto", epochs=(best, 0, 0), anneal_steps=anneal
            )
            model = fresh_model(
                self.model.n_items,
                theirs,
                device=self.device,
                backend=self.model.backend,
                precision=self.model.precision,
                deterministic=self.model.deterministic,
                graphs=self.model.graphs.mode,
            )
            if not self.restore_fold(number, model):
                trainer = Trainer(model, others, None, show_progress=self.show_progress, group=self.group)
                trainer.label = f"without part {number + 1} of {config.folds}: "
                trainer.run()
                self.keep_fold(number, model)
            models.append(model.eval().requires_grad_(False))
        self.folds = Folds(models, part)
        return self.folds

    def _weigh(self, name: str, choices: tuple[float, ...], steps: int) -> None:
        """Gives the item memory the weight that is best on validation users; without them it stays."""
        if self.validation is None:
            return
        weight = getattr(self.model.memory, name)
        found = {}
        for choice in choices:
            weight.fill_(choice)
            found[choice] = self.judge(self.validation, steps, None).summary()["NDCG@100"].value
        weight.fill_(max(found, key=lambda choice: found[choice]))
        log.info("%s %g of %s", name, weight.item(), found)

    def _base(self, stage: str) -> str | None:
        """The stage whose best weights a stage starts from."""
        if stage == STAGES[0]:
            return None
        return "reward" if stage == "joint" and self.config.uses_reward else STAGES[0]

    def _epoch(self, stage: str, epoch: int, n_epochs: int) -> dict[str, float]:
        config = self.config
        number = STAGES.index(stage)
        n_users = len(self.histories)
        order = np.random.default_rng([config.seed, number, epoch]).permutation(n_users)
        began, read = time.perf_counter(), 0.0
        best = self.progress["best"].get(stage, {}).get("score")
        shown = (
            {} if best is None or math.isnan(best) else {"val": f"{self.progress['last']:.4f}", "best": f"{best:.4f}"}
        )
        label = f"{self.label}{self.systems['joint'] if stage == 'joint' else stage} {epoch}/{n_epochs}"
        with bar(shown=self.show_progress, total=n_users, desc=label, unit=" users", leave=False) as shown_bar:

            def tick(users: int, loss: Any) -> None:
                nonlocal read
                if not shown_bar.disable and time.perf_counter() - read > 0.5:  # reading waits for the device
                    read = time.perf_counter()
                    shown_bar.set_postfix(loss=f"{loss():.3f}", **shown, refresh=False)
                shown_bar.update(users)

            assert self.optimisers is not None
            self.model.train()
            what = f"an update of {config.batch_size} users in stage {stage!r} ({self.model.n_items:,} items)"
            advice = (
                f"start a run with batch_size={max(1, int(config.batch_size) // 2)} or less, which trains another model"
            )
            trained = self.model.recommender.epoch(epoch) if self.optimisers.main else contextlib.nullcontext()
            with trained, scarcity.explained(what, advice, self.device):
                sums, self.progress["step"] = run_epoch(
                    self.model,
                    self.histories,
                    self.optimisers,
                    stage,
                    torch.from_numpy(order).to(self.device),
                    (config.seed, number, epoch),
                    self.progress["step"],
                    tick,
                    self.group,
                    self.folds if stage == "reward" else None,
                )
        self.group.check_same(list(self.model.parameters()), "the weights")
        if self.model.shard is not None:
            shared = [w for name, w in self.model.named_parameters() if name not in ITEM_TABLES]
            self.model.shard.group.check_same(shared, "the weights that all parts have")
        seconds = time.perf_counter() - began
        figures = {name: float(value) / n_users for name, value in sums._asdict().items()}
        if not all(math.isfinite(value) for value in figures.values()):
            raise FloatingPointError(
                f"the loss is {figures['loss']} in epoch {epoch} of stage {stage!r}: lower the learning rate"
            )
        if wrong := self._not_finite():
            raise FloatingPointError(
                f"{wrong} holds NaN or infinite values after epoch {epoch} of stage {stage!r}: lower the learning rate"
            )
        if self.optimisers.reward is None:
            figures = {"loss": figures["loss"]}
        elif stage == "reward":
            del figures["loss"]
        return {**figures, "seconds": seconds, "users_per_second": n_users / seconds}

    def _not_finite(self) -> str | None:
        """The first tensor of the model that holds NaN or infinite values: the last update has no loss to tell."""
        state = self.model.state_dict()
        wrong = torch.stack([tensor.isfinite().logical_not().any() for tensor in state.values()]).int()
        if self.model.shard is not None:
            (wrong,) = self.model.shard.group.sums([wrong])  # also in the rows of another process
        return next((name for name, found in zip(state, wrong.tolist(), strict=True) if found), None)

    def _done(self, stage: str, epoch: int, figures: dict[str, float], ranked: bool) -> None:
        """Validates after an epoch, tells of it, and keeps the weights if they are the best so far."""
        score = None
        if ranked:
            assert self.validation is not None
            score = self.judge(self.validation, self.steps_after(stage), None).summary()
            self.progress["last"] = score["NDCG@100"].value
        self._keep_best(stage, epoch, ranked)
        self._tell(Epoch(stage, epoch, self.progress["step"], figures, score))

    def _tell(self, record: Epoch) -> None:
        self.log_epoch(record)
        if self.on_epoch is not None:
            self.on_epoch(record)

    def _keep_best(self, stage: str, epoch: int, ranked: bool) -> None:
        best = self.progress["best"].get(stage)
        score = self.progress["last"] if ranked else math.nan
        if best is None or not ranked or score > best["score"]:
            self.progress["best"][stage] = {"epoch": epoch, "score": score}
            self.keep(stage)

    def _out_of_patience(self, stage: str, ranked: bool) -> bool:
        patience, best = self.config.patience, self.progress["best"].get(stage)
        return bool(ranked and patience and best and self.progress["epoch"] - best["epoch"] >= patience)

    def _next(self) -> None:
        """Ends the stage: its best weights become the model's."""
        stage = self.progress["stage"]
        if stage != "control" and (stage != "reward" or self.config.judges_items):
            self.load(stage)
        if stage == "reward" and self.config.judges_items:
            self._weigh("recommender_weight", RECOMMENDER_WEIGHTS, self.config.steps)
            self.keep(stage)
        self.folds = None
        if stage == "recommender":
            self.progress["first_step"] = self.progress["step"]
        self._leave(stage)

    def _leave(self, stage: str) -> None:
        """Goes on to the stage after."""
        after = self.stages[self.stages.index(stage) + 1 :]
        self.progress.update(stage=after[0] if after else "done", epoch=0, step=self.progress["first_step"])
        self.end(stage, after)

    # Where weights and progress go

    def begin(self, stage: str) -> None:
        """A stage starts, or goes on."""

    def keep(self, stage: str) -> None:
        """Keeps the model's weights as the stage's best."""
        self.kept[stage] = {name: tensor.detach().clone() for name, tensor in self.model.state_dict().items()}

    def load(self, stage: str) -> None:
        """Gives the model a stage's best weights."""
        self.model.load_state_dict(self.kept[stage])

    def keep_fold(self, number: int, model: CFSFL) -> None:
        """Keeps a fold's recommender until the stage is over."""

    def restore_fold(self, number: int, model: CFSFL) -> bool:
        """Gives a model a fold's weights, where they were kept."""
        return False

    def log_epoch(self, record: Epoch) -> None:
        """Notes an epoch's figures."""
        found = {**record.figures, **{name: mean.value for name, mean in (record.validation or {}).items()}}
        log.info(
            "%s%s %d: %s", self.label, record.stage, record.epoch, ", ".join(f"{k} {v:.4g}" for k, v in found.items())
        )

    def save_state(self) -> None:
        """Keeps what resuming after the epoch needs."""

    def end(self, stage: str, after: list[str]) -> None:
        """A stage is over; after: the stages to come."""
        wanted = {self._base(later) for later in after}
        self.kept = {name: weights for name, weights in self.kept.items() if name in wanted}
