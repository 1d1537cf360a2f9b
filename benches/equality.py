"""How close runs of several processes come to that of one: the same command line, the same global batch, gloo.

python benches/equality.py [--data DATA]   trains with 1, 2 and 4 processes that share users, items or both, and prints,
                                           each against one process: the largest relative difference of an epoch's loss
                                           and of its mean rewards, the largest difference of NDCG@100 on validation
                                           users, the relative difference of the recommender's weights, how many
                                           validation users have another list after stage 1, and what evaluating the
                                           same model gives.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from cfsfl_fast import CFSFL, checkpoint
from cfsfl_fast.datasets import open_dataset, save_dataset, synthetic_dataset

LAYOUTS = ((2, 1), (4, 1), (2, 2), (4, 4), (4, 2))
"""Processes, and how many of them share the rows of the item tables."""

REWARDS = ("reward_loss", "expert_reward", "list_reward")
TRAIN = ["--epochs=3,1,1", "--no-control"]


def command(arguments: list[str], size: int) -> str:
    """What a command prints in so many processes of torchrun."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}"] if size > 1 else []
    asked = [sys.executable, *launcher, "-m", "cfsfl_fast", *arguments]
    environment = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", **os.environ}
    return subprocess.run(asked, env=environment, check=True, capture_output=True, text=True).stdout


def epochs(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def furthest(mine: list[dict[str, Any]], theirs: list[dict[str, Any]], names: tuple[str, ...]) -> float:
    """The largest relative difference of some figures over all epochs."""
    pairs = [(a[name], b[name]) for a, b in zip(mine, theirs, strict=True) for name in names if name in b]
    return max(abs(a - b) / abs(b) for a, b in pairs)


def recommender(run: Path, stage: str) -> Tensor:
    """A stage's weights of the recommender, one after the other."""
    tensors, _ = checkpoint.read_tensors(run / "stages" / stage / checkpoint.MODEL)
    return torch.cat([tensors[name].flatten().double() for name in sorted(tensors) if name.startswith("recommender.")])


@click.command()
@click.option("--data", type=click.Path(path_type=Path), help="A prepared folder; synthetic data by default.")
def main(data: Path | None) -> None:
    """Trains, compares and prints a table."""
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        if data is None:
            data = place / "data"
            save_dataset(synthetic_dataset(), data)
        one = place / "1"
        command(["train", str(data), f"--out={one}", *TRAIN], 1)
        held_out, lines, weights = open_dataset(data).validation, epochs(one), recommender(one, "joint")
        lists = CFSFL.from_pretrained(one / "stages" / "recommender").recommend(held_out.fold_in, 50)[0]
        answer = command(["evaluate", str(one), str(data), "--json"], 1)
        print("| processes | item shards | loss | rewards | NDCG@100 | weights | other lists | evaluate |")
        print("|---|---|---|---|---|---|---|---|")
        for size, shards in LAYOUTS:
            run = place / f"{size}-{shards}"
            command(["train", str(data), f"--out={run}", f"--item-shards={shards}", *TRAIN], size)
            mine = epochs(run)
            judged = [(a["validation"], b["validation"]) for a, b in zip(mine, lines, strict=True) if "validation" in b]
            model = CFSFL.from_pretrained(run / "stages" / "recommender")
            others = (model.recommend(held_out.fold_in, 50)[0] != lists).any(1)
            shared = command(["evaluate", str(one), str(data), "--json", f"--item-shards={shards}"], size)
            found = [
                f"{furthest(mine, lines, ('loss',)):.1e}",
                f"{furthest(mine, lines, REWARDS):.1e}",
                f"{max(abs(a['NDCG@100'] - b['NDCG@100']) for a, b in judged):.1e}",
                f"{float((recommender(run, 'joint') - weights).norm() / weights.norm()):.1e}",
                f"{int(others.sum())} of {len(others)}",
                "the same bytes" if shared == answer else "differs",
            ]
            print(f"| {size} | {shards} | " + " | ".join(found) + " |", flush=True)


if __name__ == "__main__":
    main()
