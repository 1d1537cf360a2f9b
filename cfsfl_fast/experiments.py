"""Experiments: rows of a table, each trained with several seeds, every cell in a folder of its own; resumable.

A cell is a `Run` or a baseline. Its folder is named after its config's changes, so that experiments in one folder share
cells, and every run with a stage 3 starts from the cell that trained its stage 1. A finished cell has a `result.json`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cfsfl_fast import arrays, backends, baselines, checkpoint, files
from cfsfl_fast.config import LATER_FIELDS, CFSFLConfig
from cfsfl_fast.datasets import Dataset
from cfsfl_fast.evaluation import Recommend, evaluate, seconds_to_answer
from cfsfl_fast.model import CFSFL
from cfsfl_fast.progress import bar
from cfsfl_fast.runs import USERS, Run, read_metrics, write_per_user

log = logging.getLogger(__name__)

RESULT = "result.json"


@dataclass(frozen=True)
class Row:
    """A system of a table.

    Attributes:
        name: as the table shows it.
        changes: config fields that make it, on top of the experiment's.
        usual: config fields that it has instead of the experiment's, unless the user gave another value.
        baseline: name in `baselines.BASELINES`, where it is one of these and not a config.
        part: the system of the run that is shown, by its name in the run's report, where that is not the last.
        controls: rows that it is compared with, user by user.
        published: its name in the published table, where it has one there.
    """

    name: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    usual: Mapping[str, Any] = field(default_factory=dict)
    baseline: str = ""
    part: str = ""
    controls: tuple[str, ...] = ()
    published: str = ""


@dataclass(frozen=True)
class Experiment:
    """A table or a figure.

    Attributes:
        name: of its files.
        title: in plain words.
        rows: its systems; a row comes after its controls.
        controls: what each column of differences is a difference to.
    """

    name: str
    title: str
    rows: tuple[Row, ...]
    controls: tuple[str, ...] = ()

    def without(self, texts: Sequence[str]) -> Experiment:
        """The same, but for the row of a name, or where no row has a text for its name, all with that text in it.

        Raises:
            ValueError: no row has such a text in its name, or none is left.
        """
        names = [row.name for row in self.rows]
        skipped = set[str]()
        for text in texts:
            found = [text] if text in names else [name for name in names if text in name]
            if not found:
                raise ValueError(f"no row of {self.name} has {text!r} in its name: {', '.join(names)}")
            skipped.update(found)
        rows = tuple(row for row in self.rows if row.name not in skipped)
        if not rows:
            raise ValueError(f"no row of {self.name} is left without {', '.join(texts)}")
        return replace(self, rows=rows)

    def given(self, fields: Collection[str]) -> Experiment:
        """The same, where the user has given some config fields: rows do not have their usual values of these."""
        rows = [replace(row, usual={k: v for k, v in row.usual.items() if k not in fields}) for row in self.rows]
        return replace(self, rows=tuple(rows))


@dataclass(frozen=True)
class Result:
    """What a finished cell gives.

    Attributes:
        seed: of its training.
        seconds: of the fastest epoch, by stage. epochs: how many there were. best: the epoch that was kept.
        microseconds: to answer one test user with 100 items; the fastest of a few rounds.
        users: ids of the judged test users [N]. metrics: their values [N] by metric.
        folder: where it is.
    """

    seed: int
    seconds: dict[str, float]
    epochs: dict[str, int]
    best: dict[str, int]
    microseconds: float
    users: NDArray[Any]
    metrics: dict[str, NDArray[Any]]
    folder: Path


class Laboratory:
    """Trains cells of experiments on one data set in one folder.

    Args:
        data: what to train and judge on.
        out: the folder; it may hold cells of other experiments.
        fields: config fields of every row.
        device, backend: of the training.
        show_progress: progress bars on stderr, where that is a terminal.

    Raises:
        ValueError: a field is unknown or out of range.
    """

    def __init__(
        self,
        data: Dataset,
        out: Path,
        fields: Mapping[str, Any],
        *,
        device: torch.device | str = "cpu",
        backend: str = "auto",
        show_progress: bool = True,
    ) -> None:
        self.data, self.out, self.fields = data, out, dict(fields)
        self.device, self.backend, self.show_progress = torch.device(device), backend, show_progress
        self.seed = CFSFLConfig.from_dict(self.fields).seed

    def run(self, experiment: Experiment, seeds: int, done: Callable[[], None] = lambda: None) -> None:
        """Every cell of an experiment that is not finished, seed by seed; `done` is called after each. A baseline whose
        extra is not installed is left out with a warning.

        Raises:
            ValueError: a cell's folder holds a run with another config or of other data.
        """
        cells = [(row, seed) for seed in self.seeds(seeds) for row in experiment.rows]
        with bar(cells, shown=self.show_progress, desc=experiment.name, unit=" cells") as shown:
            for row, seed in shown:
                shown.set_postfix_str(f"{row.name}, seed {seed}")
                log.info("%s: %s, seed %d", experiment.name, row.name, seed)
                if row.baseline:
                    try:
                        self._baseline(row.baseline, seed)
                    except ImportError as error:
                        log.warning("%s has no %s: %s", experiment.name, row.name, error)
                else:
                    self._train(self.config(row, seed))
                done()

    def time_again(self, experiment: Experiment, seeds: int) -> None:
        """Measures again how long finished runs take to answer, all in turns; baselines keep what they have."""
        results = [r for row in experiment.rows if not row.baseline for r in self.results(row, seeds).values()]
        folders = sorted({result.folder for result in results})
        models = [CFSFL.from_pretrained(folder, self.device, backend=self.backend) for folder in folders]
        fold_in = self.data.test.fold_in
        with backends.flushed_denormals():
            taken = seconds_to_answer([model.recommend for model in models], fold_in, device=self.device)
        for folder, seconds in zip(folders, taken, strict=True):
            found = checkpoint.read_json(folder / RESULT)
            _write_result(folder, {**found, "microseconds": 1e6 * seconds / fold_in.shape[0]})

    def seeds(self, n: int) -> range:
        """The seeds of an experiment."""
        return range(self.seed, self.seed + n)

    def config(self, row: Row, seed: int) -> CFSFLConfig:
        """A row's config. Its control is a row of its own, not a stage."""
        return CFSFLConfig.from_dict({**self.fields, "control": False, **row.usual, **row.changes, "seed": seed})

    def results(self, row: Row, seeds: int) -> dict[int, Result]:
        """A row's finished cells by seed."""
        found = {seed: _read(self.folder(row, seed), row.part) for seed in self.seeds(seeds)}
        return {seed: result for seed, result in found.items() if result is not None}

    def folder(self, row: Row, seed: int) -> Path:
        """Where a cell is."""
        if row.baseline:
            seed = seed if row.baseline in baselines.SEEDED else 0
            return self.out / "cells" / _slug(row.baseline) / f"seed-{seed}"
        return self._folder(self.config(row, seed))

    def _folder(self, config: CFSFLConfig) -> Path:
        usual = CFSFLConfig.from_dict({**self.fields, "recommender": config.recommender, "control": False}).to_dict()
        named = ("recommender", "steps", "seed")
        changes = [f"{k}={v}" for k, v in config.to_dict().items() if v != usual[k] and k not in named]
        name = "-".join([config.recommender, f"T{config.steps}", *changes])
        return self.out / "cells" / _slug(name) / f"seed-{config.seed}"

    def _train(self, config: CFSFLConfig) -> None:
        """A run, from the stage 1 that others share with it."""
        folder, start = self._folder(config), None
        if self._finished(folder, config):
            return
        if config.has_joint_stage or config.judges_items:
            usual = CFSFLConfig.from_dict({**self.fields, "control": False}).to_dict()
            later = {name: value for name, value in usual.items() if name in LATER_FIELDS}
            later |= {"steps": 0, "joint": "auto", "feedback": "embedding"}
            plain = CFSFLConfig.from_dict({**config.to_dict(), **later})
            self._train(plain)
            start = self._folder(plain)
        with files.locked(folder):
            if self._finished(folder, config):  # another process was here first
                return
            run = Run(
                self.data,
                folder,
                config,
                device=self.device,
                backend=self.backend,
                resume=(folder / checkpoint.CONFIG).exists(),
                start=start,
                show_progress=self.show_progress,
            )
            report = run.train()
            system = run.systems[run.stages[-1]]
            run.load(run.stages[-1])

            def recommend(x: Any, n: int) -> Any:
                return run.model.recommend(x, n, steps=config.steps)

            self._write(folder, system, {"config": run.config.to_dict(), "best": report["best_epochs"]}, recommend)

    def _baseline(self, name: str, seed: int) -> None:
        folder = self.folder(Row(name, baseline=name), seed)
        if self._finished(folder):
            return
        with files.locked(folder):
            if self._finished(folder):
                return
            folder.mkdir(parents=True, exist_ok=True)
            kind, test = baselines.BASELINES[name], self.data.test
            given = {"seed": seed} if name in baselines.SEEDED else {}
            found = baselines.select(kind, self.data, given, device=self.device, show_progress=self.show_progress)
            recommend = found.fitted.recommend
            judged = evaluate(recommend, test.fold_in, test.targets, device=self.device)
            write_per_user(folder / USERS, test, {name: judged})
            self._write(folder, name, {"choices": found.choices, "seconds": found.seconds}, recommend)

    def _write(self, folder: Path, system: str, known: dict[str, Any], recommend: Recommend) -> None:
        """result.json, and with it the cell is finished."""
        fold_in = self.data.test.fold_in
        with backends.flushed_denormals(), backends.use_backend(self.backend):
            [seconds] = seconds_to_answer([recommend], fold_in, device=self.device)
        result = {"system": system, "microseconds": 1e6 * seconds / fold_in.shape[0], "data": self._about(), **known}
        _write_result(folder, result)

    def _about(self) -> list[int]:
        return [*self.data.train.shape, int(self.data.train.nnz)]

    def _finished(self, folder: Path, config: CFSFLConfig | None = None) -> bool:
        """Whether a cell is finished; refuses one that is not the one asked for."""
        if not (folder / RESULT).exists():
            return False
        found = checkpoint.read_json(folder / RESULT)
        if found["data"] != self._about():
            raise ValueError(f"{folder} is of other data: users, items, events {found['data']}, not {self._about()}")
        if config is not None:
            theirs = CFSFLConfig.from_dict(found["config"]).to_dict()  # a field that is younger has its default
            for name, value in config.resolved(self.data.n_users).to_dict().items():
                if theirs[name] != value:
                    raise ValueError(f"{folder} was trained with {name} = {theirs[name]!r}, not {value!r}")
        return True


