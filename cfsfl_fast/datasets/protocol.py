"""Strong generalisation (Liang et al. 2018): filters, the split by users, the item index, and the fold-in.

The order of every random draw is part of the protocol: the public results are tied to it.
"""

from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from cfsfl_fast.datasets.dataset import Dataset, HeldOut, pairs_to_csr
from cfsfl_fast.datasets.events import Events

MOST_HELD_OUT = 10_000


@dataclass(frozen=True)
class Protocol:
    """How raw events become training users and held-out users. The filters run once each, in the order of the fields.

    Attributes:
        min_rating: an event stays if its rating is above this; None keeps all.
        min_item_users: items with fewer users are dropped; None keeps all.
        min_user_items: users with fewer items are dropped; None keeps all.
        held_out: users in each of validation and test; "auto" is 10 % of the users, at least 1, at most 10,000.
        seed: of the split and, anew, of the fold-in of validation and of test.
        target_share: share of a held-out user's items that become targets, rounded down.
        min_fold_in_items: held-out users with fewer items get no targets and are skipped.
    """

    min_rating: float | None = None
    min_item_users: int | None = None
    min_user_items: int | None = None
    held_out: int | Literal["auto"] = "auto"
    seed: int = 98765
    target_share: float = 0.2
    min_fold_in_items: int = 5

    def __post_init__(self) -> None:
        if self.held_out != "auto" and (not isinstance(self.held_out, int) or self.held_out < 1):
            raise ValueError(f'held_out must be "auto" or at least 1; got {self.held_out!r}')
        if not 0 < self.target_share < 1:
            raise ValueError(f"target_share must lie between 0 and 1; got {self.target_share!r}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must lie in 0 .. 2**32 - 1; got {self.seed!r}")

    @staticmethod
    def preset(name: str) -> "Protocol":
        """The protocol of a published data set ("ml-20m", "netflix", "msd"), or "none" for any other data.

        Raises:
            ValueError: an unknown name.
        """
        if name not in PRESETS:
            raise ValueError(f"unknown protocol {name!r}; expected one of {', '.join(PRESETS)}")
        return PRESETS[name]

    def to_dict(self) -> dict[str, Any]:
        """The fields, for JSON."""
        return asdict(self)


PRESETS = {
    "ml-20m": Protocol(min_rating=3.5, min_user_items=5, held_out=10_000),
    "netflix": Protocol(min_rating=3.5, min_user_items=5, held_out=40_000),
    "msd": Protocol(min_item_users=200, min_user_items=20, held_out=50_000),
    "none": Protocol(min_user_items=5),
}


def split_events(events: Events, protocol: Protocol) -> Dataset:
    """Applies the protocol. Rows of all parts are in ascending order of the external user id.

    Raises:
        ValueError: ratings are needed and missing, no event passes the filters, or too few users for `held_out`.
    """
    report: dict[str, Any] = dict(events.report)
    users, items = _filtered(events, protocol, report)
    present = np.flatnonzero(np.bincount(users, minlength=len(events.user_ids)))  # ascending ids, as user_ids is sorted
    n_users = len(present)
    held_out = held_out_count(protocol, n_users, events.name)
    train_users, validation_users, test_users = split_users(present, held_out, protocol)

    in_train = _member(train_users, len(events.user_ids))[users]
    first = np.full(len(events.item_ids), -1, np.int64)
    theirs = items[in_train]
    first[theirs[::-1]] = np.arange(len(theirs))[::-1]  # of repeated indices the last assignment stays
    column_of, item_codes = order_of_appearance(first)
    n_items = len(item_codes)
    rows = _rank(train_users, len(events.user_ids))[users[in_train]]
    train = pairs_to_csr(rows, column_of[items[in_train]], (len(train_users), n_items))
    report["train"] = _counts(users[in_train], items[in_train])

    groups = []
    for part, chosen in (("validation", validation_users), ("test", test_users)):
        mine = _member(chosen, len(events.user_ids))[users]
        known = mine & (column_of >= 0)[items]
        group, counts = fold_in(users[known], column_of[items[known]], n_items, events.user_ids, protocol)
        skipped = held_out - counts["users"]
        dropped = int(mine.sum()) - int(known.sum())
        report[part] = {"held_out": held_out, "skipped": skipped, **counts, "events_of_unknown_items": dropped}
        groups.append(group)
    return Dataset(
        events.name, train, groups[0], groups[1], events.item_ids[item_codes], events.user_ids[train_users], report
    )


