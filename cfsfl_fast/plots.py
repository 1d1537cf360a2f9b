"""Figures 3 and 4 of the paper from what runs and sweeps wrote down; matplotlib, without a display."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cfsfl_fast import files

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Lines = Sequence[Mapping[str, Any]]
"""A run's metrics.jsonl."""

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Told apart by colour-blind eyes (Okabe and Ito 2008)."""

STYLES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def learning_curves(runs: Mapping[str, Sequence[Lines]], title: str = "") -> Figure:
    """Figure 3: validation NDCG@100 over epochs, and closer, over those of the joint phase.

    Args:
        runs: by label, a run for each seed. The joint phase shows their mean.
        title: above it.

    Raises:
        ValueError: no run has an epoch that was validated.
    """
    curves = {label: [_stages(lines) for lines in seeds] for label, seeds in runs.items()}
    firsts = [stages["recommender"] for seeds in curves.values() for stages in seeds if "recommender" in stages]
    if not firsts:
        raise ValueError("none of the runs has an epoch that was validated: there is nothing to draw")
    switch = max(len(first) for first in firsts) - 1
    figure = _figure(9.5, 4.2)
    whole, close = figure.subplots(1, 2, width_ratios=(1, 1.25))
    for first in {tuple(first) for first in firsts}:
        whole.plot(range(len(first)), first, color="0.45", linewidth=1.2)
    drawn = [
        (label if stage == "joint" else f"{label}, control", stage, [stages[stage] for stages in seeds])
        for label, seeds in curves.items()
        for stage in ("control", "joint")
        if all(stage in stages for stages in seeds)
    ]
    for i, (label, _, seeds) in enumerate(drawn):
        length = min(map(len, seeds))
        mean = np.mean([seed[:length] for seed in seeds], axis=0)
        style: dict[str, Any] = {"color": COLOURS[i % len(COLOURS)], "linestyle": STYLES[i // len(COLOURS) % 4]}
        whole.plot(switch + np.arange(length), mean, linewidth=1.2, **style)
        marker = MARKERS[i % len(MARKERS)]
        close.plot(switch + np.arange(length), mean, label=label, marker=marker, markersize=3.5, linewidth=1.4, **style)
    for axes in (whole, close):
        axes.axvline(switch, color="0.6", linewidth=1, linestyle=":")
        axes.set_xlabel("epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.25, linewidth=0.6)
    whole.annotate(
        "joint phase",
        (switch, whole.get_ylim()[0]),
        (-4, 6),
        textcoords="offset points",
        ha="right",
        rotation=90,
        color="0.4",
        fontsize=8,
    )
    whole.set_ylabel("NDCG@100, validation users")
    whole.set_title("all epochs (grey: stage 1, one line per seed)", fontsize=9)
    close.set_title("joint phase, mean over seeds" if _several(curves) else "joint phase", fontsize=9)
    _finish(figure, close, title)
    return figure


def accuracy_and_cost(
    swept: Sequence[Lines], trained: Lines = (), control: Mapping[str, Any] | None = None, title: str = ""
) -> Figure:
    """Figure 4: NDCG@100 and the time of an answer over T.

    Args:
        swept: for each seed, one model answering with the same several T: "steps", "NDCG@100", "NDCG@100 error",
            "microseconds per user". Drawn is their mean, and the fastest.
        trained: models trained and answering with their own T: "steps", "NDCG@100", and as "NDCG@100 error" the
            standard error of the difference to the control.
        control: the recommender without the loop, "NDCG@100".
        title: above it.
    """
    figure = _figure(6.4, 5.4)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(1.4, 1))
    steps = _column(swept[0], "steps")
    found, errors = (np.mean([_column(s, name) for s in swept], axis=0) for name in ("NDCG@100", "NDCG@100 error"))
    if control is None:
        above.fill_between(steps, found - errors, found + errors, color=COLOURS[0], alpha=0.15, linewidth=0)
    look: dict[str, Any] = {"color": COLOURS[0], "marker": "o", "markersize": 4}
    above.plot(steps, found, label="one model, answering with T steps", **look)
    below.plot(steps, np.min([_column(s, "microseconds per user") for s in swept], axis=0), **look)
    if trained:
        look = {"color": COLOURS[1], "marker": "s", "markersize": 5, "linestyle": "none", "capsize": 2.5}
        points = (_column(trained, name) for name in ("steps", "NDCG@100", "NDCG@100 error"))
        above.errorbar(*points, label="trained with T steps (bar: paired error to no loop)", **look)
    if control is not None:
        above.axhline(control["NDCG@100"], color=COLOURS[6], linewidth=1.2, linestyle="--", label="trained on, no loop")
    above.set_ylabel("NDCG@100, test users")
    below.set_ylabel("µs per user")
    below.set_ylim(bottom=0)
    below.set_xlabel("feedback steps T")
    below.set_xticks(sorted({int(t) for t in steps}))
    for axes in (above, below):
        axes.grid(alpha=0.25, linewidth=0.6)
    _finish(figure, above, title, ncols=2)
    return figure


def save(figure: Figure, out: Path) -> list[Path]:
    """Writes a figure as OUT.png and OUT.svg, and gives their paths."""
    paths = []
    for kind in ("png", "svg"):
        image = io.BytesIO()
        figure.savefig(image, format=kind, dpi=160, metadata={"Date": None} if kind == "svg" else None)
        paths.append(out.with_name(f"{out.name}.{kind}"))
        files.write_bytes(paths[-1], image.getvalue())
    return paths


def _stages(lines: Lines) -> dict[str, list[float]]:
    """Validation NDCG@100 by stage and epoch, from the stage's start."""
    found: dict[str, list[float]] = {}
    for line in lines:
        if "validation" in line:
            found.setdefault(line["stage"], []).append(line["validation"]["NDCG@100"])
    return found


def _several(curves: Mapping[str, Sequence[Any]]) -> bool:
    return any(len(seeds) > 1 for seeds in curves.values())


def _column(lines: Lines, name: str) -> np.ndarray:
    return np.array([float(line[name]) for line in lines])


def _figure(width: float, height: float) -> Figure:
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("plots need matplotlib: pip install 'cfsfl-fast[plot]'") from None
    matplotlib.rcParams["svg.hashsalt"] = "cfsfl"  # the same figure is the same file
    return Figure(figsize=(width, height), layout="constrained")


def _finish(figure: Figure, axes: Axes, title: str, ncols: int = 3) -> None:
    """Legend below everything, where it covers no data."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=ncols, frameon=False, fontsize=8)
    for each in figure.axes:
        each.spines[["top", "right"]].set_visible(False)
        each.tick_params(labelsize=8)
    if title:
        figure.suptitle(title, fontsize=11)
