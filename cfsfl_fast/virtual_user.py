"""The virtual user: lookup table, reward estimator and feedback generator."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

from torch import Tensor, nn

from cfsfl_fast import item_rows

LAYER = 128
"""Width of the hidden layers of both networks (the paper's table 2)."""


class LookupTable(nn.Module):
    """L [M, D], shared by the history and the recommended items (16)."""

    def __init__(self, n_items: int, lookup_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(item_rows.normal(n_items, lookup_dim, 0.1))


def reward_estimator(lookup_dim: int) -> nn.ModuleList:
    """g of (3): D-128-128-128-1, ReLU between; the reward is sigmoid(g)."""
    return _layers(lookup_dim, LAYER, LAYER, LAYER, 1)


def feedback_generator(lookup_dim: int, feedback_dim: int) -> nn.ModuleList:
    """F of (4): (D + 1)-128-128-V over [h ; R], ReLU between, the last layer linear."""
    return _layers(lookup_dim + 1, LAYER, LAYER, feedback_dim)


def item_reward(n_evidence: int) -> nn.ModuleList:
    """g of one listed item from what its user's history says for it: 64-64-1, ReLU between."""
    return _layers(n_evidence, 64, 64, 1)


def _layers(*sizes: int) -> nn.ModuleList:
    return nn.ModuleList(nn.Linear(i, o) for i, o in pairwise(sizes))


class VirtualUser(NamedTuple):
    """The parts as the loop takes them."""

    lookup: LookupTable
    reward: nn.ModuleList
    feedback: nn.ModuleList


def weights(layers: nn.ModuleList) -> list[tuple[Tensor, Tensor]]:
    """(weight [out, in], bias [out]) of every layer, as operations take them."""
    return [(layer.weight, layer.bias) for layer in layers if isinstance(layer, nn.Linear)]
