"""Where the time goes: kernels of one recommendation and of one update of stage 3, by the time they take.

python benches/profile_loop.py [--results FOLDER]    writes profile.txt there
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from problems import SHAPES, B, batch, histories, model
from torch.profiler import ProfilerActivity, profile

from cfsfl_fast import backends
from cfsfl_fast.graphs import capacity
from cfsfl_fast.training import Optimisers, Updates

REPEATS = 10


def timeline(run: Callable[[], Any], on_cuda: bool) -> str:
    """The kernels of REPEATS calls, after a warm-up, the longest first."""
    for _ in range(4):
        run()
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if on_cuda else [])
    with profile(activities=activities) as found:
        for _ in range(REPEATS):
            run()
        if on_cuda:
            torch.cuda.synchronize()
    key = "self_device_time_total" if on_cuda else "self_cpu_time_total"
    return found.key_averages().table(sort_by=key, row_limit=25, max_name_column_width=70)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path)
    results = parser.parse_args().results
    on_cuda = torch.cuda.is_available()
    device = torch.device("cuda" if on_cuda else "cpu")
    n_items = SHAPES["ml-20m" if on_cuda else "ml-1m"]
    made = model(n_items, "trained", device)
    made.precision = "bf16" if on_cuda else "fp32"
    x = histories(n_items).to(device)
    seen, users = batch(n_items, 0, B, device)[0].seen, torch.arange(B, device=device)
    updates = Updates(made, x, Optimisers(made, "joint"), "joint")
    updates.begin(1, (0,), capacity(int(x.host_counts[:B].sum())) if updates.fixed else None)
    text = ""
    runs = {"recommend": lambda: made.recommend(seen, 100), "update of stage 3": lambda: updates(users, users)}
    for what, run in runs.items():
        with backends.flushed_denormals():
            shown = timeline(run, on_cuda)
        text += f"{REPEATS} x {what}, M={n_items} B={B}\n{shown}\n"
    print(text)
    if results is not None:
        results.mkdir(parents=True, exist_ok=True)
        (results / "profile.txt").write_text(text)


if __name__ == "__main__":
    main()
