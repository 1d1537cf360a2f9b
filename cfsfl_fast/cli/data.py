"""`cfsfl prepare | generate | describe`: data sets."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import click

from cfsfl_fast.cli.options import device_option, torch_device
from cfsfl_fast.datasets import (
    FORMATS,
    Protocol,
    matrix_events,
    open_dataset,
    prepare,
    save_dataset,
    split_events,
    synthetic_blocks,
    synthetic_dataset,
    write_columns,
)
from cfsfl_fast.datasets import PRESETS as PROTOCOLS
from cfsfl_fast.datasets.device_generator import SHAPES, synthetic_csr


def _column(text: str | None) -> str | int | None:
    return int(text) if text is not None and text.isdigit() else text


@click.command("prepare")
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
@click.option(
    "--on-disk/--in-memory",
    default=None,
    help="Sort events on OUT's disk, in a gigabyte of memory [default: where SOURCE has 256 MB or more].",
)
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
    on_disk: bool | None,
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
        on_disk=on_disk,
        overwrite=overwrite,
    )
    click.echo(data.describe())


@click.command()
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The folder to write.")
@click.option("--users", default=3000, help="Users, held-out ones included.")
@click.option("--items", default=1500, help="Items.")
@click.option("--events-per-user", default=40.0, help="Items of a user, on average.")
@click.option("--preset", type=click.Choice(sorted(SHAPES)), help="A published set's sizes instead.")
@click.option("--seed", default=0, help="Of the data.")
@click.option("--raw", is_flag=True, help="Write the events as arrays, for `prepare`, as they come.")
@device_option
@click.option("--overwrite", is_flag=True, help="Replace a prepared folder.")
def generate(
    out: Path,
    users: int,
    items: int,
    events_per_user: float,
    preset: str | None,
    seed: int,
    raw: bool,
    device: str,
    overwrite: bool,
) -> None:
    """Make a realistic data set: long tails, latent structure. With --preset on a GPU where there is one."""
    if raw and preset:
        raise ValueError(f"--raw makes events of --users and --items; got --preset {preset}")
    if raw:
        blocks = synthetic_blocks(users, items, events_per_user=events_per_user, seed=seed)
        click.echo(f"{write_columns(out, blocks, overwrite=overwrite):,} events of {users:,} users and {items:,} items")
        return
    if preset is None:
        data = synthetic_dataset(users, items, events_per_user=events_per_user, seed=seed)
    else:
        shape = SHAPES[preset]
        rows = synthetic_csr(shape, seed=seed, device=torch_device(device))
        data = split_events(matrix_events(rows, f"synthetic {preset}"), Protocol(held_out=shape.held_out))
    save_dataset(data, out, overwrite=overwrite)
    click.echo(data.describe())


@click.command()
@click.argument("data", type=click.Path(path_type=Path))
@click.option("--verify", is_flag=True, help="Also compare the files with their checksums, and check every row.")
def describe(data: Path, verify: bool) -> None:
    """Users, items, events and how they are spread."""
    dataset = open_dataset(data, verify=verify)
    if verify:
        dataset.validate()
    click.echo(dataset.describe())
