"""Where the time goes: kernels of one recommendation and of one update of stages 1 and 3, by the time they take.

python benches/profile_loop.py [--results FOLDER] [--rehearse]    writes profile.txt and bench_profile.jsonl there
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from machine import facts
from problems import ITEMS, B, batch, histories, model
from torch.profiler import ProfilerActivity, profile

from cfsfl_fast import backends
from cfsfl_fast.graphs import Graphs, capacity
from cfsfl_fast.updates import Optimisers, Updates

REPEATS = 10
SHOWN = 25


class Timeline(NamedTuple):
    """What some calls were made of."""

    kernels: list[tuple[str, float, float]]  # name, launches of a call, microseconds of a call; the longest first
    wall: float  # microseconds of a call, by the clock, without the profiler

    @property
    def busy(self) -> float:
        """Microseconds of a call in which a kernel ran."""
        return sum(us for _, _, us in self.kernels)

    def table(self) -> str:
        """The longest SHOWN, each with its share of all."""
        lines = [f"{'us':>9} {'share':>6} {'launches':>8}  kernel"]
        for name, launches, us in self.kernels[:SHOWN]:
            lines.append(f"{us:>9.1f} {us / max(self.busy, 1e-9):>6.1%} {launches:>8.1f}  {name[:110]}")
        rest = self.kernels[SHOWN:]
        lines.append(f"{sum(us for _, _, us in rest):>9.1f} {'':>6} {sum(n for _, n, _ in rest):>8.1f}  all others")
        lines.append(
            f"{self.busy:>9.1f} of {self.wall:.1f} us by the clock: the rest is gaps between kernels and the host"
        )
        return "\n".join(lines)


def timeline(run: Callable[[], Any], on_cuda: bool) -> Timeline:
    """Of REPEATS calls, after a warm-up."""

    def wait() -> None:
        if on_cuda:
            torch.cuda.synchronize()

    for _ in range(4):
        run()
    wait()
    began = time.perf_counter()
    for _ in range(REPEATS):
        run()
    wait()
    wall = (time.perf_counter() - began) / REPEATS * 1e6
    with profile(activities=[ProfilerActivity.CUDA if on_cuda else ProfilerActivity.CPU]) as found:
        for _ in range(REPEATS):
            run()
        wait()
    taken = "self_device_time_total" if on_cuda else "self_cpu_time_total"
    events = [(e.key, e.count / REPEATS, getattr(e, taken) / REPEATS) for e in found.key_averages()]
    return Timeline(sorted((e for e in events if e[2] > 0), key=lambda e: -e[2]), wall)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path)
    parser.add_argument("--rehearse", action="store_true", help="a tiny model on the CPU")
    given = parser.parse_args()
    on_cuda = torch.cuda.is_available() and not given.rehearse
    device, n_users = torch.device("cuda" if on_cuda else "cpu"), 16 if given.rehearse else B
    n_items = ITEMS["tiny" if given.rehearse else "ml-20m" if on_cuda else "ml-1m"]
    made = model(n_items, "trained", device)
    made.precision, made.graphs = "bf16" if on_cuda else "fp32", Graphs(True)
    x = histories(n_items).to(device)
    seen, users = batch(n_items, 0, n_users, device)[0].seen, torch.arange(n_users, device=device)

    def update(stage: str) -> Callable[[], Any]:
        trained = copy.deepcopy(made)
        updates = Updates(trained, x, Optimisers(trained, stage), stage)
        updates.begin(1, (0,), capacity(int(x.host_counts[:n_users].sum())))
        return lambda: updates(users, users)

    runs = {
        "recommend 100": lambda: made.recommend(seen, 100, batch_size=n_users),
        "inference": lambda: made.eval()(seen),
        "update of stage 1": update("recommender"),
        "update of stage 3": update("joint"),
    }
    text, rows = "", []
    for what, run in runs.items():
        with backends.flushed_denormals(), torch.set_grad_enabled(what.startswith("update")):
            found = timeline(run, on_cuda)
        case = f"{what}, {made.precision}, M={n_items} B={n_users}"
        text += f"{case}\n{found.table()}\n\n"
        kernels = [{"kernel": k, "launches": n, "us": round(us, 2)} for k, n, us in found.kernels[:SHOWN]]
        rows.append(
            {
                "case": f"profile, {case}",
                "us": round(found.wall, 1),
                "busy us": round(found.busy, 1),
                "kernels": kernels,
            }
        )
    print(text)
    if given.results is not None:
        given.results.mkdir(parents=True, exist_ok=True)
        (given.results / "profile.txt").write_text(text)
        where = facts()
        with (given.results / "bench_profile.jsonl").open("a") as file:
            for row in rows:
                file.write(json.dumps({**row, **where}) + "\n")


if __name__ == "__main__":
    main()
