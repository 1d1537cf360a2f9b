"""One model answering with several T: accuracy and time (Figure 4)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from cfsfl_fast import backends
from cfsfl_fast.datasets import HeldOut
from cfsfl_fast.evaluation import Recommend, evaluate, seconds_to_answer
from cfsfl_fast.model import CFSFL

METRICS = ("Recall@20", "Recall@50", "NDCG@100")
HEADER = ("steps", *(f"{name}{part}" for name in METRICS for part in ("", " error")), "microseconds per user")
"""Of the rows: T, every metric with its standard error over users, and the time of an answer of 100 items."""


def sweep(
    model: CFSFL, held_out: HeldOut, steps: Sequence[int], *, rounds: int = 5, progress: str | None = None
) -> list[dict[str, Any]]:
    """A row of HEADER for each T.

    Args:
        model: trained with any T.
        held_out: whom to judge on.
        steps: the T to answer with, each at least 0.
        rounds: how often each is timed, in turns; the fastest counts.
        progress: label of a progress bar; None shows none.
    """

    def answering(t: int) -> Recommend:
        def recommend(x: Any, n: int) -> tuple[Tensor, Tensor]:
            return model.recommend(x, n, steps=t)

        return recommend

    recommends = [answering(t) for t in steps]
    rows: list[dict[str, Any]] = []
    with backends.flushed_denormals():
        for t, recommend in zip(steps, recommends, strict=True):
            label = progress and f"{progress}, T = {t}"
            judged = evaluate(recommend, held_out.fold_in, held_out.targets, device=model.device, progress=label)
            row: dict[str, Any] = {"steps": t}
            for name, found in judged.summary().items():
                row |= {name: found.value, f"{name} error": found.error}
            rows.append(row)
        seconds = seconds_to_answer(recommends, held_out.fold_in, device=model.device, rounds=rounds)
    for row, taken in zip(rows, seconds, strict=True):
        row["microseconds per user"] = 1e6 * taken / held_out.fold_in.shape[0]
    return rows
