"""Recommending for a user base that no one machine scores: what an engine for data calls on each of its workers.

    import ray
    users = ray.data.read_parquet("histories/")                                # columns: user, items
    best = users.map_batches(Scorer, fn_constructor_args=["run"], fn_constructor_kwargs={"n": 100},
                             batch_size=512, concurrency=8)
    best.write_parquet("recommendations/")                                     # columns: user, items, scores

    from functools import partial
    spark.read.parquet("histories/").mapInArrow(partial(score_in_arrow, folder="run", n=100),
                                                "user long, items array<long>, scores array<float>")

Answers do not depend on how users are cut into batches or given to workers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cfsfl_fast.datasets import ItemIndex
from cfsfl_fast.interactions import Interactions, from_pairs
from cfsfl_fast.model import CFSFL


class Scorer:
    """A trained model that answers batches of users by their items' own ids.

    Args:
        folder: of `save_pretrained`, or a run's.
        n: items per user.
        exclude_seen: leave out the items of the history.
        steps: T; None is the model's own.
        device: where it computes; a CUDA device where there is one, else the CPU.
        run_time: backend, precision, deterministic and graphs.

    Raises:
        FileNotFoundError, ValueError: as in `CFSFL.from_pretrained`.
    """

    def __init__(
        self,
        folder: str | Path,
        n: int = 10,
        *,
        exclude_seen: bool = True,
        steps: int | None = None,
        device: str | None = None,
        **run_time: Any,
    ) -> None:
        place = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.model = CFSFL.from_pretrained(folder, place, **run_time)
        self.n, self.exclude_seen, self.steps = n, exclude_seen, steps
        ids = np.arange(self.model.n_items) if self.model.item_ids is None else self.model.item_ids
        self.item_ids, self._index = ids, ItemIndex(ids)

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """The best items of a batch's users.

        Args:
            batch: "items": of each user the ids of the history, in any order; those that the model does not know are
                left out. Other columns are handed on. [B]

        Returns:
            The columns of the batch, "items" and "scores" replaced by the best items, the best first, and their scores:
            at most n of each user. [B] objects

        Raises:
            ValueError: there is no column "items", or its ids are no whole numbers and no texts.
        """
        if "items" not in batch:
            raise ValueError(f"a batch needs a column 'items'; got {', '.join(map(repr, batch)) or 'none'}")
        histories = [np.asarray(history).ravel() for history in batch["items"]]
        ids, scores = self.model.recommend(
            self._interactions(histories), self.n, exclude_seen=self.exclude_seen, steps=self.steps
        )
        ends = (ids >= 0).sum(1).tolist()
        places, values = ids.cpu().numpy(), scores.cpu().numpy()
        return {
            **batch,
            "items": _column([self.item_ids[row[:end]] for row, end in zip(places, ends, strict=True)]),
            "scores": _column([row[:end] for row, end in zip(values, ends, strict=True)]),
        }

    def _interactions(self, histories: list[np.ndarray]) -> Interactions:
        counts = np.array([len(history) for history in histories], np.int64)
        some = [history for history in histories if len(history)]
        found = np.concatenate(some or [np.empty(0, self.item_ids.dtype)])
        if wrong := [ids.dtype for ids in (*some, found) if ids.dtype.kind in "fcb"]:
            raise ValueError(f"item ids must be whole numbers or texts; got {wrong[0]} (is a value missing?)")
        columns = self._index.columns(found)
        known = columns >= 0
        rows = np.repeat(np.arange(len(histories)), counts)[known]
        items = torch.from_numpy(columns[known])
        return from_pairs(torch.from_numpy(rows), items, len(histories), self.model.n_items)


def _column(rows: list[np.ndarray]) -> np.ndarray:
    """A column of rows of any length; NumPy alone would make a matrix of rows of one length."""
    column = np.empty(len(rows), object)
    column[:] = [None] * len(rows)
    for i, row in enumerate(rows):
        column[i] = row
    return column


def score_in_arrow(batches: Iterable[Any], folder: str | Path, n: int = 10, **choices: Any) -> Iterator[Any]:
    """The answers to Arrow record batches with a column "items", and a column "user": for Spark's `mapInArrow`.

    Args:
        batches: of `pyarrow.RecordBatch`.
        folder, n, choices: of `Scorer`, which is made once for all batches.

    Raises:
        ImportError: there is no pyarrow; says how to get it.
    """
    try:
        import pyarrow as pa
    except ImportError as error:
        raise ImportError(f"Arrow batches need pyarrow ({error}): pip install pyarrow") from error
    scorer = Scorer(folder, n, **choices)
    for batch in batches:
        found = scorer({"items": batch.column("items").to_pylist()})
        columns = [batch.column("user"), pa.array(found["items"].tolist()), pa.array(found["scores"].tolist())]
        yield pa.RecordBatch.from_arrays(columns, ["user", "items", "scores"])
