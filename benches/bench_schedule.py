"""The paper's whole schedule on a synthetic set of ML-20M's size, and what narrow products change of its metrics."""

from __future__ import annotations

import os
import statistics
import time
from typing import Any, NamedTuple

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from conftest import Report

from cfsfl_fast import CFSFL, CFSFLConfig, noise
from cfsfl_fast.datasets import HeldOut
from cfsfl_fast.datasets.device_generator import SHAPES, Shape, synthetic_rows
from cfsfl_fast.evaluation import Evaluation
from cfsfl_fast.interactions import Interactions
from cfsfl_fast.stages import Epoch, Trainer, fresh_model

SMALL = Shape(1_200, 300, 30.0, 100)
"""Of a rehearsal."""

SECONDS = float(os.environ.get("CFSFL_BENCH_SECONDS", 240))
"""For this file; the schedule takes at most SHARE of it, by fewer epochs of each stage where it must."""

SHARE = 0.6

EPOCHS = (150, 5, 50)

PROBE = (3, 2, 3)
"""Epochs of each stage from which the schedule's time is told beforehand, and after which precisions are compared."""


class Data(NamedTuple):
    """Users to train on, and others to validate and test on."""

    train: Interactions
    validation: HeldOut
    test: HeldOut
    made_in: float


@pytest.fixture(scope="module")
def data(gpu_shape: str, device: torch.device) -> Data:
    """The set's users."""
    shape = SMALL if gpu_shape == "tiny" else SHAPES[gpu_shape]
    began = time.perf_counter()
    rows = synthetic_rows(shape.users, shape.items, events_per_user=shape.events_per_user, device=device)
    x = Interactions(*rows, shape.items)
    wait(device)
    took = time.perf_counter() - began
    first = shape.users - 2 * shape.held_out
    parts = [torch.arange(first), *torch.arange(first, shape.users).split(shape.held_out)]
    train, *others = (x.take(users) for users in parts)
    return Data(train, *(held_out(part) for part in others), took)


def held_out(x: Interactions) -> HeldOut:
    """Users with a fifth of their items to be found, and those who have none of these left out."""
    users = torch.arange(len(x), device=x.items.device)
    seen = noise.uniform(9, x.spread(users), x.items, device=x.items.device) < 0.8
    fold_in, targets = (
        sp.csr_matrix((np.ones(len(part.items), np.float32), *(t.cpu().numpy() for t in part.csr)), (len(x), x.n_items))
        for part in (x.where(seen), x.where(~seen))
    )
    kept = np.flatnonzero(np.diff(targets.indptr))
    return HeldOut(fold_in[kept], targets[kept], kept)


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Trained(NamedTuple):
    """A model after a schedule."""

    model: CFSFL
    trainer: Trainer
    epochs: list[Epoch]
    seconds: float  # of everything, validation included
    peak: float  # MB

    def epoch(self, stage: str) -> list[float]:
        """Seconds of the stage's epochs but the first, in which graphs are captured."""
        return [e.figures["seconds"] for e in self.epochs if e.stage == stage and e.epoch > 1]


def trained(data: Data, epochs: tuple[int, int, int], precision: str, device: torch.device) -> Trained:
    """Algorithm 1 by the product's own trainer, the paper's reading, validated after every epoch."""
    small = {} if device.type == "cuda" else {"hidden_dim": 48, "steps": 2, "batch_size": 300}
    config = CFSFLConfig.preset("paper", epochs=epochs, control=False, patience=0, **small).resolved(len(data.train))
    graphs = "auto" if device.type == "cuda" else True
    model = fresh_model(data.train.n_items, config, device=device, precision=precision, graphs=graphs)
    told: list[Epoch] = []
    trainer = Trainer(model, data.train, data.validation, show_progress=False, on_epoch=told.append)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    began = time.perf_counter()
    trainer.run()
    wait(device)
    took = time.perf_counter() - began
    peak = torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else 0.0
    return Trained(model, trainer, told, took, peak)


