"""`cfsfl baseline`: what a recommender has to beat, with its choices made on validation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from cfsfl_fast import files
from cfsfl_fast.baselines import BASELINES, select
from cfsfl_fast.cli.options import device_option, torch_device
from cfsfl_fast.datasets import open_dataset
from cfsfl_fast.evaluation import evaluate
from cfsfl_fast.runs import REPORT, USERS, write_per_user


def _shown(choices: dict[str, Any]) -> str:
    return ", ".join(f"{name} = {value:g}" for name, value in choices.items()) or "no choices"


@click.command(
    epilog="\b\nChoices and their defaults:\n"
    + "\n".join(f"  {name:<14}{_shown(BASELINES[name].choices())}" for name in sorted(BASELINES))
)
@click.argument("name", type=click.Choice(sorted(BASELINES)))
@click.argument("data", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="A folder for report.json and users.npz.")
@click.option("--set", "given", multiple=True, metavar="NAME=VALUE", help="A choice that is made; repeat for more.")
@click.option("--search/--no-search", default=True, help="Choose on the validation users, or take the defaults.")
@click.option("--overwrite", is_flag=True, help="Replace the report of an earlier call.")
@device_option
def baseline(
    name: str, data: Path, out: Path, given: tuple[str, ...], search: bool, overwrite: bool, device: str
) -> None:
    """Fit NAME to the training users of DATA, choose on validation, report on both groups of held-out users."""
    if (out / REPORT).exists() and not overwrite:
        raise FileExistsError(f"{out} holds a report already: choose another folder, or --overwrite")
    kind, dataset, place = BASELINES[name], open_dataset(data, verify=True), torch_device(device)
    found = select(kind, dataset, dict(_choice(text) for text in given), search=search, device=place)
    test = dataset.test
    judged = evaluate(found.fitted.recommend, test.fold_in, test.targets, device=place, progress="test")
    report = {
        "system": kind.label,
        "choices": found.choices,
        "tried": [{**choices, "NDCG@100": score} for choices, score in found.tried],
        "seconds": found.seconds,
        "users": len(judged.ndcg100),
        "validation": {metric: list(value) for metric, value in found.validation.summary().items()},
        "test": {kind.label: {metric: list(value) for metric, value in judged.summary().items()}},
    }
    out.mkdir(parents=True, exist_ok=True)
    write_per_user(out / USERS, test, {kind.label: judged})
    files.write_bytes(out / REPORT, (json.dumps(report, indent=2) + "\n").encode())
    for choices, score in found.tried:
        click.echo(f"{_shown(choices):<40} validation NDCG@100 {score:.4f}")
    click.echo(f"{kind.label}, {_shown(found.choices)}, fitted in {found.seconds:.1f} s")
    for split, evaluation in (("validation", found.validation), ("test", judged)):
        figures = "   ".join(f"{metric} {value}" for metric, value in evaluation.summary().items())
        click.echo(f"{split:<11} {figures}")


def _choice(text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    try:
        return name, int(value) if value.lstrip("-").isdigit() else float(value)
    except ValueError:
        raise ValueError(f"--set takes NAME=NUMBER; got {text!r}") from None
