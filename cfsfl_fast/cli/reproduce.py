"""`cfsfl reproduce | sweep | plot`: the paper's tables and figures, ablations, and pictures of runs."""

from __future__ import annotations

import csv
import io
import platform
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import torch
from click.core import ParameterSource

from cfsfl_fast import backends, files, plots, tables
from cfsfl_fast.cli.inference import check_items
from cfsfl_fast.cli.options import backend_option, config_field, config_options, device_option, torch_device
from cfsfl_fast.config import PRESETS, CFSFLConfig
from cfsfl_fast.datasets import open_dataset
from cfsfl_fast.experiments import Experiment, Laboratory
from cfsfl_fast.model import CFSFL
from cfsfl_fast.reproduce import EXPERIMENTS, FIGURE4_RANGE, QUICK, published
from cfsfl_fast.runs import read_metrics
from cfsfl_fast.sweep import HEADER, sweep


@click.command()
@click.argument("what", type=click.Choice(list(EXPERIMENTS)))
@click.argument("data", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="A folder; several tables may share it.")
@click.option("--seeds", type=click.IntRange(min=1), default=1, help="Seeds of every row: --seed and those after it.")
@click.option(
    "--skip",
    multiple=True,
    metavar="TEXT",
    help="Leave out the row TEXT, or all with TEXT in their name; repeat for more.",
)
@click.option("--quick", is_flag=True, help=f"A reduced schedule: {QUICK}; the options below win over it.")
@click.option("--preset", type=click.Choice(sorted(PRESETS)), default="default", help="Where the defaults come from.")
@click.option("--time-again", is_flag=True, help="Measure the times of answers again, when the machine is quiet.")
@device_option
@backend_option
@config_options
@click.pass_context
def reproduce(
    context: click.Context,
    /,
    what: str,
    data: Path,
    out: Path,
    seeds: int,
    skip: tuple[str, ...],
    quick: bool,
    preset: str,
    time_again: bool,
    device: str,
    backend: str,
    **options: Any,
) -> None:
    """Train everything that a table or figure needs, and write it.

    Stopped or killed, it goes on where it was. Rows that differ in stage 3 alone share stage 1, and tables in one
    folder share what they have in common. Writes WHAT.csv and WHAT.md to the folder, for figures also WHAT.png and
    WHAT.svg. The options below are config fields of every row, but for what a row is about.
    """
    given = {name: config_field(name, text) for name, text in options.items() if text is not None}
    fields = {**PRESETS[preset], **(QUICK if quick else {}), **given}
    torch.set_flush_denormal(True)
    dataset = open_dataset(data, verify=True)
    laboratory = Laboratory(dataset, out, fields, device=torch_device(device), backend=backend)
    experiment = EXPERIMENTS[what](fields).without(skip).given(given)
    about = _about(context, laboratory, given if not quick else {**QUICK, **given}, preset)
    laboratory.run(experiment, seeds, lambda: _write_table(laboratory, experiment, seeds, about))
    if time_again:
        laboratory.time_again(experiment, seeds)
        _write_table(laboratory, experiment, seeds, about)
    if what == "figure3":
        _figure3(laboratory, experiment, seeds)
    elif what == "figure4":
        _figure4(laboratory, experiment, seeds, time_again)
    click.echo((out / f"{what}.md").read_text(), nl=False)


def _write_table(laboratory: Laboratory, experiment: Experiment, seeds: int, about: str) -> None:
    results = {row.name: laboratory.results(row, seeds) for row in experiment.rows}
    figures, where = published(laboratory.data)
    shown = tables.lines(experiment, results)
    for kind, text in (
        ("csv", tables.to_csv(experiment, shown, figures, where)),
        ("md", tables.to_markdown(experiment, shown, figures, where, about)),
    ):
        files.write_bytes(laboratory.out / f"{experiment.name}.{kind}", text.encode())


def _about(context: click.Context, laboratory: Laboratory, changed: Mapping[str, Any], preset: str) -> str:
    """The command, the data, the schedule and the machine, in Markdown."""
    data, config = laboratory.data, CFSFLConfig.from_dict(laboratory.fields).resolved(laboratory.data.n_users)
    words = ["cfsfl", "reproduce"]
    for parameter in context.command.params:
        value = context.params[parameter.name or ""]
        given = context.get_parameter_source(parameter.name or "") is ParameterSource.COMMANDLINE
        if not given or parameter.name == "time_again":
            continue
        value = value.name if isinstance(value, Path) else value
        if isinstance(parameter, click.Argument):
            words.append(str(value))
        elif isinstance(value, tuple):
            words += [word for each in value for word in (parameter.opts[0], str(each))]
        elif isinstance(value, bool):
            words.append((parameter.opts if value else parameter.secondary_opts)[0])
        else:
            words += [parameter.opts[0], str(value)]
    device = laboratory.device
    threads = f"{torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)}"
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()}, {threads}"
    backend = backends.resolve(device) if laboratory.backend == "auto" else laboratory.backend
    other = ", ".join(f"{k} = {v}" for k, v in changed.items() if k not in ("epochs", "steps", "seed"))
    n_test = data.test.fold_in.shape[0]
    return (
        f"    {shlex.join(words)}\n\n"
        f"{data.name}: {data.n_users:,} training and {n_test:,} test users, {data.n_items:,} items. "
        f"Preset {preset}, epochs {'/'.join(map(str, config.epochs))}, T = {config.steps}"
        f"{', ' + other if other else ''}. {machine}, torch {torch.__version__}, backend {backend}."
    )


