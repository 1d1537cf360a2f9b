"""A training run in a folder: stages, checkpoints, metrics.jsonl, resuming, and the table at its end."""

from __future__ import annotations

import dataclasses
import io
import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cfsfl_fast import backends, checkpoint, files, resharding
from cfsfl_fast.baselines import MostPopular
from cfsfl_fast.config import LATER_FIELDS, CFSFLConfig
from cfsfl_fast.datasets import Dataset, HeldOut
from cfsfl_fast.distributed import Mesh, local_size
from cfsfl_fast.evaluation import Evaluation, evaluate
from cfsfl_fast.interactions import as_interactions
from cfsfl_fast.metrics import Mean, mean
from cfsfl_fast.model import CFSFL, ITEM_TABLES
from cfsfl_fast.plan import plan
from cfsfl_fast.scarcity import OutOfMemoryError, free_memory
from cfsfl_fast.sharded import Shard
from cfsfl_fast.stages import STAGES, Epoch, OnEpoch, Trainer, fresh_model
from cfsfl_fast.updates import Optimisers

log = logging.getLogger(__name__)

METRICS, STATE, REPORT, USERS = "metrics.jsonl", "training.safetensors", "report.json", "users.npz"


class Run(Trainer):
    """Trains a model into a folder.

    Args:
        data: what to train and judge on.
        out: the run's folder.
        config: every choice; "auto" is replaced by what suits the data.
        device: where to train.
        resume: go on from the last finished epoch of `out`.
        start: the folder of a run whose stage 1 this one takes over instead of training it again.
        show_progress: progress bars on stderr, where that is a terminal.
        on_epoch: called with every epoch's figures.
        mesh: processes that train this run together; the first writes, or each the rows of item tables that it has, and
            all read, so all must see `out`.
        run_time: of the model: backend, precision, deterministic and graphs.

    Raises:
        FileExistsError: `out` holds a run and `resume` is False.
        ProcessError: another process stopped or does not answer.
        ValueError: the device has not the memory; `out` holds a run with another config or of other data, or `start`
            one whose stage 1 is another or not finished; both values are named.
    """

    def __init__(
        self,
        data: Dataset,
        out: Path,
        config: CFSFLConfig,
        *,
        device: torch.device | str = "cpu",
        resume: bool = False,
        start: Path | None = None,
        show_progress: bool = True,
        on_epoch: OnEpoch | None = None,
        mesh: Mesh | None = None,
        **run_time: Any,
    ) -> None:
        self.data, self.out, self.mesh = data, out, mesh or Mesh()
        shards = self.mesh.items.size
        config = config.resolved(data.n_users)
        each = data.train.nnz / max(1, data.n_users)
        on_cpu = torch.device(device).type == "cpu"
        needed = plan(
            data.n_items,
            data.n_users,
            config,
            events_per_user=each,
            devices=self.mesh.everyone.size,
            item_shards=shards,
            mapped=on_cpu,
        )
        needed.check(free_memory(torch.device(device)) / (local_size() if on_cpu else 1))
        shard = Shard(self.mesh.items, data.n_items) if shards > 1 else None
        model = fresh_model(data.n_items, config, device=device, shard=shard, **run_time)
        model.item_ids = data.item_ids
        histories = as_interactions(data.train, data.n_items, model.device, as_stored=True)
        super().__init__(
            model,
            histories,
            data.validation,
            show_progress=show_progress and self.mesh.everyone.is_first,
            on_epoch=on_epoch,
            group=self.mesh.data,
        )
        self.progress |= {"lines": 0, "data": self._shape()}
        taken = None
        if start is not None and not self.mesh.everyone.first((out / STATE).exists):
            taken = self._stage_one_of(start)
        if self.mesh.everyone.first((out / checkpoint.CONFIG).exists):
            if not resume:
                raise FileExistsError(f"{out} holds a run already: resume it, or choose another folder")
            self._resume()
        else:
            self._describe(out, self.config)
        if start is not None and taken is not None:
            self._take_over(start, taken)

    def train(self) -> dict[str, Any]:
        """Runs every stage that is not finished, and gives the report: figures of every system on the test users."""
        try:
            self.run()
        except KeyboardInterrupt:
            log.warning("stopped; the run goes on from its last finished epoch with --resume")
            raise
        except (FloatingPointError, OutOfMemoryError) as error:
            raise type(error)(f"{error}; {self.out} keeps the epochs before") from None
        with backends.flushed_denormals(), backends.use_backend(self.model.backend):
            return self._report()

    # Where weights and progress go

    def begin(self, stage: str) -> None:
        """Describes the stage's model in its folder."""
        mine = dataclasses.replace(self.config, steps=self.steps_after(stage))
        self._describe(self.out / "stages" / stage, mine)

    def _describe(self, folder: Path, config: CFSFLConfig) -> None:
        def write() -> None:
            if not (folder / checkpoint.CONFIG).exists():
                folder.mkdir(parents=True, exist_ok=True)
                checkpoint.write_description(folder, self.data.n_items, config, self.data.item_ids)

        self.mesh.everyone.first(write)

    def keep(self, stage: str) -> None:
        """Writes the stage's best weights."""
        self._write_model(self.out / "stages" / stage)

    def _write_model(self, folder: Path) -> None:
        metadata = self.mesh.everyone.first(lambda: checkpoint.neighbours(folder))
        self._write(folder / checkpoint.MODEL, self.model.state_dict(), metadata)

    def _write(self, path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
        self.mesh.everyone.all_do(lambda: checkpoint.check_finite(path, tensors))  # nobody could go on from them
        if self.model.shard is None:
            self.mesh.everyone.first(lambda: checkpoint.write_tensors(path, tensors, metadata))
        else:
            resharding.write_tensors(path, tensors, metadata, self.model.shard, self.mesh, ITEM_TABLES)

    def _read(self, path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        if self.model.shard is None:
            return checkpoint.read_tensors(path)
        return resharding.read_tensors(path, self.model.shard, self.mesh.everyone, ITEM_TABLES)

    def load(self, stage: str) -> None:
        """Reads a stage's best weights."""
        self._load(self.out / "stages" / stage)

    def _load(self, folder: Path) -> None:
        path, mine = folder / checkpoint.MODEL, self.model.state_dict()
        tensors, _ = self._read(path)
        checkpoint.check_tensors(path, tensors, mine)
        self.model.load_state_dict(tensors)

    def keep_fold(self, number: int, model: CFSFL) -> None:
        """Writes a fold's weights beside the stage's, from where a run that goes on has them."""
        tensors = model.state_dict()
        self.mesh.everyone.first(lambda: checkpoint.write_tensors(self._fold(number), tensors, {}))

    def restore_fold(self, number: int, model: CFSFL) -> bool:
        """Reads a fold's weights, where they are written."""
        path = self._fold(number)
        if not self.mesh.everyone.first(path.exists):
            return False
        tensors, _ = checkpoint.read_tensors(path)
        checkpoint.check_tensors(path, tensors, model.state_dict())
        model.load_state_dict(tensors)
        return True

    def _forget_folds(self) -> None:
        for number in range(self.config.folds):
            self._fold(number).unlink(missing_ok=True)

    def _fold(self, number: int) -> Path:
        return self.out / "stages" / "reward" / f"fold-{number}.safetensors"

    def log_epoch(self, record: Epoch) -> None:
        """A line of metrics.jsonl."""
        super().log_epoch(record)

        def write() -> int:
            lines = self._lines()
            files.write_bytes(self.out / METRICS, b"".join(lines) + json.dumps(record.to_dict()).encode() + b"\n")
            return len(lines) + 1

        self.progress["lines"] = self.mesh.everyone.first(write)

    def _lines(self) -> list[bytes]:
        """The lines of metrics.jsonl that the state knows of; a run that was killed wrote more."""
        path = self.out / METRICS
        return path.read_bytes().splitlines(keepends=True)[: self.progress["lines"]] if path.exists() else []

    def save_state(self) -> None:
        """Writes weights, moments and progress."""
        assert self.optimisers is not None
        tensors = {f"model/{name}": value for name, value in self.model.state_dict().items()}
        tensors |= {f"optimiser/{name}": value for name, value in self.optimisers.state().items()}
        self._write_state(tensors)

    def _write_state(self, tensors: dict[str, torch.Tensor]) -> None:
        self._write(self.out / STATE, tensors, {"progress": json.dumps(self.progress)})

    def end(self, stage: str, after: list[str]) -> None:
        """The stage's best weights become the run's model."""
        memory = self.model.memory if stage == "reward" else None
        if memory is not None:
            tensors = memory.tensors()
            self.mesh.everyone.first(lambda: checkpoint.write_tensors(self.out / checkpoint.MEMORY, tensors, {}))
            self.mesh.everyone.first(self._forget_folds)
        if stage != "control" and (stage != "reward" or memory is not None):
            self._write_model(self.out)
        self._write_state({})

    # Another run's stage 1

    def _stage_one_of(self, start: Path) -> dict[str, Any]:
        """The progress of another run, whose stage 1 is finished and is this run's too."""
        theirs = _described(start)
        for name, mine in self.config.to_dict().items():
            found = theirs.get(name)
            if name == "epochs":
                name, mine, found = "epochs of stage 1", mine[0], found and found[0]
            if name not in LATER_FIELDS and found != mine:
                raise ValueError(f"{start} cannot be started from: its {name} = {found!r}, not {mine!r}")
        _, progress = read_state(start / STATE, self._read)
        if progress["data"] != self.progress["data"]:
            raise ValueError(_other_data(start, progress["data"], self.progress["data"]))
        if "first_step" not in progress:
            epoch = progress["epoch"]
            raise ValueError(f"{start} cannot be started from: its stage 1 is not finished, at epoch {epoch}")
        return progress

    def _take_over(self, start: Path, theirs: dict[str, Any]) -> None:
        """Makes another run's stage 1 this run's, as if it had been trained here."""
        stage, first = STAGES[0], theirs["first_step"]
        path = start / "stages" / stage / checkpoint.MODEL
        found = self._read(path)[0]
        # The rest of the model has its first weights in stage 1: the seed's, of whatever kind of virtual user this is.
        parts = (name.partition(".") for name in found)
        theta = {rest: found[f"{part}.{rest}"] for part, _, rest in parts if part == "recommender"}
        checkpoint.check_tensors(path, theta, self.model.recommender.state_dict())
        self.model.recommender.load_state_dict(theta)
        self.begin(stage)
        self.keep(stage)
        lines = (start / METRICS).read_bytes().splitlines(keepends=True)
        lines = [line for line in lines if json.loads(line)["stage"] == stage]
        self.mesh.everyone.first(lambda: files.write_bytes(self.out / METRICS, b"".join(lines)))
        self.progress.update(lines=len(lines), step=first, first_step=first, best={stage: theirs["best"][stage]})
        self._leave(stage)

    def _shape(self) -> list[int]:
        train = self.data.train
        return [*train.shape, int(train.nnz), int(train.indices.sum(dtype=np.int64))]

    def _resume(self) -> None:
        self.mesh.everyone.first(lambda: files.remove_staged(self.out))
        described = _described(self.out)
        for name, value in self.config.to_dict().items():
            if described.get(name) != value:
                raise ValueError(f"{self.out} was started with {name} = {described.get(name)!r}, not {value!r}")
        if not (self.out / STATE).exists():
            return
        tensors, progress = read_state(self.out / STATE, self._read)
        if progress["data"] != self.progress["data"]:
            raise ValueError(_other_data(self.out, progress["data"], self.progress["data"]))
        self.progress = progress
        if tensors:
            parts: dict[str, dict[str, torch.Tensor]] = {"model": {}, "optimiser": {}}
            for name, tensor in tensors.items():
                part, _, rest = name.partition("/")
                parts.setdefault(part, {})[rest] = tensor
            checkpoint.check_tensors(self.out / STATE, parts["model"], self.model.state_dict())
            self.model.load_state_dict(parts["model"])
            self.optimisers = Optimisers(self.model, progress["stage"])
            self.optimisers.restore(parts["optimiser"])
        if (self.out / checkpoint.MEMORY).exists():
            self.model.restore_memory(checkpoint.read_tensors(self.out / checkpoint.MEMORY)[0])
        self.mesh.everyone.first(lambda: files.write_bytes(self.out / METRICS, b"".join(self._lines())))

    def _report(self) -> dict[str, Any]:
        """Every system on the test users: mean and standard error, and the paired difference to its control."""
        path = self.out / REPORT
        if self.mesh.everyone.first(path.exists):
            return checkpoint.read_json(path)
        test = self.data.test
        label = "test" if self.show_progress else None
        popular = MostPopular(self.data.train)
        judged = {
            "most popular": evaluate(
                popular.recommend,
                test.fold_in,
                test.targets,
                device=self.device,
                progress=label,
                group=self.group,
            )
        }
        for stage, name in self.systems.items():
            if stage in self.progress["best"]:
                self.load(stage)
                if stage == "reward":
                    judged[f"{self.systems['recommender']} + memory"] = self.judge(test, 0, label)
                judged[name] = self.judge(test, self.steps_after(stage), label)
        report: dict[str, Any] = {
            "users": len(judged["most popular"].ndcg100),
            "seed": self.config.seed,
            "steps": self.config.steps,
            "best_epochs": {stage: best["epoch"] for stage, best in self.progress["best"].items()},
            "test": {name: {m: list(v) for m, v in found.summary().items()} for name, found in judged.items()},
        }
        last = self.stages[-1]
        if last != STAGES[0] and last in self.progress["best"]:
            *_, control, system = judged  # CF-SFL is the last, and before it stands what it is measured against
            gain = mean(judged[system].ndcg100 - judged[control].ndcg100)
            report["gain"] = {"of": system, "over": control, "NDCG@100": list(gain)}

        def write() -> None:
            write_per_user(self.out / USERS, test, judged)
            files.write_bytes(path, (json.dumps(report, indent=2) + "\n").encode())

        self.mesh.everyone.first(write)
        return report


def read_state(
    path: Path, read: Callable[[Path], tuple[dict[str, torch.Tensor], dict[str, str]]] = checkpoint.read_tensors
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The tensors and the progress that a run keeps to go on from; read: gives the file's tensors and metadata.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is truncated, altered, or no run's.
    """
    tensors, metadata = read(path)
    try:
        progress = json.loads(metadata["progress"])
        stage, best = progress["stage"], progress["best"]
        first = {} if stage == STAGES[0] else {"first_step": progress["first_step"]}
        whole = {**{name: progress[name] for name in ("epoch", "step", "lines")}, **first}
        counts = [*whole.values(), *progress["data"], *(kept["epoch"] for kept in best.values())]
        scores = [kept["score"] for kept in best.values()]
        fits = stage in (*STAGES, "done") and set(best) <= set(STAGES) and len(progress["data"]) == 4
        fits = fits and all(type(count) is int and 0 <= count < 2**63 for count in counts)
        fits = fits and all(type(score) is float for score in [*scores, progress.get("last", 0.0)])
        fits = fits and ("last" in progress or math.isnan(best.get(stage, {}).get("score", math.nan)))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        fits = False
    if not fits:
        raise ValueError(f"{path} is not what a run goes on from")
    return tensors, progress


def _described(folder: Path) -> dict[str, Any]:
    """A run's config.json; a field that is younger than the run has its default."""
    return {**CFSFLConfig().to_dict(), **checkpoint.read_json(folder / checkpoint.CONFIG)}


def _other_data(folder: Path, theirs: list[int], mine: list[int]) -> str:
    return f"{folder} was trained on other data: users, items, events, sum of ids {theirs}, not {mine}"


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl.

    Raises:
        FileNotFoundError: there is none.
        ValueError: a line is damaged; names it.
    """
    path = folder / METRICS
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: {folder} holds no run")
    found = []
    for number, text in enumerate(path.read_bytes().splitlines(), 1):
        try:
            line = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}: damaged ({error})") from None
        if not isinstance(line, dict) or not isinstance(line.get("stage"), str):
            raise ValueError(f"{path}, line {number}: damaged, no figures of an epoch")
        found.append(line)
    return found


def write_per_user(path: Path, held_out: HeldOut, judged: dict[str, Evaluation]) -> None:
    """Every judged user's metrics as `SYSTEM/METRIC` arrays of an npz, and the users' ids as `users`; no pickle."""
    users = np.asarray(held_out.user_ids)[np.diff(held_out.targets.indptr) > 0]
    arrays = {"users": users.astype(str) if users.dtype == object else users}
    for system, found in judged.items():
        arrays |= {f"{system}/{metric}": values.numpy() for metric, values in found.per_user().items()}
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    files.write_bytes(path, buffer.getvalue())


def table(report: dict[str, Any]) -> str:
    """A run's report as a person reads it."""
    names = ("Recall@20", "Recall@50", "NDCG@100")
    width = max(18, *(len(system) + 1 for system in report["test"]))
    lines = [f"{'test users: ' + str(report['users']):<{width}}" + "".join(f"{name:>20}" for name in names)]
    for system, found in report["test"].items():
        lines.append(f"{system:<{width}}" + "".join(f"{Mean(*found[name])!s:>20}" for name in names))
    if gain := report.get("gain"):
        value = Mean(*gain["NDCG@100"])
        lines.append(f"{gain['of']} minus {gain['over']!r}, NDCG@100, paired over users: {value}")
    return "\n".join(lines)
