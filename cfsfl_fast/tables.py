"""Tables of experiments: means, standard errors over users and over seeds, paired differences; CSV and Markdown."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cfsfl_fast.experiments import Experiment, Result, Row

METRICS = ("Recall@20", "Recall@50", "NDCG@100")
JUDGED = "NDCG@100"
"""What differences are of."""

Published = tuple[float | None, float | None, float | None]
"""Of METRICS."""


class Estimate(NamedTuple):
    """A mean over seeds and users, and what it would vary by with other users and with other seeds."""

    value: float
    over_users: float  # standard error over users, of their mean over seeds
    over_seeds: float  # standard error over seeds, of their mean over users; NaN of one seed

    def __str__(self) -> str:
        seeds = "" if math.isnan(self.over_seeds) else f" ± {_short(self.over_seeds)}"
        return f"{_short(self.value)} ± {_short(self.over_users)}{seeds}"


def estimate(values: NDArray[Any]) -> Estimate:
    """Of values by seed and user. [S, N]"""

    def error(means: NDArray[Any]) -> float:
        return float(means.std(ddof=1)) / math.sqrt(len(means)) if len(means) > 1 else math.nan

    return Estimate(float(values.mean()), error(values.mean(0)), error(values.mean(1)))


def paired(results: Mapping[int, Result], controls: Mapping[int, Result], metric: str = JUDGED) -> Estimate | None:
    """A row minus its control, seed by seed and user by user; None while they have no seed in common.

    Raises:
        ValueError: the two were judged on different users.
    """
    seeds = sorted(set(results) & set(controls))
    if not seeds:
        return None
    for seed in seeds:
        if not np.array_equal(results[seed].users, controls[seed].users):
            raise ValueError(f"{results[seed].folder} and {controls[seed].folder} were judged on different users")
    return estimate(np.stack([results[s].metrics[metric] - controls[s].metrics[metric] for s in seeds]))


@dataclass(frozen=True)
class Line:
    """A row as it is shown.

    Attributes:
        row: the system.
        seeds: how many of its cells are finished.
        metrics: by name; empty while none is.
        gains: one for each of the experiment's columns of differences; None where the row has no such control.
        results: its finished cells.
    """

    row: Row
    seeds: int
    metrics: dict[str, Estimate]
    gains: list[Estimate | None]
    results: dict[int, Result]

    def epochs(self, stage: str) -> float:
        """Of a stage, the mean over seeds; NaN where the row does not have it."""
        found = [result.epochs[stage] for result in self.results.values() if stage in result.epochs]
        return float(np.mean(found)) if found else math.nan

    def seconds(self, stage: str) -> float:
        """Of the fastest epoch of a stage; NaN where the row does not have it."""
        return min((r.seconds[stage] for r in self.results.values() if stage in r.seconds), default=math.nan)

    @property
    def microseconds(self) -> float:
        """To answer one user: the fastest seed's; NaN of a part of a run, which was not timed by itself."""
        if self.row.part:
            return math.nan
        return min((result.microseconds for result in self.results.values()), default=math.nan)


def lines(experiment: Experiment, results: Mapping[str, Mapping[int, Result]]) -> list[Line]:
    """The rows of an experiment with what is known of them; results: by row and seed."""
    found = []
    for row in experiment.rows:
        mine = dict(results[row.name])
        metrics = {}
        if mine:
            metrics = {name: estimate(np.stack([r.metrics[name] for r in mine.values()])) for name in METRICS}
        gains: list[Estimate | None] = [
            paired(mine, results.get(row.controls[i], {})) if i < len(row.controls) else None
            for i in range(len(experiment.controls))
        ]
        found.append(Line(row, len(mine), metrics, gains, mine))
    return found


def to_csv(experiment: Experiment, shown: Sequence[Line], published: Mapping[str, Published], where: str) -> str:
    """Every figure in full; where: the data set of the published ones."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    header = ["system", "seeds"]
    for name in METRICS:
        header += [name, f"{name} error over users", f"{name} error over seeds"]
    for control in experiment.controls:
        name = f"{JUDGED} minus {control}"
        header += ["control", name, f"{name} error over users", f"{name} error over seeds"]
    header += ["stage 1 epochs", "stage 1 seconds per epoch", "stage 3 epochs", "stage 3 seconds per epoch"]
    header += ["microseconds per user", *(f"published {name}" for name in METRICS), "published on"]
    rows.writerow(header)
    for line in shown:
        cells: list[Any] = [line.row.name, line.seeds]
        for name in METRICS:
            cells += _blank_nan(line.metrics.get(name) or (math.nan,) * 3)
        for i, gain in enumerate(line.gains):
            cells += [*line.row.controls[i : i + 1], *[""] * (len(line.row.controls) <= i)]
            cells += _blank_nan(gain or (math.nan,) * 3)
        for stage in ("recommender", "joint"):
            cells += _blank_nan([line.epochs(stage), line.seconds(stage)])
        figures = published.get(line.row.published)
        cells += [*_blank_nan([line.microseconds]), *(figures or ("",) * 3), where if figures else ""]
        rows.writerow(cells)
    return text.getvalue()


def _blank_nan(values: Sequence[float]) -> list[float | str]:
    return ["" if math.isnan(value) else value for value in values]


def to_markdown(
    experiment: Experiment, shown: Sequence[Line], published: Mapping[str, Published], where: str, about: str
) -> str:
    """As a person reads it; about: what was run, above the table."""
    header = ["system", *METRICS, *(f"{JUDGED} minus {control}" for control in experiment.controls)]
    header += ["s per epoch, stage 1", "stage 3", "µs per user"]
    with_published = any(line.row.published in published for line in shown)
    header += [f"published {' / '.join(METRICS)}, {where}"] if with_published else []
    names = {line.row.name for line in shown}
    text = [f"## {experiment.title}", "", about, "", _cells(header), _cells(["---"] * len(header))]
    for line in shown:
        cells = [line.row.name, *(str(line.metrics.get(name, "-")) for name in METRICS)]
        for gain, control, column in zip(line.gains, line.row.controls, experiment.controls, strict=False):
            other = f" (minus {control})" if column in names and column != control else ""
            cells.append("" if gain is None else f"{_signed(gain)}{other}")
        cells += [""] * (len(experiment.controls) - len(line.row.controls))
        cells += [_seconds(line.seconds(stage)) for stage in ("recommender", "joint")]
        cells += ["" if math.isnan(line.microseconds) else f"{line.microseconds:.0f}"]
        figures = published.get(line.row.published)
        cells += [" / ".join(map(_short, figures)) if figures else ""] if with_published else []
        text.append(_cells(cells))
    seeds = max(line.seeds for line in shown)
    errors = "± standard error over test users"
    errors += f" ± over {seeds} seeds (rows with one error have one seed)" if seeds > 1 else "; one seed"
    text += ["", f"{errors}. Differences are paired: the same users, the same seeds. Times are the fastest."]
    return "\n".join(text) + "\n"


def _cells(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _signed(gain: Estimate) -> str:
    return f"{'+' if gain.value >= 0 else ''}{gain}"


def _short(value: float | None) -> str:
    """Four digits, as .4037; - of what is not known."""
    if value is None or math.isnan(value):
        return "-"
    return f"{value:.4f}".replace("0.", ".", 1)


def _seconds(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.2f}"
