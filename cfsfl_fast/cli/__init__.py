"""The command line: `cfsfl ...` and `python -m cfsfl_fast ...`. A file for every group of commands."""

from __future__ import annotations

import logging
from typing import Any

import click

from cfsfl_fast import backends
from cfsfl_fast.cli import baseline, data, doctor, inference, planning, reproduce, serving, training
from cfsfl_fast.distributed import ProcessError

_EXPECTED = (
    ValueError,
    OSError,
    FloatingPointError,
    MemoryError,
    ImportError,
    backends.BackendError,
    ProcessError,
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


for command in (
    data.prepare_command,
    data.generate,
    data.describe,
    training.train,
    training.demo,
    baseline.baseline,
    inference.evaluate_command,
    inference.recommend,
    reproduce.reproduce,
    reproduce.sweep_command,
    reproduce.plot,
    serving.export_command,
    serving.serve,
    planning.plan_command,
    doctor.doctor,
):
    main.add_command(command)
