"""A baseline's choices, made on validation users."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from cfsfl_fast.baselines.fitted import Fitted
from cfsfl_fast.datasets import Dataset
from cfsfl_fast.evaluation import Evaluation, evaluate

log = logging.getLogger(__name__)


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

    @property
    def score(self) -> float:
        """Validation NDCG@100."""
        return self.validation.summary()["NDCG@100"].value


def select(
    kind: type[Fitted],
    data: Dataset,
    given: dict[str, Any],
    *,
    search: bool = True,
    device: torch.device | str = "cpu",
    show_progress: bool = True,
) -> Selection:
    """Climbs to the best NDCG@100 of the validation users: from the defaults, one choice up or down its ladder at a
    time, as long as that is better. A best choice at the end of its ladder is told as a warning.

    Args:
        kind: of `BASELINES`.
        data: what to fit to and to judge on.
        given: choices that are made already.
        search: make the others so; else they are the defaults.
        device: where lists are made.
        show_progress: progress bars on stderr, where that is a terminal.

    Raises:
        ValueError: a choice is unknown or out of range.
    """
    if unknown := sorted(set(given) - set(kind.choices())):
        names = ", ".join(sorted(kind.choices())) or "none"
        raise ValueError(f"{kind.label} has no choice {unknown[0]!r}; it has: {names}")

    def judged(choices: dict[str, Any]) -> Selection:
        began = time.perf_counter()
        fitted = kind(data.train, **choices, show_progress=show_progress)
        seconds = time.perf_counter() - began
        held_out = data.validation
        label = f"{kind.label}, validation" if show_progress else None
        validation = evaluate(fitted.recommend, held_out.fold_in, held_out.targets, device=device, progress=label)
        return Selection(fitted, choices, validation, seconds, tried)

    tried: list[tuple[dict[str, Any], float]] = []
    ladders = {name: ladder for name, ladder in kind.ladders.items() if name not in given} if search else {}
    found: Selection | None = None
    best = {**{name: kind.choices()[name] for name in ladders}, **given}, float("-inf")
    waiting = [best[0]]
    while waiting:
        choices = waiting.pop(0)
        found = None  # two would need twice the memory
        found = judged(choices)
        tried.append((choices, found.score))
        if found.score > best[1]:
            best = tried[-1]
            known = [others for others, _ in tried]
            waiting = [others for others in _one_step_from(best[0], ladders) if others not in known]
    for name, ladder in ladders.items():
        if best[0][name] in (ladder[0], ladder[-1]):
            log.warning(
                "%s: the best %s, %g, ends what was tried (%g to %g): one beyond it may be better",
                *(kind.label, name, best[0][name], ladder[0], ladder[-1]),
            )
    if found and found.choices == best[0]:
        return found
    found = None
    return judged(best[0])


def _one_step_from(choices: dict[str, Any], ladders: Mapping[str, Sequence[float]]) -> Iterator[dict[str, Any]]:
    """The same choices, but for one that is the next of its ladder, down or up."""
    for name, ladder in ladders.items():
        at = ladder.index(choices[name])
        for step in (at - 1, at + 1):
            if 0 <= step < len(ladder):
                yield {**choices, name: ladder[step]}