def _filtered(
    events: Events, protocol: Protocol, report: dict[str, Any]
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    users, items = events.users, events.items
    report["distinct"] = _counts(users, items)
    if protocol.min_rating is not None:
        if events.ratings is None:
            raise ValueError(f"{events.name}: the protocol keeps ratings above {protocol.min_rating}; found no ratings")
        keep = events.ratings > np.float64(protocol.min_rating)  # a Python float would be rounded to float32 first
        users, items = users[keep], items[keep]
        report["after_rating"] = _counts(users, items)
    if protocol.min_item_users is not None:
        keep = (np.bincount(items, minlength=len(events.item_ids)) >= protocol.min_item_users)[items]
        users, items = users[keep], items[keep]
        report["after_items"] = _counts(users, items)
    if protocol.min_user_items is not None:
        keep = (np.bincount(users, minlength=len(events.user_ids)) >= protocol.min_user_items)[users]
        users, items = users[keep], items[keep]
        report["after_users"] = _counts(users, items)
    if len(users) == 0:
        raise ValueError(f"{events.name}: no event passes the filters of {protocol}")
    return users, items


def held_out_count(protocol: Protocol, n_users: int, name: str) -> int:
    """Users in each of validation and test.

    Raises:
        ValueError: nobody would be left to train on.
    """
    auto = min(MOST_HELD_OUT, max(1, n_users // 10))
    held_out = auto if isinstance(protocol.held_out, str) else protocol.held_out
    if 2 * held_out >= n_users:
        raise ValueError(
            f"{name}: held_out = {held_out} users for each of validation and test leaves nobody to train on; "
            f"found {n_users} users"
        )
    return held_out


def split_users(
    present: NDArray[np.int64], held_out: int, protocol: Protocol
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Training users, ascending, and those held out for validation and for test. present: ascending by external id."""
    order = np.random.RandomState(protocol.seed).permutation(len(present))
    train, validation, test = np.split(present[order], [len(present) - 2 * held_out, len(present) - held_out])
    return np.sort(train), validation, test


def fold_in(
    users: NDArray[np.int32], columns: NDArray[np.int64], n_items: int, user_ids: NDArray[Any], protocol: Protocol
) -> tuple[HeldOut, dict[str, int]]:
    """Draws the targets of every user, ascending by user, over each user's rows in raw order."""
    order = np.argsort(users, kind="stable")
    users, columns = users[order], columns[order]
    start = np.flatnonzero(np.diff(users, prepend=-1))
    count = np.diff(start, append=len(users))
    is_target = np.zeros(len(users), np.bool_)
    random = np.random.RandomState(protocol.seed)
    for first, n in zip(start.tolist(), count.tolist(), strict=True):
        if n >= protocol.min_fold_in_items:
            chosen = random.choice(n, size=int(protocol.target_share * n), replace=False)
            is_target[first + chosen] = True
    with_target = np.unique(users[is_target])
    row_of = _rank(with_target, len(user_ids))
    shape = (len(with_target), n_items)
    is_fold_in = ~is_target & (row_of[users] >= 0)
    seen = pairs_to_csr(row_of[users[is_fold_in]], columns[is_fold_in], shape)
    targets = pairs_to_csr(row_of[users[is_target]], columns[is_target], shape)
    counts = {"users": len(with_target), "fold_in_events": seen.nnz, "target_events": targets.nnz}
    return HeldOut(seen, targets, user_ids[with_target]), counts


def order_of_appearance(first: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Column of every item code (-1: none), and the codes in order of where they appear first (-1: nowhere)."""
    codes = np.flatnonzero(first >= 0)
    codes = codes[np.argsort(first[codes])]
    return _rank(codes, len(first)), codes


def _member(codes: NDArray[Any], n_codes: int) -> NDArray[np.bool_]:
    member = np.zeros(n_codes, np.bool_)
    member[codes] = True
    return member


def _rank(codes: NDArray[Any], n_codes: int) -> NDArray[np.int64]:
    """Position of every code in `codes`, -1 where it is not in there."""
    rank = np.full(n_codes, -1, np.int64)
    rank[codes] = np.arange(len(codes))
    return rank


def _counts(users: NDArray[np.int32], items: NDArray[np.int32]) -> dict[str, int]:
    n_users, n_items = (int(np.count_nonzero(np.bincount(codes))) for codes in (users, items))
    return {"users": n_users, "items": n_items, "events": len(users)}