def _figure3(laboratory: Laboratory, experiment: Experiment, seeds: int) -> None:
    runs = {
        row.name: [read_metrics(result.folder) for result in laboratory.results(row, seeds).values()]
        for row in experiment.rows
    }
    plots.save(plots.learning_curves(runs, laboratory.data.name), laboratory.out / experiment.name)


def _figure4(laboratory: Laboratory, experiment: Experiment, seeds: int, time_again: bool) -> None:
    """Sweeps the models with the most steps over T; beside them, those that were trained with each T."""
    looped = [row for row in experiment.rows if row.changes["steps"]]
    if not looped:
        return
    swept = []
    for seed, result in laboratory.results(looped[-1], seeds).items():
        path = laboratory.out / f"{experiment.name}-sweep-seed-{seed}.csv"
        if time_again or not path.exists():
            model = CFSFL.from_pretrained(result.folder, laboratory.device, backend=laboratory.backend)
            files.write_bytes(path, _sweep_csv(sweep(model, laboratory.data.test, FIGURE4_RANGE)).encode())
        swept.append(_read_sweep(path))
    results = {row.name: laboratory.results(row, seeds) for row in experiment.rows}
    shown = {line.row.name: _point(line) for line in tables.lines(experiment, results)}
    trained = [shown[row.name] | {"steps": row.changes["steps"]} for row in looped]
    control = next((shown[row.name] for row in experiment.rows if row not in looped), None)
    figure = plots.accuracy_and_cost(swept, trained, control, laboratory.data.name)
    plots.save(figure, laboratory.out / experiment.name)


def _point(line: tables.Line) -> dict[str, Any]:
    """With the standard error of its difference to the control."""
    error = line.gains[0].over_users if line.gains[0] else 0.0
    return {"NDCG@100": line.metrics[tables.JUDGED].value, "NDCG@100 error": error}


# One model over T


def _steps(context: click.Context, parameter: click.Parameter, text: str) -> list[int]:
    """0..12 or 0,2,4."""
    first, dots, last = text.partition("..")
    try:
        found = list(range(int(first), int(last) + 1)) if dots else [int(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < 0:
        raise ValueError(f"--steps takes a range, as 0..12, or counts, as 0,2,8; got {text!r}")
    return found


@click.command("sweep")
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("data", type=click.Path(path_type=Path))
@click.option("--steps", default="0..12", callback=_steps, help="T to answer with: a range, or counts with commas.")
@click.option("--split", type=click.Choice(["test", "validation"]), default="test", help="Which users.")
@click.option("--out", type=click.Path(path_type=Path), help="A csv file; stdout by default.")
@device_option
@backend_option
def sweep_command(
    run: Path, data: Path, steps: list[int], split: str, out: Path | None, device: str, backend: str
) -> None:
    """Accuracy and time of a trained model answering with several T."""
    model = CFSFL.from_pretrained(run, torch_device(device), backend=backend)
    dataset = open_dataset(data, verify=True)
    check_items(model, dataset)
    torch.set_flush_denormal(True)
    text = _sweep_csv(sweep(model, getattr(dataset, split), steps, progress="sweep"))
    if out is None:
        click.echo(text, nl=False)
    else:
        files.write_bytes(out, text.encode())


def _sweep_csv(swept: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    rows = csv.DictWriter(text, HEADER, lineterminator="\n")
    rows.writeheader()
    rows.writerows(swept)
    return text.getvalue()


def _read_sweep(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    with path.open(newline="") as file:
        rows = csv.DictReader(file)
        if tuple(rows.fieldnames or ()) != HEADER:
            raise ValueError(f"{path}: expected the columns that `cfsfl sweep` writes, {', '.join(HEADER)}")
        return list(rows)


# Pictures


@click.command()
@click.argument("sources", type=click.Path(path_type=Path), nargs=-1, required=True)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The picture's path without its ending.")
@click.option("--title", default="", help="Above the picture.")
def plot(sources: tuple[Path, ...], out: Path, title: str) -> None:
    """Draw the learning curves of runs (Figure 3), or a csv of `cfsfl sweep` (Figure 4); png and svg.

    SOURCES are folders of runs, each with a metrics.jsonl, or one csv file.
    """
    if len(sources) == 1 and sources[0].suffix == ".csv":
        figure = plots.accuracy_and_cost([_read_sweep(sources[0])], title=title)
    else:
        figure = plots.learning_curves({path.name: [read_metrics(path)] for path in sources}, title)
    for path in plots.save(figure, out):
        click.echo(path)
