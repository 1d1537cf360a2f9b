"""A training run in a folder: stages, checkpoints, metrics.jsonl, resuming, and the table at its end."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from cfsfl_fast import backends, checkpoint, files
from cfsfl_fast.baselines import MostPopular
from cfsfl_fast.config import CFSFLConfig
from cfsfl_fast.datasets import Dataset
from cfsfl_fast.evaluation import Evaluation, evaluate
from cfsfl_fast.interactions import as_interactions
from cfsfl_fast.metrics import Mean, mean
from cfsfl_fast.model import CFSFL
from cfsfl_fast.training import Optimisers, run_epoch

log = logging.getLogger(__name__)

METRICS, STATE, REPORT = "metrics.jsonl", "training.safetensors", "report.json"
STAGES = ("recommender", "control", "reward", "joint")
"""In order. Each starts from the stage that `_BASES` names."""

_BASES = {"control": "recommender", "reward": "recommender", "joint": "reward"}
_LABELS = {"recommender": "recommender", "control": "control", "reward": "reward", "joint": "CF-SFL"}


class Run:
    """Trains a model into a folder.

    Args:
        data: what to train and judge on.
        out: the run's folder.
        config: every choice; "auto" is replaced by what suits the data.
        device: where to train.
        backend: of the operations.
        resume: go on from the last finished epoch of `out`.
        show_progress: progress bars on stderr.

    Raises:
        FileExistsError: `out` holds a run and `resume` is False.
        ValueError: `out` holds a run with another config or of other data; both values are named.
    """

    def __init__(
        self,
        data: Dataset,
        out: Path,
        config: CFSFLConfig,
        *,
        device: torch.device | str = "cpu",
        backend: str = "auto",
        resume: bool = False,
        show_progress: bool = True,
    ) -> None:
        self.data, self.out, self.device = data, out, torch.device(device)
        self.config = config.resolved(data.train.shape[0])
        self.show_progress = show_progress
        self.histories = as_interactions(data.train, data.n_items, self.device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.seed)
            self.model = CFSFL.from_config(data.n_items, self.config, backend=backend)
        self.model.item_ids = data.item_ids
        self.model.to(self.device)
        self.progress: dict[str, Any] = {
            "stage": STAGES[0],
            "epoch": 0,
            "step": 0,
            "lines": 0,
            "best": {},
            "data": self._shape(),
        }
        self.optimisers: Optimisers | None = None
        if (out / checkpoint.CONFIG).exists():
            if not resume:
                raise FileExistsError(f"{out} holds a run already: resume it, or choose another folder")
            self._resume()
        else:
            out.mkdir(parents=True, exist_ok=True)
            checkpoint.write_description(out, data.n_items, self.config, data.item_ids)

    @property
    def stages(self) -> list[str]:
        """The stages that this run's config asks for."""
        wanted = {"recommender"}
        if self.config.steps and self.config.epochs[2]:
            wanted |= {"reward", "joint"} | ({"control"} if self.config.control else set())
        return [stage for stage in STAGES if stage in wanted]

    def train(self) -> dict[str, Any]:
        """Runs every stage that is not finished, and gives the report: figures of every system on the test users."""
        try:
            with backends.flushed_denormals(), backends.use_backend(self.model.backend):
                while self.progress["stage"] != "done":
                    self._stage(self.progress["stage"])
                    self._next()
                return self._report()
        except KeyboardInterrupt:
            log.warning("stopped; the run goes on from its last finished epoch with --resume")
            raise

    # A stage

    def _stage(self, stage: str) -> None:
        """Trains one stage from its base, or from where the run stood, and keeps its best weights."""
        config = self.config
        folder = self.out / "stages" / stage
        n_epochs = config.epochs[{"recommender": 0, "reward": 1}.get(stage, 2)]
        ranked = stage != "reward"
        if not (folder / checkpoint.CONFIG).exists():
            folder.mkdir(parents=True, exist_ok=True)
            mine = config if stage == "joint" else dataclasses.replace(config, steps=0)
            checkpoint.write_description(folder, self.data.n_items, mine, self.data.item_ids)
        if self.optimisers is None:
            if stage in _BASES:
                self._load(_BASES[stage])
            self.optimisers = Optimisers(self.model, stage)
            if ranked:
                self._log(stage, 0, {}, self._validate(stage))
            self._keep_best(stage, 0, ranked)
        while self.progress["epoch"] < n_epochs and not self._out_of_patience(stage, ranked):
            epoch = self.progress["epoch"] + 1
            figures = self._epoch(stage, epoch, n_epochs)
            score = self._validate(stage) if ranked else None
            self._log(stage, epoch, figures, score)
            self._keep_best(stage, epoch, ranked)
            self.progress["epoch"] = epoch
            self._save_state()
        self.optimisers = None

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
        label = f"{_LABELS[stage]} {epoch}/{n_epochs}"
        with tqdm(
            total=n_users, desc=label, unit=" users", disable=None if self.show_progress else True, leave=False
        ) as bar:

            def tick(users: int, loss: Any) -> None:
                nonlocal read
                if not bar.disable and time.perf_counter() - read > 0.5:  # reading waits for the device
                    read = time.perf_counter()
                    bar.set_postfix(loss=f"{loss():.3f}", **shown, refresh=False)
                bar.update(users)

            assert self.optimisers is not None
            self.model.train()
            sums, self.progress["step"] = run_epoch(
                self.model,
                self.histories,
                self.optimisers,
                stage,
                torch.from_numpy(order).to(self.device),
                (config.seed, number, epoch),
                self.progress["step"],
                tick,
            )
        seconds = time.perf_counter() - began
        figures = {name: float(value) / n_users for name, value in sums._asdict().items()}
        if not all(math.isfinite(value) for value in figures.values()):
            raise FloatingPointError(
                f"the loss is {figures['loss']} in epoch {epoch} of stage {stage!r}: lower the learning rate; "
                f"{self.out} keeps the epochs before"
            )
        if stage in ("recommender", "control"):
            figures = {"loss": figures["loss"]}
        elif stage == "reward":
            del figures["loss"]
        return {**figures, "seconds": seconds, "users_per_second": n_users / seconds}

    def _validate(self, stage: str) -> dict[str, Mean]:
        steps = self.config.steps if stage == "joint" else 0
        return self._judge(self.data.validation, steps, None).summary()

    def _judge(self, held_out: Any, steps: int, label: str | None) -> Evaluation:
        def recommend(x: Any, n: int) -> Any:
            return self.model.recommend(x, n, steps=steps)

        return evaluate(
            recommend,
            held_out.fold_in,
            held_out.targets,
            device=self.device,
            progress=label if self.show_progress else None,
        )

    def _keep_best(self, stage: str, epoch: int, ranked: bool) -> None:
        best = self.progress["best"].get(stage)
        score = self.progress["last"] if ranked else math.nan
        if best is None or not ranked or score > best["score"]:
            self.progress["best"][stage] = {"epoch": epoch, "score": score}
            checkpoint.write_model(self.out / "stages" / stage, self.model.state_dict())

    def _out_of_patience(self, stage: str, ranked: bool) -> bool:
        patience, best = self.config.patience, self.progress["best"].get(stage)
        return bool(ranked and patience and best and self.progress["epoch"] - best["epoch"] >= patience)

    def _next(self) -> None:
        """Ends the stage: its best weights become the run's model."""
        stage = self.progress["stage"]
        if stage != "control" and stage != "reward":
            self._load(stage)
            checkpoint.write_model(self.out, self.model.state_dict())
        if stage == "recommender":
            self.progress["first_step"] = self.progress["step"]
        after = self.stages[self.stages.index(stage) + 1 :]
        self.progress.update(stage=after[0] if after else "done", epoch=0, step=self.progress["first_step"])
        checkpoint.write_tensors(self.out / STATE, {}, {"progress": json.dumps(self.progress)})

    # Files

    def _load(self, stage: str) -> None:
        self.model.load_state_dict(checkpoint.read_tensors(self.out / "stages" / stage / checkpoint.MODEL)[0])

    def _shape(self) -> list[int]:
        train = self.data.train
        return [*train.shape, int(train.nnz), int(np.asarray(train.indices, dtype=np.int64).sum())]

    def _save_state(self) -> None:
        assert self.optimisers is not None
        tensors = {f"model/{name}": value for name, value in self.model.state_dict().items()}
        tensors |= {f"optimiser/{name}": value for name, value in self.optimisers.state().items()}
        checkpoint.write_tensors(self.out / STATE, tensors, {"progress": json.dumps(self.progress)})

    def _resume(self) -> None:
        files.remove_staged(self.out)
        described = checkpoint.read_json(self.out / checkpoint.CONFIG)
        for name, value in self.config.to_dict().items():
            if described.get(name) != value:
                raise ValueError(f"{self.out} was started with {name} = {described.get(name)!r}, not {value!r}")
        if not (self.out / STATE).exists():
            return
        tensors, metadata = checkpoint.read_tensors(self.out / STATE)
        progress = json.loads(metadata["progress"])
        if progress["data"] != self.progress["data"]:
            raise ValueError(
                f"{self.out} was trained on other data: users, items, events, sum of ids {progress['data']}, "
                f"not {self.progress['data']}"
            )
        self.progress = progress
        if tensors:
            parts: dict[str, dict[str, torch.Tensor]] = {"model": {}, "optimiser": {}}
            for name, tensor in tensors.items():
                part, _, rest = name.partition("/")
                parts[part][rest] = tensor
            self.model.load_state_dict(parts["model"])
            self.optimisers = Optimisers(self.model, progress["stage"])
            self.optimisers.restore(parts["optimiser"])
        lines = (self.out / METRICS).read_bytes().splitlines(keepends=True)
        files.write_bytes(self.out / METRICS, b"".join(lines[: progress["lines"]]))

    def _log(self, stage: str, epoch: int, figures: dict[str, float], score: dict[str, Mean] | None) -> None:
        """A line of metrics.jsonl."""
        line: dict[str, Any] = {"stage": stage, "epoch": epoch, "step": self.progress["step"], **figures}
        if score is not None:
            line["validation"] = {name: found.value for name, found in score.items()}
            line["validation_error"] = {name: found.error for name, found in score.items()}
            self.progress["last"] = score["NDCG@100"].value
        # Whole lines of the epochs that the state knows of; a run that was killed wrote more.
        path = self.out / METRICS
        lines = path.read_bytes().splitlines(keepends=True)[: self.progress["lines"]] if path.exists() else []
        files.write_bytes(path, b"".join(lines) + json.dumps(line).encode() + b"\n")
        self.progress["lines"] = len(lines) + 1

    def _report(self) -> dict[str, Any]:
        """Every system on the test users: mean and standard error, and the paired difference to its control."""
        path = self.out / REPORT
        if path.exists():
            return checkpoint.read_json(path)
        test = self.data.test
        label = "test" if self.show_progress else None
        popular = MostPopular(self.data.train)
        judged = {
            "most popular": evaluate(popular.recommend, test.fold_in, test.targets, device=self.device, progress=label)
        }
        for stage, name in (("recommender", "VAE"), ("control", "VAE, trained on"), ("joint", "CF-SFL")):
            if stage in self.progress["best"]:
                self._load(stage)
                judged[name] = self._judge(test, self.config.steps if stage == "joint" else 0, label)
        report: dict[str, Any] = {
            "users": len(judged["most popular"].ndcg100),
            "seed": self.config.seed,
            "steps": self.config.steps,
            "best_epochs": {stage: best["epoch"] for stage, best in self.progress["best"].items()},
            "test": {name: {m: list(v) for m, v in found.summary().items()} for name, found in judged.items()},
        }
        if "CF-SFL" in judged:
            control = "VAE, trained on" if "VAE, trained on" in judged else "VAE"
            gain = mean(judged["CF-SFL"].ndcg100 - judged[control].ndcg100)
            report["gain"] = {"over": control, "NDCG@100": list(gain)}
        files.write_bytes(path, (json.dumps(report, indent=2) + "\n").encode())
        return report


def table(report: dict[str, Any]) -> str:
    """A run's report as a person reads it."""
    names = ("Recall@20", "Recall@50", "NDCG@100")
    lines = [f"{'test users: ' + str(report['users']):<18}" + "".join(f"{name:>20}" for name in names)]
    for system, found in report["test"].items():
        lines.append(f"{system:<18}" + "".join(f"{Mean(*found[name])!s:>20}" for name in names))
    if gain := report.get("gain"):
        lines.append(f"CF-SFL minus {gain['over']!r}, NDCG@100, paired over users: {Mean(*gain['NDCG@100'])}")
    return "\n".join(lines)
