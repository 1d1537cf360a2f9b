"""What updates on a wide catalogue take, beside what `cfsfl plan` says: peak memory of this process, and time.

python benches/measure_updates.py --items 1000000 --hidden-dim 128 ...   one line of json; the options of `cfsfl plan`
"""

from __future__ import annotations

import itertools
import json
import statistics
import time
from pathlib import Path
from typing import Any

import click
import torch

from cfsfl_fast import backends
from cfsfl_fast.cli.options import config_field, config_options
from cfsfl_fast.config import CFSFLConfig
from cfsfl_fast.interactions import from_pairs
from cfsfl_fast.plan import measured_rates, plan
from cfsfl_fast.scarcity import free_memory
from cfsfl_fast.stages import fresh_model
from cfsfl_fast.updates import Optimisers, run_epoch


def peak() -> float:
    """The most bytes that this process ever had in memory; getrusage would count its parent's before exec too."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return 1024.0 * int(line.split()[1])


@click.command()
@click.option("--items", type=int, required=True)
@click.option("--users", default=2000)
@click.option("--events-per-user", default=50)
@click.option("--stage", default="joint", type=click.Choice(["recommender", "joint"]))
@config_options
def main(items: int, users: int, events_per_user: int, stage: str, **options: Any) -> None:
    """Runs an epoch of one stage on random histories and prints what it took beside the plan."""
    config = CFSFLConfig(**{name: config_field(name, text) for name, text in options.items() if text is not None})
    if stage == "recommender":
        config = CFSFLConfig.from_dict({**config.to_dict(), "epochs": (1, 0, 0)})
    config = config.resolved(users)
    planned = plan(items, users, config, events_per_user=events_per_user)
    planned.check(free_memory(torch.device("cpu")) / 2)  # a process that is killed tells nothing
    generator = torch.Generator().manual_seed(0)
    rows = torch.arange(users).repeat_interleave(events_per_user)
    before = peak()
    histories = from_pairs(rows, torch.randint(items, (len(rows),), generator=generator), users, items)
    model = fresh_model(items, config, device="cpu", backend="auto").train()
    optimisers = Optimisers(model, stage)
    ends = [time.perf_counter()]
    with backends.flushed_denormals():
        run_epoch(
            model,
            histories,
            optimisers,
            stage,
            torch.arange(users),
            (0, 1, 2),
            1,
            lambda *_: ends.append(time.perf_counter()),
        )
    after = peak()
    rate, bandwidth = measured_rates(torch.device("cpu"))
    took = [end - begin for begin, end in itertools.pairwise(ends)]
    found = {
        "bytes": after - before,
        "planned bytes": planned.total - planned.memory["process"],
        "seconds": statistics.median(took[1:] or took),
        "planned seconds": sum(planned.seconds(rate, bandwidth).values()),
        "process bytes": before,
        "parts": planned.memory,
        "GFLOP/s": rate / 1e9,
        "GB/s": bandwidth / 1e9,
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
