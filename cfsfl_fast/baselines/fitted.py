"""What every baseline is: fitted when made, asked for lists afterwards."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, ClassVar, TypeVar

import scipy.sparse as sp
import torch
from torch import Tensor

from cfsfl_fast import ops
from cfsfl_fast.interactions import Interactions, as_interactions
from cfsfl_fast.progress import bar

Item = TypeVar("Item")


class Fitted(ABC):
    """A baseline fitted to training histories [U, M], scipy sparse; its choices are keyword arguments with defaults."""

    label: ClassVar[str]
    """Its name in tables."""

    ladders: ClassVar[dict[str, tuple[float, ...]]] = {}
    """Values worth trying on validation users, in order, the default among them."""

    @abstractmethod
    def __init__(self, train: Any, *, show_progress: bool = False) -> None: ...

    @classmethod
    def choices(cls) -> dict[str, Any]:
        """Its choices with their defaults."""
        defaults: dict[str, Any] = cls.__init__.__kwdefaults__ or {}
        return {name: value for name, value in defaults.items() if name != "show_progress"}

    @abstractmethod
    def recommend(self, x: Interactions, n: int) -> tuple[Tensor, Tensor]:
        """ids [B, n] and scores [B, n], the users' own items left out; padded with -1 and -inf."""


def counted(train: Any) -> sp.csr_matrix:
    """Training histories as a checked matrix of ones, CSR [U, M] float32.

    Raises:
        ValueError: there is no item, or an entry is negative, NaN or infinite.
    """
    if train.shape[1] < 1:
        raise ValueError(f"histories must have at least 1 item; got shape {tuple(train.shape)}")
    x = as_interactions(train, train.shape[1])
    ones = torch.ones(len(x.items)).numpy()
    return sp.csr_matrix((ones, x.items.numpy(), x.offsets.numpy()), shape=train.shape)


def best(scores: Tensor, x: Interactions, n: int) -> tuple[Tensor, Tensor]:
    """The n best of scores [B, M], which are overwritten, without the users' own items."""
    scores[x.rows, x.items] = float("-inf")
    return ops.exact_topk(scores, n)


def progress(steps: Iterable[Item], label: str, shown: bool) -> Iterable[Item]:
    """The steps under a progress bar on stderr, where that is a terminal."""
    under: Iterable[Item] = bar(steps, shown=shown, desc=label, leave=False)
    return under
