"""Made-up implicit feedback with the shape of the real thing: a long tail of items, few heavy users, tastes to learn.

Items live in a latent space of `n_factors` directions. A taste is a distribution over items, popularity times
exp(strength * affinity); every user mixes a few of them. A user's events are drawn taste first, then item, so the cost
is per event and not per (user, item).
"""

from collections.abc import Iterator

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from cfsfl_fast.datasets.dataset import Dataset, pairs_to_csr
from cfsfl_fast.datasets.matrices import matrix_events
from cfsfl_fast.datasets.protocol import Protocol, split_events

_BLOCK_USERS = 4096  # users that share a random stream; part of what a seed means
ZIPF_EXPONENT = 0.9
ZIPF_SHIFT = 10.0
AFFINITY_STRENGTH = 3.0
TASTES_PER_FACTOR = 4
TASTE_CONCENTRATION = 0.5  # the smaller, the fewer tastes a user has
CURIOSITY = 0.05  # share of a user's draws that come from all tastes alike
ACTIVITY_SIGMA = 0.9
FEWEST_EVENTS = 5


def synthetic(
    n_users: int = 3000,
    n_items: int = 1500,
    *,
    events_per_user: float = 40.0,
    n_factors: int = 16,
    seed: int = 0,
) -> sp.csr_matrix:
    """A binary matrix of interactions, the same for the same arguments.

    Args:
        n_users, n_items: its shape.
        events_per_user: mean of the log-normal activity; a little less comes out, since nobody takes an item twice.
        n_factors: width of the latent space behind the tastes; more is harder to learn.
        seed: of everything random.

    Returns:
        CSR [n_users, n_items] float32 ones, sorted rows, at least one event in every row.

    Raises:
        ValueError: sizes below 1 or more events per user than items.
    """
    blocks = synthetic_blocks(n_users, n_items, events_per_user=events_per_user, n_factors=n_factors, seed=seed)
    rows, columns = (np.concatenate(parts) for parts in zip(*blocks, strict=True))
    return pairs_to_csr(rows, columns, (n_users, n_items))


def synthetic_blocks(
    n_users: int, n_items: int, *, events_per_user: float, n_factors: int = 16, seed: int = 0
) -> Iterator[tuple[NDArray[np.int32], NDArray[np.int32]]]:
    """The events of `synthetic`, some thousand users at a time: users and items, user after user.

    Memory: 512 bytes an item at 16 factors, and a block.

    Raises:
        ValueError: as in `synthetic`.
    """
    if min(n_users, n_items, n_factors) < 1:
        raise ValueError(f"sizes must be at least 1; got {n_users} users, {n_items} items, {n_factors} factors")
    if not 0 < events_per_user <= n_items:
        raise ValueError(f"events_per_user must lie in 0 .. {n_items} (the items); got {events_per_user}")
    if seed < 0:
        raise ValueError(f"seed must not be negative; got {seed}")
    cumulative = _tastes(n_items, n_factors, np.random.default_rng([seed, 0]))
    for block, first in enumerate(range(0, n_users, _BLOCK_USERS)):
        random = np.random.default_rng([seed, 1, block])
        size = min(_BLOCK_USERS, n_users - first)
        users, items = _block(cumulative, size, n_items, events_per_user, random)
        yield (users + first).astype(np.int32), items.astype(np.int32)


def synthetic_dataset(
    n_users: int = 3000,
    n_items: int = 1500,
    *,
    events_per_user: float = 40.0,
    n_factors: int = 16,
    seed: int = 0,
    protocol: Protocol | None = None,
) -> Dataset:
    """`synthetic`, split by `protocol` (the preset "none" by default).

    Raises:
        ValueError: as in `synthetic` and `split_events`.
    """
    matrix = synthetic(n_users, n_items, events_per_user=events_per_user, n_factors=n_factors, seed=seed)
    return split_events(matrix_events(matrix, "synthetic"), protocol or Protocol.preset("none"))


def _tastes(n_items: int, n_factors: int, random: np.random.Generator) -> NDArray[np.float64]:
    """Cumulative probabilities [C * M] of C tastes over M items; taste c climbs from c to c + 1."""
    n_tastes = TASTES_PER_FACTOR * n_factors
    popularity = (np.arange(n_items) + ZIPF_SHIFT) ** -ZIPF_EXPONENT
    popularity = random.permutation(popularity)
    item_factors = random.standard_normal((n_items, n_factors))
    taste_factors = random.standard_normal((n_tastes, n_factors))
    taste_factors /= np.linalg.norm(taste_factors, axis=1, keepdims=True)
    affinity = np.exp(AFFINITY_STRENGTH * (taste_factors @ item_factors.T))
    cumulative: NDArray[np.float64] = np.cumsum(popularity * affinity, axis=1)
    cumulative /= cumulative[:, -1:]
    cumulative += np.arange(n_tastes)[:, None]
    return cumulative.ravel()


def _block(
    cumulative: NDArray[np.float64], size: int, n_items: int, events_per_user: float, random: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Distinct (user, item) pairs of `size` users, ascending."""
    n_tastes = len(cumulative) // n_items
    mean = np.log(events_per_user) - ACTIVITY_SIGMA**2 / 2
    wanted = np.exp(mean + ACTIVITY_SIGMA * random.standard_normal(size)).round().astype(np.int64)
    wanted = np.clip(wanted, min(FEWEST_EVENTS, n_items), max(1, n_items // 2))
    mixture = random.gamma(TASTE_CONCENTRATION / n_tastes, size=(size, n_tastes)) + 1e-12
    mixture = (1 - CURIOSITY) * mixture / mixture.sum(axis=1, keepdims=True) + CURIOSITY / n_tastes
    mixture = np.cumsum(mixture, axis=1)
    mixture = mixture / mixture[:, -1:] + np.arange(size)[:, None]

    draws = 3 * wanted + 8  # enough that repeats seldom leave a user short
    user = np.repeat(np.arange(size), draws)
    at = np.searchsorted(mixture.ravel(), user + random.random(len(user)), side="right")
    taste = np.minimum(at - user * n_tastes, n_tastes - 1)
    at = np.searchsorted(cumulative, taste + random.random(len(user)), side="right")
    item = np.minimum(at - taste * n_items, n_items - 1)

    pair = user * n_items + item
    _, first = np.unique(pair, return_index=True)
    first.sort()
    owner = user[first]
    begin = np.searchsorted(owner, np.arange(size))
    kept = first[np.arange(len(first)) - begin[owner] < wanted[owner]]
    return user[kept], item[kept]
