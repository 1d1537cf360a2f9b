"""Recommenders that have not seen a user: training users in parts, and for each part one trained on the others.

What a recommender says of the users it was trained on is better than what it says of anybody else, so a reward that
learnt from such scores would trust them too much. These scores are as good as a stranger's, and all users have some.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from cfsfl_fast import noise
from cfsfl_fast.interactions import Interactions
from cfsfl_fast.model import CFSFL

PARTS = 5
"""Stream of random numbers."""


def parts(n_users: int, n_parts: int, seed: int) -> Tensor:
    """Every user's part, at random; sizes differ by one at most. [U] int64"""
    order = noise.uniform(PARTS, seed, torch.arange(n_users)).argsort()
    found = torch.empty_like(order)
    found[order] = torch.arange(n_users) % n_parts
    return found


class Folds:
    """Scores of training users by recommenders that have not seen them.

    Args:
        models: of each part, one that has not seen its users; in eval mode.
        part: of every training user. [U] int64
    """

    def __init__(self, models: Sequence[CFSFL], part: Tensor) -> None:
        self.models, self.part = models, part

    def tensors(self) -> Iterator[Tensor]:
        """What `scores` reads."""
        yield self.part
        for model in self.models:
            yield from model.recommender.parameters()
            yield from model.recommender.buffers()

    @torch.no_grad()
    def scores(self, kept: Interactions, users: Tensor) -> Tensor:
        """s of every item. Every model scores all users, so that shapes do not depend on whom a batch has. [B, M]

        Args:
            kept: the users' histories, or what is shown of them.
            users: their numbers; -1 is nobody, whose scores are some. [B] int64
        """
        part = self.part[users.clamp_min(0)][:, None]
        found = self.models[0].plain_scores(kept)
        for number, model in enumerate(self.models[1:], start=1):
            found = torch.where(part == number, model.plain_scores(kept), found)
        return found
