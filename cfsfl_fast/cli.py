"""The command line: `cfsfl prepare | generate | describe | train | evaluate | recommend | demo | doctor`."""

from __future__ import annotations

import csv
import dataclasses
import importlib.metadata
import io
import json
import logging
import platform
import sys
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from cfsfl_fast import backends, checkpoint, files
from cfsfl_fast.config import PRESETS, CFSFLConfig
from cfsfl_fast.datasets import (
    FORMATS,
    Dataset,
    Protocol,
    open_dataset,
    prepare,
    read_histories,
    save_dataset,
    synthetic_dataset,
)
from cfsfl_fast.datasets import PRESETS as PROTOCOLS
from cfsfl_fast.evaluation import evaluate
from cfsfl_fast.model import CFSFL
from cfsfl_fast.runs import Run, table

_EXPECTED = (
    ValueError,
    FileNotFoundError,
    FileExistsError,
    PermissionError,
    FloatingPointError,
    ImportError,
    backends.BackendError,
)


class _Commands(click.Group):
    """Wrong use and wrong files end in one line on stderr and exit code 2."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except _EXPECTED as error:
            click.echo(f"cfsfl: {error}", err=True)
            ctx.exit(2)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.version_option(package_name="cfsfl-fast")
@click.option("-v", "--verbose", is_flag=True, help="Say more: which backend runs, and why.")
def main(verbose: bool) -> None:
    """Collaborative filtering with a synthetic feedback loop, made fast."""
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, format="%(name)s: %(message)s")


_device = click.option("--device", default="auto", help="auto, cpu, cuda or cuda:N.")
_backend = click.option("--backend", type=click.Choice(backends.BACKENDS), default="auto", help="Who computes.")


def _torch_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N; got {name!r}") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {name!r} is asked for, but this torch ({torch.__version__}) finds no CUDA device")
    return device


def _column(text: str | None) -> str | int | None:
    return int(text) if text is not None and text.isdigit() else text


# Data


@main.command("prepare")
@click.argument("source", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The folder to write.")
@click.option("--preset", type=click.Choice(sorted(PROTOCOLS)), help="The protocol of a published data set, or none.")
@click.option("--min-rating", type=float, help="Keep events rated above this.")
@click.option("--min-item-users", type=int, help="Then drop items of fewer users.")
@click.option("--min-user-items", type=int, help="Then drop users of fewer items.")
@click.option("--held-out", type=int, help="Users in each of validation and test.")
@click.option("--seed", type=int, help="Of the split.")
@click.option("--format", "format_", type=click.Choice(["auto", *FORMATS]), default="auto", help="What SOURCE is.")
@click.option("--user-column", help="Name or number of the column of users, in csv, tsv and parquet.")
@click.option("--item-column", help="Of items.")
@click.option("--rating-column", help="Of ratings.")
@click.option("--delimiter", help="Between columns.")
@click.option("--header/--no-header", default=None, help="Whether the first line names the columns.")
@click.option("--overwrite", is_flag=True, help="Replace a prepared folder.")
def prepare_command(
    source: Path,
    out: Path,
    preset: str | None,
    format_: str,
    user_column: str | None,
    item_column: str | None,
    rating_column: str | None,
    delimiter: str | None,
    header: bool | None,
    overwrite: bool,
    **options: Any,
) -> None:
    """Read raw interactions, split the users, write a folder that opens at once."""
    chosen = {name: value for name, value in options.items() if value is not None}
    protocol = None
    if preset or chosen:
        protocol = dataclasses.replace(Protocol.preset(preset or "none"), **chosen)
    data = prepare(
        source,
        out,
        protocol=protocol,
        format=format_,
        user_column=_column(user_column),
        item_column=_column(item_column),
        rating_column=_column(rating_column),
        delimiter=delimiter,
        header=header,
        overwrite=overwrite,
    )
    click.echo(data.describe())


@main.command()
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The folder to write.")
@click.option("--users", default=3000, help="Users, held-out ones included.")
@click.option("--items", default=1500, help="Items.")
@click.option("--events-per-user", default=40.0, help="Items of a user, on average.")
@click.option("--seed", default=0, help="Of the data.")
@click.option("--overwrite", is_flag=True, help="Replace a prepared folder.")
def generate(out: Path, users: int, items: int, events_per_user: float, seed: int, overwrite: bool) -> None:
    """Make a realistic data set: long tails, latent structure."""
    data = synthetic_dataset(users, items, events_per_user=events_per_user, seed=seed)
    save_dataset(data, out, overwrite=overwrite)
    click.echo(data.describe())


@main.command()
@click.argument("data", type=click.Path(path_type=Path))
def describe(data: Path) -> None:
    """Users, items, events and how they are spread."""
    click.echo(open_dataset(data).describe())


# Training and what comes of it


def _config_options(command: Callable[..., None]) -> Callable[..., None]:
    """An option for every field of the config."""
    hints = typing.get_type_hints(CFSFLConfig)
    for field in reversed(dataclasses.fields(CFSFLConfig)):
        name = "--" + field.name.replace("_", "-")
        shown = ",".join(map(str, field.default)) if field.name == "epochs" else field.default
        if hints[field.name] is bool:
            option = click.option(f"{name}/--no-{name[2:]}", default=None, help=f"[default: {shown}]")
        else:
            option = click.option(name, default=None, metavar=str(shown).upper(), help=f"[default: {shown}]")
        command = option(command)
    return command


def _parsed(name: str, text: Any) -> Any:
    """A config field from its option's text."""
    kind = typing.get_type_hints(CFSFLConfig)[name]
    if isinstance(text, bool) or kind is str or text == "auto":
        return text
    try:
        if name == "epochs":
            return tuple(int(part) for part in text.split(","))
        return float(text) if kind is float else int(text)
    except ValueError:
        wanted = "three counts, as 100,5,25" if name == "epochs" else "a number"
        raise ValueError(f"--{name.replace('_', '-')} takes {wanted}; got {text!r}") from None


