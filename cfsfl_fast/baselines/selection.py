"""A baseline's choices, made on validation users."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch

from cfsfl_fast.baselines.fitted import Fitted
from cfsfl_fast.datasets import Dataset
from cfsfl_fast.evaluation import Evaluation, evaluate


@dataclass(frozen=True)
class Selection:
    """The best of the tried choices.

    Attributes:
        fitted: the baseline with them.
        choices: its hyper-parameters.
        validation: its metrics on the validation users.
        seconds: that fitting it took.
        tried: every choice with its validation NDCG@100.
    """

    fitted: Fitted
    choices: dict[str, Any]
    validation: Evaluation
    seconds: float
    tried: list[tuple[dict[str, Any], float]]


def select(
    kind: type[Fitted],
    data: Dataset,
    given: dict[str, Any],
    *,
    search: bool = True,
    device: torch.device | str = "cpu",
    show_progress: bool = True,
) -> Selection:
    """Fits a baseline for every choice of its grid and keeps the best by NDCG@100 of the validation users.

    Args:
        kind: of `BASELINES`.
        data: what to fit to and to judge on.
        given: choices that are made already; the grid varies the others.
        search: try the grid; else only `given` and the defaults.
        device: where lists are made.
        show_progress: progress bars on stderr, where that is a terminal.

    Raises:
        ValueError: a choice is unknown or out of range.
    """
    if unknown := sorted(set(given) - set(kind.choices())):
        names = ", ".join(sorted(kind.choices())) or "none"
        raise ValueError(f"{kind.label} has no choice {unknown[0]!r}; it has: {names}")
    grid: list[dict[str, Any]] = []
    for choices in kind.grid if search else ({},):
        choices = {**choices, **given}
        if choices not in grid:
            grid.append(choices)
    found: Selection | None = None
    tried = []
    for choices in grid:
        began = time.perf_counter()
        fitted = kind(data.train, **choices, show_progress=show_progress)
        seconds = time.perf_counter() - began
        held_out = data.validation
        label = f"{kind.label}, validation" if show_progress else None
        judged = evaluate(fitted.recommend, held_out.fold_in, held_out.targets, device=device, progress=label)
        score = judged.summary()["NDCG@100"].value
        tried.append((choices, score))
        if found is None or score > found.validation.summary()["NDCG@100"].value:
            found = Selection(fitted, choices, judged, seconds, tried)
    assert found is not None
    return found
