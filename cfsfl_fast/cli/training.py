"""`cfsfl train | demo`: Algorithm 1."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import torch

from cfsfl_fast import checkpoint
from cfsfl_fast.callbacks import TensorBoard
from cfsfl_fast.cli.options import (
    config_field,
    config_options,
    device_option,
    item_shards_option,
    run_time_options,
    torch_device,
)
from cfsfl_fast.config import PRESETS, CFSFLConfig
from cfsfl_fast.datasets import open_dataset, save_dataset, synthetic_dataset
from cfsfl_fast.distributed import processes
from cfsfl_fast.model import CFSFL
from cfsfl_fast.runs import Run, table


@click.command()
@click.argument("data", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The run's folder.")
@click.option("--preset", type=click.Choice(sorted(PRESETS)), default="default", help="Where the defaults come from.")
@click.option(
    "--config", "config_file", type=click.Path(path_type=Path), help="A json file of fields; options win over it."
)
@click.option("--resume", is_flag=True, help="Go on from the last finished epoch of the run.")
@click.option(
    "--from", "start", type=click.Path(path_type=Path), help="A run whose stage 1 is taken over, not trained again."
)
@click.option("--tensorboard", is_flag=True, help="Also write the epochs' figures to OUT/tensorboard.")
@item_shards_option
@device_option
@run_time_options
@config_options
def train(
    data: Path,
    out: Path,
    preset: str,
    config_file: Path | None,
    resume: bool,
    start: Path | None,
    tensorboard: bool,
    item_shards: int,
    device: str,
    run_time: dict[str, Any],
    **options: Any,
) -> None:
    """Train CF-SFL by Algorithm 1 and print its figures beside the plain recommender's.

    DATA is a prepared folder, or a compact .npz. The options below are the fields of the config. Several processes
    share every batch: torchrun --nproc-per-node G -m cfsfl_fast train ...
    """
    fields = checkpoint.read_json(config_file) if config_file else {}
    for name in ("format_version", "n_items"):
        fields.pop(name, None)
    fields |= {name: config_field(name, text) for name, text in options.items() if text is not None}
    config = CFSFLConfig.from_dict({**PRESETS[preset], **fields})
    torch.set_flush_denormal(True)
    where = torch_device(device)
    with processes(where, item_shards) as mesh:
        is_first = mesh.everyone.is_first
        told = TensorBoard(out / "tensorboard") if tensorboard and is_first else None
        run = Run(
            open_dataset(data, verify=True),
            out,
            config,
            device=where,
            **run_time,
            resume=resume,
            start=start,
            mesh=mesh,
            on_epoch=told,
        )
        report = run.train()
        if is_first:
            click.echo(table(report))


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default=Path("demo"), help="A folder for data and run.")
def demo(out: Path) -> None:
    """Everything once, in a minute: make data, train, compare, recommend."""
    if not (out / "data").exists():
        save_dataset(synthetic_dataset(), out / "data")
    data = open_dataset(out / "data")
    click.echo(data.describe() + "\n")
    torch.set_flush_denormal(True)
    config = CFSFLConfig(epochs=(30, 3, 10))
    click.echo(table(Run(data, out / "run", config, resume=(out / "run").exists()).train()) + "\n")
    model = CFSFL.from_pretrained(out / "run")
    history = data.test.fold_in[0]
    ids, scores = model.recommend(history, 10)
    click.echo(f"user {data.test.user_ids[0]} has {history.nnz} items; ten more for them, with scores:")
    click.echo(
        "  ".join(f"{data.item_ids[i]} ({s:.2f})" for i, s in zip(ids[0].tolist(), scores[0].tolist(), strict=True))
    )
