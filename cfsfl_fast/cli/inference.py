"""`cfsfl evaluate | recommend`: what a trained model gives."""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from cfsfl_fast import checkpoint, files
from cfsfl_fast.cli.options import device_option, item_shards_option, run_time_options, torch_device
from cfsfl_fast.datasets import Dataset, open_dataset, read_histories
from cfsfl_fast.distributed import Mesh, processes, span
from cfsfl_fast.evaluation import evaluate
from cfsfl_fast.model import CFSFL


@click.command("evaluate")
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("data", type=click.Path(path_type=Path))
@click.option("--split", type=click.Choice(["test", "validation"]), default="test", help="Which users.")
@click.option("--steps", type=int, help="T; the model's own by default.")
@click.option("--batch-size", default=512, help="Users at once; it changes no figure.")
@click.option("--json", "as_json", is_flag=True, help="Print json.")
@item_shards_option
@device_option
@run_time_options
def evaluate_command(
    run: Path,
    data: Path,
    split: str,
    steps: int | None,
    batch_size: int,
    as_json: bool,
    item_shards: int,
    device: str,
    run_time: dict[str, Any],
) -> None:
    """Recall and NDCG of a trained model on held-out users. Processes of torchrun share the users."""
    where = torch_device(device)
    dataset = open_dataset(data, verify=True)
    held_out = getattr(dataset, split)
    with processes(where, item_shards) as mesh:
        model = _model(run, where, mesh, run_time)
        check_items(model, dataset)
        found = evaluate(
            lambda x, n: model.recommend(x, n, steps=steps),
            held_out.fold_in,
            held_out.targets,
            device=model.device,
            batch_size=batch_size,
            progress=split if mesh.everyone.is_first else None,
            group=mesh.data,
        )
    if not mesh.everyone.is_first:
        return
    summary = found.summary()
    if as_json:
        users = len(found.ndcg100)
        click.echo(json.dumps({"users": users, **{name: list(value) for name, value in summary.items()}}))
    else:
        click.echo("\n".join(f"{name:<10} {value}" for name, value in summary.items()))


def _part(text: str, n: int) -> tuple[int, int]:
    """Where the I-th of N parts of n things begins and ends, of a text I/N."""
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    i, parts = (int(number) for number in found.groups()) if found else (0, 0)
    if not 1 <= i <= parts:
        raise ValueError(f"--shard takes I/N with 1 <= I <= N, as 1/4; got {text!r}")
    return span(n, i - 1, parts)


def _model(run: Path, device: torch.device, mesh: Mesh, run_time: dict[str, Any]) -> CFSFL:
    """The model of a folder, or this process's part of it."""
    if mesh.items.size == 1:
        return CFSFL.from_pretrained(run, device, **run_time)
    return CFSFL.part_from_pretrained(run, mesh, device, **run_time)


def check_items(model: CFSFL, data: Dataset) -> None:
    if data.n_items != model.n_items:
        raise ValueError(f"the model knows {model.n_items} items, the data have {data.n_items}")
    if model.item_ids is None:
        return
    mine, theirs = model.item_ids.astype(str), np.asarray(data.item_ids).astype(str)
    if len(differing := np.flatnonzero(mine != theirs)):
        row = differing[0]
        raise ValueError(f"the model was trained on other items: item {row} is {mine[row]}, in the data {theirs[row]}")


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--history", type=click.Path(path_type=Path), required=True, help="A csv of user and item ids.")
@click.option("-n", "n", default=10, help="Items per user.")
@click.option("--out", type=click.Path(path_type=Path), help="A csv of user, item, rank, score; stdout by default.")
@click.option("--steps", type=int, help="T; the model's own by default.")
@click.option("--include-seen", is_flag=True, help="Also items that the history holds.")
@click.option("--shard", help="I/N: only the I-th of N parts of the users, as 1/4; the parts are the whole.")
@item_shards_option
@device_option
@run_time_options
def recommend(
    run: Path,
    history: Path,
    n: int,
    out: Path | None,
    steps: int | None,
    include_seen: bool,
    shard: str | None,
    item_shards: int,
    device: str,
    run_time: dict[str, Any],
) -> None:
    """The best items for the users of a file, new ones too, by their own ids. Processes of torchrun share the users."""
    where = torch_device(device)
    with processes(where, item_shards) as mesh:
        model = _model(run, where, mesh, run_time)
        if model.item_ids is None:
            raise ValueError(f"{run} has no {checkpoint.ITEM_IDS}: its items have no ids of their own")
        users, histories, unknown = read_histories(history, model.item_ids)
        if shard is not None:
            part = slice(*_part(shard, len(users)))
            users, histories = users[part], histories[part]
        begin, end = mesh.data.span(len(users))
        mine = model.recommend(histories[begin:end], n, exclude_seen=not include_seen, steps=steps)
        ids, scores = (mesh.data.joined(found, len(users)).cpu().numpy() for found in mine)
    if not mesh.everyone.is_first:
        return
    if unknown:
        click.echo(f"cfsfl: {unknown} pairs of {history} name items that the model does not know; left out", err=True)
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["user", "item", "rank", "score"])
    for user, items, values in zip(users, ids, scores, strict=True):
        for rank, (item, score) in enumerate(zip(items[items >= 0], values, strict=False), 1):
            rows.writerow([user, model.item_ids[item], rank, f"{score:.6g}"])
    if out is None:
        click.echo(text.getvalue(), nl=False)
    else:
        files.write_bytes(out, text.getvalue().encode())
