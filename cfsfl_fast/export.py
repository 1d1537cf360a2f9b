"""A trained model as one program of `torch.export`, which serves without this package.

program = torch.export.load("model.pt2").module()
ids, scores = program(histories)                        histories [B, L] int64, ids and scores [B, n]
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cfsfl_fast import backends, files, ops
from cfsfl_fast.interactions import Interactions
from cfsfl_fast.model import CFSFL

DESCRIPTION = "cfsfl.json"
"""What the file holds beside the program: sizes, the config, and the items' own ids where the model has them."""


@dataclass(frozen=True)
class _Rows(Interactions):
    """Rows of L entries each, of which some count for nothing: their weights are 0."""

    mean: Tensor = field(kw_only=True)  # entries of x / |x|. [B L]

    def mean_weights(self) -> Tensor:
        """The entries of x / |x|. [B L]"""
        return self.mean


class Served(nn.Module):
    """What is exported: the n best items of B users, by the specification's operations.

    Args:
        model: a trained model.
        n: items per user, at most M.
        steps: T; None is the model's own.
        exclude_seen: leave out the items of the history.
    """

    def __init__(self, model: CFSFL, n: int, *, steps: int | None = None, exclude_seen: bool = True) -> None:
        super().__init__()
        if not 1 <= n <= model.n_items:
            raise ValueError(f"n must be 1 to {model.n_items}, the number of items; got {n}")
        if model.memory is not None:
            raise ValueError('a model with feedback="scores" has an item memory, which an exported program cannot hold')
        steps = model.config.steps if steps is None else steps
        if steps < 0:
            raise ValueError(f"steps must be at least 0; got {steps}")
        self.model, self.n, self.steps, self.exclude_seen = model, n, steps, exclude_seen

    def forward(self, histories: Tensor) -> tuple[Tensor, Tensor]:
        """The best items.

        Args:
            histories: item ids in any order, -1 behind the last; what is no id of an item, or there twice, counts for
                nothing. [B, L] int64, B and L at least 1

        Returns:
            ids [B, n] int64, best first, ties to the smaller id, -1 where a list ends; scores [B, n], -inf there.
        """
        M = self.model.n_items
        n_users, length = histories.shape
        known = (histories >= 0) & (histories < M)
        items = histories.where(known, M).sort(1).values
        counted = (items < M) & (items != F.pad(items, (1, 0), value=-1)[:, :-1])
        size = counted.sum(1, keepdim=True).clamp_min(1).float()
        offsets = torch.arange(n_users + 1, device=items.device) * length
        listed = items.clamp_max(M - 1).flatten()  # what does not count has weight 0
        seen = _Rows(listed, offsets, M, mean=(counted / size).flatten())
        exclude = items.flatten(), offsets
        reading = exclude if self.model.config.reading == "heldout" else None
        loop = self.model.run_loop(seen, (counted * size.rsqrt()).flatten(), seen, steps=self.steps, exclude=reading)
        return ops.linear_topk(loop.code.u, loop.output, self.n, exclude if self.exclude_seen else None)


def exported(
    model: CFSFL, n: int = 100, *, steps: int | None = None, exclude_seen: bool = True
) -> torch.export.ExportedProgram:
    """The program of `Served`, for any number of users and any length of histories, on the model's device.

    Raises:
        ValueError: n or steps is out of range.
    """
    with torch.device("meta"):
        twin = CFSFL.from_config(model.n_items, model.config)  # the same weights, in evaluation and without gradients
    twin.load_state_dict({name: tensor.detach() for name, tensor in model.state_dict().items()}, assign=True)
    served = Served(twin.requires_grad_(False).eval(), n, steps=steps, exclude_seen=exclude_seen)
    example = torch.zeros(3, 4, dtype=torch.int64, device=model.device)
    dynamic = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    with torch.no_grad(), backends.use_backend("reference"):
        return torch.export.export(served, (example,), dynamic_shapes=(dynamic,))


def save_exported(
    model: CFSFL,
    path: str | os.PathLike[str],
    n: int = 100,
    *,
    steps: int | None = None,
    exclude_seen: bool = True,
) -> None:
    """Writes `exported` and its description to a file, whole or not at all.

    Raises:
        ValueError: the name does not end in .pt2, or n or steps is out of range.
    """
    path = Path(path)
    if path.suffix != ".pt2":
        raise ValueError(f"an exported program is a .pt2 file; got {path.name}")
    description = {
        "n_items": model.n_items,
        "n": n,
        "exclude_seen": exclude_seen,
        "config": model.config.to_dict(),
        "item_ids": None if model.item_ids is None else model.item_ids.tolist(),
    }
    program = exported(model, n, steps=steps, exclude_seen=exclude_seen)
    with files.replacing(path) as staged, staged.open("wb") as file:
        torch.export.save(program, file, extra_files={DESCRIPTION: json.dumps(description)})
