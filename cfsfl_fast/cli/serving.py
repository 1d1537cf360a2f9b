"""`cfsfl export`: a trained model as a program that serves without this package."""

from __future__ import annotations

from pathlib import Path

import click

from cfsfl_fast.cli.options import device_option, torch_device
from cfsfl_fast.export import save_exported
from cfsfl_fast.model import CFSFL


@click.command("export")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The .pt2 file to write.")
@click.option("-n", "n", default=100, help="Items per user.")
@click.option("--steps", type=int, help="T; the model's own by default.")
@click.option("--include-seen", is_flag=True, help="Also items that the history holds.")
@device_option
def export_command(run: Path, out: Path, n: int, steps: int | None, include_seen: bool, device: str) -> None:
    """Write a trained model as one program of torch.export: item ids [B, L] in, ids and scores [B, n] out."""
    model = CFSFL.from_pretrained(run, torch_device(device))
    save_exported(model, out, min(n, model.n_items), steps=steps, exclude_seen=not include_seen)
    click.echo(f"{out}: {out.stat().st_size / 1e6:.1f} MB, {model.n_items} items, {min(n, model.n_items)} per user")