def _slug(name: str) -> str:
    """A name as a folder can have it."""
    return "".join(c if c.isalnum() or c in "-=._" else "_" for c in name)


def _write_result(folder: Path, result: dict[str, Any]) -> None:
    files.write_bytes(folder / RESULT, (json.dumps(result, indent=2) + "\n").encode())


def _read(folder: Path, part: str = "") -> Result | None:
    if not (folder / RESULT).exists():
        return None
    found = checkpoint.read_json(folder / RESULT)
    arrays.check_npz(folder / USERS)
    with arrays.damage_named(str(folder / USERS)), np.load(folder / USERS, allow_pickle=False) as held:
        users_of = dict(held)
    seconds: dict[str, list[float]] = {}
    for line in read_metrics(folder) if "config" in found else ():
        if "seconds" in line:
            seconds.setdefault(line["stage"], []).append(line["seconds"])
    try:
        prefix = f"{part or found['system']}/"
        return Result(
            seed=found.get("config", {}).get("seed", 0),
            seconds={stage: min(values) for stage, values in seconds.items()},
            epochs={stage: len(values) for stage, values in seconds.items()},
            best=found.get("best", {}),
            microseconds=float(found["microseconds"]),
            users=users_of["users"],
            metrics={k.removeprefix(prefix): values for k, values in users_of.items() if k.startswith(prefix)},
            folder=folder,
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder}: damaged, {RESULT} or {USERS} lacks what a finished cell has ({error!r})") from None
