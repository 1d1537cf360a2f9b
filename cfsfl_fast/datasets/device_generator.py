"""`generator.synthetic` in torch operations: the same idea at the published sets' sizes, in seconds on a GPU.

Items live in a latent space; a taste is a distribution over items, popularity times exp(strength * affinity); a user
mixes a few tastes and draws events taste first, then item, until as many distinct ones as their activity asks for.
Tastes, activity and mixtures have the laws of `generator`, but for the sparse mixture: gamma variables of a small shape
are drawn as log(U) / shape + log(E), U uniform and E exponential, which is their law as the shape goes to 0.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import scipy.sparse as sp
import torch
from torch import Tensor

from cfsfl_fast.datasets import generator


class Shape(NamedTuple):
    """Sizes of a data set."""

    users: int
    items: int
    events_per_user: float  # asked for; a little less comes out
    held_out: int  # users in each of validation and test


SHAPES = {
    "ml-20m": Shape(136_677, 20_108, 73.6, 10_000),
    "netflix": Shape(463_435, 17_769, 126.0, 40_000),
    "msd": Shape(571_355, 41_140, 59.2, 50_000),
}
"""The published sets after their filters (events: 10.0, 56.9 and 33.6 million)."""

_BLOCK_EVENTS = 1 << 24  # draws at once: half a gigabyte of keys and orders


def synthetic_rows(
    n_users: int,
    n_items: int,
    *,
    events_per_user: float = 40.0,
    n_factors: int = 16,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor]:
    """Made-up histories as CSR rows on a device, the same for the same arguments on the same kind of device.

    Args:
        n_users, n_items: sizes.
        events_per_user: mean of the log-normal activity; a little less comes out, since nobody takes an item twice.
        n_factors: width of the latent space behind the tastes.
        seed: of everything random.
        device: where they are made, and stay.

    Returns:
        items [E] int64, ascending and unique within a user; offsets [n_users + 1] int64.

    Raises:
        ValueError: sizes below 1 or more events per user than items.
    """
    if min(n_users, n_items, n_factors) < 1:
        raise ValueError(f"sizes must be at least 1; got {n_users} users, {n_items} items, {n_factors} factors")
    if not 0 < events_per_user <= n_items:
        raise ValueError(f"events_per_user must lie in 0 .. {n_items} (the items); got {events_per_user}")
    random = torch.Generator(device).manual_seed(seed)
    cumulative = _tastes(n_items, n_factors, random)
    block = max(1, int(_BLOCK_EVENTS / (3 * events_per_user + 8)))
    keys = [
        _block(cumulative, min(block, n_users - first), n_items, events_per_user, random) + first * n_items
        for first in range(0, n_users, block)
    ]
    pairs = torch.cat(keys)
    bounds = torch.arange(n_users + 1, device=pairs.device) * n_items
    return pairs % n_items, torch.searchsorted(pairs, bounds)


def synthetic_csr(shape: Shape, *, seed: int = 0, device: torch.device | str = "cpu") -> sp.csr_matrix:
    """`synthetic_rows` of a published set's sizes as a matrix [users, items] of float32 ones."""
    items, offsets = (
        t.cpu().numpy()
        for t in synthetic_rows(
            shape.users, shape.items, events_per_user=shape.events_per_user, seed=seed, device=device
        )
    )
    ones = torch.ones(len(items)).numpy()
    return sp.csr_matrix((ones, items.astype("int32"), offsets), shape=(shape.users, shape.items))


def _uniform(*shape: int, random: torch.Generator) -> Tensor:
    """Uniform on (0, 1). float64"""
    return torch.rand(shape, generator=random, device=random.device, dtype=torch.float64).clamp_min_(1e-300)


def _normal(*shape: int, random: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=random, device=random.device, dtype=torch.float64)


def _climbing(weights: Tensor) -> Tensor:
    """Each row's shares, summed up from the left to 1: in whole numbers, of which a GPU's sums have the same bits in
    any order.
    """
    steps = (weights / weights.sum(1, keepdim=True) * 2.0**50).round().long().cumsum(1).double()
    return steps / steps[:, -1:]


def _tastes(n_items: int, n_factors: int, random: torch.Generator) -> Tensor:
    """Cumulative probabilities [C, M] of C tastes over M items; taste c climbs from c to c + 1."""
    n_tastes = generator.TASTES_PER_FACTOR * n_factors
    rank = torch.randperm(n_items, generator=random, device=random.device).double()
    popularity = (rank + generator.ZIPF_SHIFT) ** -generator.ZIPF_EXPONENT
    item_factors, taste_factors = (_normal(n, n_factors, random=random) for n in (n_items, n_tastes))
    taste_factors /= taste_factors.norm(dim=1, keepdim=True)
    affinity = (generator.AFFINITY_STRENGTH * (taste_factors @ item_factors.T)).exp()
    return _climbing(popularity * affinity) + torch.arange(n_tastes, device=random.device)[:, None]


def _block(cumulative: Tensor, size: int, n_items: int, events_per_user: float, random: torch.Generator) -> Tensor:
    """Ascending keys user * n_items + item of the distinct events of `size` users."""
    n_tastes, device = len(cumulative), random.device
    sigma = generator.ACTIVITY_SIGMA
    wanted = (math.log(events_per_user) - sigma**2 / 2 + sigma * _normal(size, random=random)).exp().round().long()
    wanted.clamp_(min(generator.FEWEST_EVENTS, n_items), max(1, n_items // 2))
    shape = generator.TASTE_CONCENTRATION / n_tastes
    uniform, exponential = _uniform(size, n_tastes, random=random), -_uniform(size, n_tastes, random=random).log()
    mixture = (uniform.log() / shape + exponential.log()).softmax(1)
    user = torch.arange(size, device=device)
    mixture = _climbing((1 - generator.CURIOSITY) * mixture + generator.CURIOSITY / n_tastes) + user[:, None]

    draws = 3 * wanted + 8  # enough that repeats seldom leave a user short
    user = user.repeat_interleave(draws)
    at = torch.searchsorted(mixture.flatten(), user + _uniform(len(user), random=random), right=True)
    taste = (at - user * n_tastes).clamp_(0, n_tastes - 1)
    at = torch.searchsorted(cumulative.flatten(), taste + _uniform(len(user), random=random), right=True)
    item = (at - taste * n_items).clamp_(0, n_items - 1)

    keys, order = (user * n_items + item).sort(stable=True)
    first = torch.ones_like(keys, dtype=torch.bool)
    first[1:] = keys[1:] != keys[:-1]
    new = torch.zeros_like(first).index_put_((order[first],), first.new_ones(()))  # in the order of the draws
    rank = new.cumsum(0)
    before = torch.nn.functional.pad(rank, (1, 0))[draws.cumsum(0) - draws]
    kept = new & (rank - before[user] <= wanted[user])
    return (user[kept] * n_items + item[kept]).sort().values
