"""`cfsfl doctor`: what can run here."""

from __future__ import annotations

import importlib.metadata
import platform
import sys

import click
import torch

from cfsfl_fast import backends


@click.command()
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