@main.command()
@click.argument("data", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The run's folder.")
@click.option("--preset", type=click.Choice(sorted(PRESETS)), default="default", help="Where the defaults come from.")
@click.option(
    "--config", "config_file", type=click.Path(path_type=Path), help="A json file of fields; options win over it."
)
@click.option("--resume", is_flag=True, help="Go on from the last finished epoch of the run.")
@_device
@_backend
@_config_options
def train(
    data: Path,
    out: Path,
    preset: str,
    config_file: Path | None,
    resume: bool,
    device: str,
    backend: str,
    **options: Any,
) -> None:
    """Train CF-SFL by Algorithm 1 and print its figures beside the plain recommender's.

    DATA is a prepared folder, or a compact .npz. The options below are the fields of the config.
    """
    fields = checkpoint.read_json(config_file) if config_file else {}
    for name in ("format_version", "n_items"):
        fields.pop(name, None)
    fields |= {name: _parsed(name, text) for name, text in options.items() if text is not None}
    config = CFSFLConfig.from_dict({**PRESETS[preset], **fields})
    torch.set_flush_denormal(True)
    run = Run(open_dataset(data), out, config, device=_torch_device(device), backend=backend, resume=resume)
    click.echo(table(run.train()))


@main.command("evaluate")
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("data", type=click.Path(path_type=Path))
@click.option("--split", type=click.Choice(["test", "validation"]), default="test", help="Which users.")
@click.option("--steps", type=int, help="T; the model's own by default.")
@click.option("--batch-size", default=512, help="Users at once; it changes no figure.")
@click.option("--json", "as_json", is_flag=True, help="Print json.")
@_device
@_backend
def evaluate_command(
    run: Path, data: Path, split: str, steps: int | None, batch_size: int, as_json: bool, device: str, backend: str
) -> None:
    """Recall and NDCG of a trained model on held-out users."""
    model = CFSFL.from_pretrained(run, _torch_device(device), backend=backend)
    dataset = open_dataset(data)
    _check_items(model, dataset)
    held_out = getattr(dataset, split)
    found = evaluate(
        lambda x, n: model.recommend(x, n, steps=steps),
        held_out.fold_in,
        held_out.targets,
        device=model.device,
        batch_size=batch_size,
        progress=split,
    )
    summary = found.summary()
    if as_json:
        users = len(found.ndcg100)
        click.echo(json.dumps({"users": users, **{name: list(value) for name, value in summary.items()}}))
    else:
        click.echo("\n".join(f"{name:<10} {value}" for name, value in summary.items()))


def _check_items(model: CFSFL, data: Dataset) -> None:
    if data.n_items != model.n_items:
        raise ValueError(f"the model knows {model.n_items} items, the data have {data.n_items}")
    if model.item_ids is None:
        return
    mine, theirs = model.item_ids.astype(str), np.asarray(data.item_ids).astype(str)
    if len(differing := np.flatnonzero(mine != theirs)):
        row = differing[0]
        raise ValueError(f"the model was trained on other items: item {row} is {mine[row]}, in the data {theirs[row]}")


@main.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--history", type=click.Path(path_type=Path), required=True, help="A csv of user and item ids.")
@click.option("-n", "n", default=10, help="Items per user.")
@click.option("--out", type=click.Path(path_type=Path), help="A csv of user, item, rank, score; stdout by default.")
@click.option("--steps", type=int, help="T; the model's own by default.")
@click.option("--include-seen", is_flag=True, help="Also items that the history holds.")
@_device
@_backend
def recommend(
    run: Path, history: Path, n: int, out: Path | None, steps: int | None, include_seen: bool, device: str, backend: str
) -> None:
    """The best items for the users of a file, new ones too, by their own ids."""
    model = CFSFL.from_pretrained(run, _torch_device(device), backend=backend)
    if model.item_ids is None:
        raise ValueError(f"{run} has no {checkpoint.ITEM_IDS}: its items have no ids of their own")
    users, histories, unknown = read_histories(history, model.item_ids)
    if unknown:
        click.echo(f"cfsfl: {unknown} pairs of {history} name items that the model does not know; left out", err=True)
    ids, scores = (t.cpu().numpy() for t in model.recommend(histories, n, exclude_seen=not include_seen, steps=steps))
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


@main.command()
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


@main.command()
def doctor() -> None:
    """Versions, devices, and which kernels can run here, and why not."""
    for name in ("cfsfl-fast", "torch", "triton", "numpy", "scipy", "safetensors", "polars"):
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            version = "not installed"
        click.echo(f"{name:<12} {version}")
    click.echo(f"{'python':<12} {sys.version.split()[0]} on {platform.system()} {platform.machine()}")
    devices = [torch.device("cpu")] + [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    for device in devices:
        threads = torch.get_num_threads()
        shown = f"{threads} threads" if device.type == "cpu" else torch.cuda.get_device_name(device)
        click.echo(f"\n{device}: {shown}; auto takes {backends.resolve(device)!r}")
        for backend in backends.BACKENDS[1:]:
            click.echo(f"  {backend:<10} {backends.why_not(backend, device) or 'can run'}")