def whole_schedule(run: Trained) -> float:
    """Seconds that EPOCHS would take, by a run of fewer."""
    besides = run.seconds - sum(e.figures.get("seconds", 0.0) for e in run.epochs)  # validation, keeping the best
    besides /= sum(e.epoch > 0 for e in run.epochs)
    stages = zip(("recommender", "reward", "joint"), EPOCHS, strict=True)
    return sum(n * (statistics.median(run.epoch(stage)) + besides) for stage, n in stages)


def judged(run: Trained, data: Data, precision: str) -> Evaluation:
    """Test users' metrics, the model recommending in a precision."""
    before, run.model.precision = run.model.precision, precision
    try:
        return run.trainer.judge(data.test, run.model.config.steps, None)
    finally:
        run.model.precision = before


def figures(evaluation: Evaluation) -> dict[str, Any]:
    """As columns of a row."""
    summary = evaluation.summary()
    return {name: round(m.value, 4) for name, m in summary.items()} | {
        f"error of {name}": round(m.error, 4) for name, m in summary.items()
    }


def passes(stage: str, steps: int) -> int:
    """Products over the catalogue in an update; the dense backward is two."""
    return (steps + 1 if stage == "joint" else 1) + 2


@pytest.fixture(scope="module")
def probed() -> dict[str, Trained]:
    """Short runs by precision."""
    return {}


def probe(probed: dict[str, Trained], data: Data, precision: str, device: torch.device) -> Trained:
    """A short run, once."""
    if precision not in probed:
        probed[precision] = trained(data, PROBE, precision, device)
    return probed[precision]


def test_the_papers_schedule_on_a_gpu(
    data: Data, probed: dict[str, Trained], report: Report, device: torch.device
) -> None:
    """Its epochs, as many as there is time for in proportion, and what all of them take."""
    precision = "bf16" if device.type == "cuda" else "fp32"
    seconds = SECONDS if device.type == "cuda" else 20
    share = min(1.0, seconds * SHARE / whole_schedule(probe(probed, data, precision, device)))
    epochs = tuple(max(2, round(n * share)) for n in EPOCHS)
    run = trained(data, epochs, precision, device)  # type: ignore[arg-type]
    config, n_users, n_items = run.model.config, len(data.train), data.train.n_items
    case = f"U={n_users} M={n_items} B={config.batch_size} T={config.steps}"
    for stage in ("recommender", "joint"):
        flops = 2.0 * passes(stage, config.steps) * n_users * n_items * config.hidden_dim
        report(f"epoch of {stage}, {case}", {precision: run.epoch(stage)}, precision, flops=flops, users=n_users)
    report(
        f"schedule of {'+'.join(map(str, epochs))} epochs, {case}",
        {precision: [run.seconds]},
        precision,
        whole_schedule_seconds=round(run.seconds if epochs == EPOCHS else whole_schedule(run), 1),
        ran_whole=epochs == EPOCHS,
        in_epochs=round(sum(e.figures.get("seconds", 0.0) for e in run.epochs), 1),
        data_made_in=round(data.made_in, 1),
        events=len(data.train.items),
        **{"peak MB": round(run.peak)},
        **figures(judged(run, data, precision)),
    )
    assert all(np.isfinite(list(e.figures.values())).all() for e in run.epochs)


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_a_precisions_metrics_on_a_gpu(
    precision: str, data: Data, probed: dict[str, Trained], report: Report, device: torch.device
) -> None:
    """After the same epochs, trained and asked in a precision: within a standard error of float32's."""
    if precision == "tf32" and device.type != "cuda":
        pytest.skip("a mode of a CUDA device")
    plain, run = (probe(probed, data, p, device) for p in ("fp32", precision))
    expected, found, again = judged(plain, data, "fp32"), judged(run, data, precision), judged(plain, data, precision)
    for stage in ("recommender", "joint"):
        report(f"epoch of {stage}, {PROBE}", {precision: run.epoch(stage)}, precision, users=len(data.train))
    report("trained and asked in", {}, rival=precision, **figures(found))
    report("trained in fp32, asked in", {}, rival=precision, **figures(again))
    for name, m in expected.summary().items():
        for other in (found, again):
            value = other.summary()[name].value
            assert abs(value - m.value) <= m.error, f"{name} in {precision}: {value:.4f}, in fp32 {m}"
