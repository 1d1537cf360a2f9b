"""`cfsfl export | serve`: a trained model as a program that runs without this package, or behind HTTP."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from cfsfl_fast.cli.options import device_option, run_time_options, torch_device
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


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--host", default="127.0.0.1", help="Where to listen; 0.0.0.0 is every network, without any log-in.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, help="0 takes a free one.")
@click.option("--max-n", default=1000, help="Items that a request may ask for.")
@click.option("--max-items", default=10_000, help="Items of a history.")
@click.option("--max-body", default=1 << 20, help="Bytes of a request.")
@click.option("--batch", default=64, help="Users that the model answers at once.")
@click.option("--max-waiting", default=1024, help="Requests that may wait; more are turned away with 503.")
@device_option
@run_time_options
def serve(
    run: Path,
    host: str,
    port: int,
    max_n: int,
    max_items: int,
    max_body: int,
    batch: int,
    max_waiting: int,
    device: str,
    run_time: dict[str, Any],
) -> None:
    """Serve a trained model over HTTP: POST /recommend {"items": [...], "n": 10}; GET /health and /metrics."""
    from cfsfl_fast.serving import Limits, Server  # needs the extra

    try:
        import uvicorn
    except ImportError as error:
        raise ImportError(f"serving needs a web server ({error}): pip install 'cfsfl-fast[serve]'") from error

    limits = Limits(n=max_n, items=max_items, body=max_body, batch=batch, waiting=max_waiting)
    model = CFSFL.from_pretrained(run, torch_device(device), **run_time)
    uvicorn.run(Server(model, limits).app(), host=host, port=port, log_level="info", access_log=False)
