"""Users held out of training: what a model sees of them, and what it should find."""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.sparse as sp
import torch

from cfsfl_fast.datasets import HeldOut
from cfsfl_fast.interactions import Interactions, as_interactions

TARGET_SHARE, FEWEST_ITEMS = 0.2, 5
"""Of a user with at least so many items, this share is hidden as targets (Liang et al. 2018)."""


def set_aside(rows: Interactions, validation: Any, seed: int) -> tuple[Interactions, HeldOut | None]:
    """Training users, and users to validate on.

    Args:
        rows: all users [U, M].
        validation: None; a pair (fold-in, targets) of other users' matrices [N, M]; a `HeldOut`; or how many of the
            users are set aside, as a share below 1 or a count.
        seed: of the choice.

    Raises:
        ValueError: validation is none of these, has another width, or leaves nobody to train on.
    """
    if validation is None or isinstance(validation, HeldOut):
        if validation is not None:
            validation = held_out(validation.fold_in, validation.targets, rows.n_items)
        return rows, validation
    if isinstance(validation, (tuple, list)) and len(validation) == 2:
        fold_in, targets = validation
        return rows, held_out(fold_in, targets, rows.n_items)
    if isinstance(validation, bool) or not isinstance(validation, (int, float, np.integer, np.floating)):
        raise ValueError(
            "validation must be a pair (fold-in, targets), a HeldOut, a share or count of users, or None; "
            f"got {type(validation).__name__}"
        )
    n_users = len(rows)
    count = round(validation * n_users) if isinstance(validation, (float, np.floating)) else int(validation)
    if not 0 < count < n_users:
        raise ValueError(f"validation must set aside 1 to {n_users - 1} of {n_users} users; got {validation}: {count}")
    order = torch.from_numpy(np.random.default_rng([seed, n_users]).permutation(n_users))
    aside = hide(rows.take(order[:count].sort().values), seed)
    return rows.take(order[count:].sort().values), aside


def hide(rows: Interactions, seed: int) -> HeldOut:
    """Users of at least FEWEST_ITEMS items, int(TARGET_SHARE |x|) of each hidden as targets, the same for a seed.

    Raises:
        ValueError: no user has so many items.
    """
    draws = np.random.default_rng([seed, len(rows.items)]).random(len(rows.items))
    shuffled = torch.from_numpy(np.lexsort((draws, rows.rows.numpy())))  # by user, at random within
    place = torch.empty_like(shuffled)
    place[shuffled] = torch.arange(len(shuffled)) - rows.spread(rows.offsets[:-1])
    wanted = (rows.counts.double() * TARGET_SHARE).long() * (rows.counts >= FEWEST_ITEMS)
    hidden = place < rows.spread(wanted)
    judged = wanted.nonzero().squeeze(1)
    if len(judged) == 0:
        raise ValueError(f"none of {len(rows)} users has {FEWEST_ITEMS} items: nobody can be judged")
    fold_in, targets = (_csr(rows.where(mask).take(judged)) for mask in (~hidden, hidden))
    return HeldOut(fold_in, targets, judged.numpy())


def held_out(fold_in: Any, targets: Any, n_items: int) -> HeldOut:
    """Fold-in and targets [N, M] of the same users, checked, in any form that `as_interactions` takes.

    Raises:
        ValueError: they have another width or other users than each other; both are named.
    """
    rows, wanted = as_interactions(fold_in, n_items), as_interactions(targets, n_items)
    if len(rows) != len(wanted):
        raise ValueError(
            f"fold-in and targets must have the same users; got [{len(rows)}, {n_items}] and [{len(wanted)}, {n_items}]"
        )
    return HeldOut(_csr(rows), _csr(wanted), np.arange(len(rows)))


def _csr(rows: Interactions) -> sp.csr_matrix:
    ones = np.ones(len(rows.items), np.float32)
    return sp.csr_matrix((ones, rows.items.cpu().numpy(), rows.offsets.cpu().numpy()), (len(rows), rows.n_items))
