"""Options that several commands share, and what their texts mean."""

from __future__ import annotations

import dataclasses
import functools
import typing
from collections.abc import Callable
from typing import Any

import click
import torch

from cfsfl_fast import backends
from cfsfl_fast.config import CHOICES, CFSFLConfig
from cfsfl_fast.distributed import local_rank, under_torchrun
from cfsfl_fast.numerics import PRECISIONS

item_shards_option = click.option(
    "--item-shards", default=1, help="Processes of torchrun that share the rows of every item table."
)
device_option = click.option("--device", default="auto", help="auto, cpu, cuda or cuda:N.")
backend_option = click.option("--backend", type=click.Choice(backends.BACKENDS), default="auto", help="Who computes.")

_RUN_TIME = {
    "backend": backend_option,
    "precision": click.option(
        "--precision", type=click.Choice(PRECISIONS), default="fp32", help="Of the products with the output layer."
    ),
    "deterministic": click.option("--deterministic", is_flag=True, help="The same bits on every run of a GPU; slower."),
    "graphs": click.option("--graphs/--no-graphs", default=True, help="CUDA graphs, on a GPU."),
}


def run_time_options(command: Callable[..., None]) -> Callable[..., None]:
    """What a run's folder does not hold, as one argument `run_time` of the command."""

    @functools.wraps(command)
    def gathered(*arguments: Any, **options: Any) -> None:
        run_time = {name: options.pop(name) for name in _RUN_TIME}
        run_time["graphs"] = "auto" if run_time["graphs"] else False
        command(*arguments, run_time=run_time, **options)

    found: Callable[..., None] = gathered
    for option in reversed(_RUN_TIME.values()):
        found = option(found)
    return found


def torch_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and under_torchrun():
        name = f"cuda:{local_rank()}"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N; got {name!r}") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {name!r} is asked for, but this torch ({torch.__version__}) finds no CUDA device")
    return device


def config_options(command: Callable[..., None]) -> Callable[..., None]:
    """An option for every field of the config."""
    hints = typing.get_type_hints(CFSFLConfig)
    for field in reversed(dataclasses.fields(CFSFLConfig)):
        name = "--" + field.name.replace("_", "-")
        shown = ",".join(map(str, field.default)) if field.name == "epochs" else field.default
        if hints[field.name] is bool:
            option = click.option(f"{name}/--no-{name[2:]}", default=None, help=f"[default: {shown}]")
        else:
            known = f"{', '.join(CHOICES[field.name])}  " if field.name in CHOICES else ""
            option = click.option(name, default=None, metavar=str(shown).upper(), help=f"{known}[default: {shown}]")
        command = option(command)
    return command


def config_field(name: str, text: Any) -> Any:
    """A config field from its option's text."""
    kind = typing.get_type_hints(CFSFLConfig)[name]
    if isinstance(text, bool) or kind is str or text == "auto":
        return text
    try:
        if name == "epochs":
            return tuple(int(part) for part in text.split(","))
        return int(text) if kind in (int, int | str) else float(text)
    except ValueError:
        wanted = "three counts, as 100,5,25" if name == "epochs" else "a number"
        raise ValueError(f"--{name.replace('_', '-')} takes {wanted}; got {text!r}") from None
