"""The paper's schedule on a synthetic set of ML-20M's size: every stage's epochs, and what 150 + 5 + 50 would take."""

from __future__ import annotations

import statistics
import time

import pytest
import torch
from conftest import Report

from cfsfl_fast import CFSFL, CFSFLConfig
from cfsfl_fast.datasets.device_generator import SHAPES, Shape, synthetic_rows
from cfsfl_fast.interactions import Interactions
from cfsfl_fast.training import Optimisers, run_epoch

SMALL = Shape(2_000, 500, 40.0, 0)
"""On a CPU: that everything runs."""


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_papers_schedule(precision: str, report: Report, device: torch.device) -> None:
    """A first epoch of each stage, in which kernels compile and graphs are captured, is reported apart."""
    on_cuda = device.type == "cuda"
    if precision != "fp32" and not on_cuda:
        pytest.skip("narrow products are a CUDA device's")
    shape = SHAPES["ml-20m"] if on_cuda else SMALL
    n_users = shape.users - 2 * shape.held_out
    began = time.perf_counter()
    items, offsets = synthetic_rows(n_users, shape.items, events_per_user=shape.events_per_user, device=device)
    x = Interactions(items, offsets, shape.items)
    _wait(device)
    made_in = time.perf_counter() - began
    config = CFSFLConfig.preset("paper", **({} if on_cuda else {"hidden_dim": 64, "steps": 2})).resolved(n_users)
    torch.manual_seed(0)
    model = CFSFL.from_config(shape.items, config, precision=precision).to(device).train()
    seconds, first, step = {}, {}, 0
    for stage in ("recommender", "reward", "joint"):
        optimisers, times = Optimisers(model, stage), []
        for epoch in range(4):
            order = torch.randperm(n_users, generator=torch.Generator().manual_seed(epoch)).to(device)
            began = time.perf_counter()
            sums, step = run_epoch(model, x, optimisers, stage, order, (0, epoch), step, lambda users, loss: None)
            times.append(time.perf_counter() - began)  # the sums are read: the epoch is over
            assert bool(torch.stack(list(sums)).isfinite().all())
        first[stage], seconds[stage] = times[0], statistics.median(times[1:])
    whole = sum(n * seconds[stage] for n, stage in zip(config.epochs, seconds, strict=True)) + sum(first.values())
    report(
        f"schedule, {precision}, U={n_users} M={shape.items} E={len(items)} B={config.batch_size} T={config.steps}",
        {name: [s] for name, s in {"recommender": seconds["recommender"], "joint": seconds["joint"]}.items()},
        "recommender",
        users=n_users,
        rival_is="an epoch of the stage",
        first_epochs=[round(s, 2) for s in first.values()],
        data_made_in=round(made_in, 1),
        whole_schedule_seconds=round(whole, 1),
        epochs=list(config.epochs),
    )


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
