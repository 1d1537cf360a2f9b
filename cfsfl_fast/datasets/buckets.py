"""The protocol on events that do not fit in memory: the data set that `split_events` makes, by way of a scratch folder.

    1. spill      events go to disk as they come, as codes (`spilled`)
    2. scatter    to buckets of neighbouring users, each small enough to sort in memory; the order of the file stays
    3. filter     bucket by bucket: repeated pairs, ratings, items of few users, users of few items
    4. order      bucket by bucket: where each item appears first among training users
    5. write      bucket by bucket: rows of training users to disk, held-out users to memory

Memory  80 bytes a user and item, the held-out users' events, and about 75 bytes an event of the largest bucket.
Disk    the scratch folder holds 17 bytes an event beside `spilled`'s, and in the end 4 a training event.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cfsfl_fast.datasets.dataset import Dataset, binary_csr
from cfsfl_fast.datasets.events import first_of_each
from cfsfl_fast.datasets.protocol import Protocol, fold_in, held_out_count, order_of_appearance, split_users
from cfsfl_fast.datasets.spilled import BLOCK, SpilledEvents, append
from cfsfl_fast.datasets.table import Chunk

BUCKET_EVENTS = 8 << 20
"""Events that are sorted at once: 0.6 GB."""

_MOST_BUCKETS = 500  # files that are open together

_EVENT = np.dtype([("user", np.int32), ("item", np.int32), ("place", np.int64), ("passes", np.bool_)])


def split_chunks(
    chunks: Iterable[Chunk], protocol: Protocol, name: str, scratch: Path, *, bucket_events: int = BUCKET_EVENTS
) -> Dataset:
    """Applies the protocol to chunks of events.

    Args:
        chunks: of all events, in the order of the file.
        protocol: filters and split.
        name: of the source.
        scratch: an empty folder. The training rows of the answer are mapped from there: it must stay as long as the
            answer is used.
        bucket_events: events that are sorted at once, where no one user has more.

    Raises:
        ValueError: as in `events.collect` and `split_events`.
    """
    spilled = SpilledEvents(chunks, protocol.min_rating, name, scratch)
    n_users, n_items = len(spilled.user_ids), len(spilled.item_ids)
    report: dict[str, Any] = {"events_read": spilled.n_events, "duplicates": 0, "explicit_zeros": 0}
    buckets = _Buckets(spilled, scratch, bucket_events)
    user_counts = _filter(buckets, protocol, report, n_users, n_items)

    present = np.flatnonzero(user_counts)
    if len(present) == 0:
        raise ValueError(f"{name}: no event passes the filters of {protocol}")
    held_out = held_out_count(protocol, len(present), name)
    parts = split_users(present, held_out, protocol)
    part_of = np.full(n_users, -1, np.int8)
    for number, users in enumerate(parts):
        part_of[users] = number

    never = np.iinfo(np.int64).max
    first = np.full(n_items, never)
    for _, events in buckets:
        mine = events[part_of[events["user"]] == 0]
        places = np.full(n_items, never)
        places[mine["item"][::-1]] = mine["place"][::-1]  # of repeated indices the last assignment stays
        np.minimum(first, places, out=first)
    first[first == never] = -1
    column_of, codes = order_of_appearance(first)
    train = parts[0]
    indptr = np.concatenate([[0], np.cumsum(user_counts[train])])
    report["train"] = {"users": len(train), "items": len(codes), "events": int(indptr[-1])}

    aside: list[list[NDArray[Any]]] = [[], []]
    rows = scratch / "train"
    with rows.open("wb") as file:
        for _, events in buckets:
            part = part_of[events["user"]]
            mine = events[part == 0]
            keys = mine["user"].astype(np.int64) * len(codes) + column_of[mine["item"]]
            keys.sort()
            append(file, (keys % max(1, len(codes))).astype(np.int32))
            for number in (1, 2):
                aside[number - 1].append(events[part == number])
    buckets.remove()
    groups = []
    for part, found in zip(("validation", "test"), aside, strict=True):
        events = np.concatenate(found)
        columns = column_of[events["item"]]
        known = columns >= 0
        group, counts = fold_in(events["user"][known], columns[known], len(codes), spilled.user_ids, protocol)
        skipped, unknown = held_out - counts["users"], int((~known).sum())
        report[part] = {"held_out": held_out, "skipped": skipped, **counts, "events_of_unknown_items": unknown}
        groups.append(group)
    if indptr[-1] < 2**31:
        indptr = indptr.astype(np.int32)  # scipy wants one type for both, and indices must not be copied
    indices = np.memmap(rows, np.int32, "r") if indptr[-1] else np.empty(0, np.int32)
    matrix = binary_csr(indices, indptr, len(codes))
    return Dataset(name, matrix, groups[0], groups[1], spilled.item_ids[codes], spilled.user_ids[train], report)


class _Buckets:
    """Files of events whose users ascend from file to file; within a file, events are in the order of the source."""

    def __init__(self, spilled: SpilledEvents, scratch: Path, bucket_events: int) -> None:
        size = max(1, bucket_events, -(-spilled.n_events // _MOST_BUCKETS))
        bucket_of = np.maximum(np.cumsum(spilled.user_counts) - 1, 0) // size  # [U]
        n_buckets = int(bucket_of[-1]) + 1
        self._paths = [scratch / f"bucket-{number}" for number in range(n_buckets)]
        with contextlib.ExitStack() as opened:
            files = [opened.enter_context(path.open("wb")) for path in self._paths]
            for number, (users, items, passing) in enumerate(spilled.blocks()):
                events = np.empty(len(users), _EVENT)
                events["user"], events["item"], events["passes"] = users, items, passing
                events["place"] = np.arange(number * BLOCK, number * BLOCK + len(users))
                bucket = bucket_of[users].astype(np.uint16)
                order = np.argsort(bucket, kind="stable")
                ends = np.cumsum(np.bincount(bucket, minlength=n_buckets))
                for file, some in zip(files, np.split(events[order], ends[:-1]), strict=True):
                    append(file, some)
        spilled.remove()

    def __iter__(self) -> Iterator[tuple[Path, NDArray[Any]]]:
        for path in self._paths:
            yield path, np.fromfile(path, _EVENT)

    def remove(self) -> None:
        """Frees the disk."""
        for path in self._paths:
            path.unlink()


def _replace(path: Path, events: NDArray[Any]) -> None:
    with path.open("wb") as file:
        append(file, events)


class _Counts:
    """How many users, items and events are left after a filter."""

    def __init__(self, n_users: int, n_items: int) -> None:
        self.users, self.items = np.zeros(n_users, np.int64), np.zeros(n_items, np.int64)

    def add(self, events: NDArray[Any]) -> None:
        if len(events):
            low = int(events["user"].min())  # a bucket has few users, and their codes lie together
            there = np.bincount(events["user"] - low)
            self.users[low : low + len(there)] += there
        self.items += np.bincount(events["item"], minlength=len(self.items))

    def report(self) -> dict[str, int]:
        users, items = (int(np.count_nonzero(counts)) for counts in (self.users, self.items))
        return {"users": users, "items": items, "events": int(self.users.sum())}


def _filter(
    buckets: _Buckets, protocol: Protocol, report: dict[str, Any], n_users: int, n_items: int
) -> NDArray[np.int64]:
    """Leaves in the buckets what passes; the events of every user. [U]"""
    distinct, rated, of_items, left = (_Counts(n_users, n_items) for _ in range(4))
    for path, events in buckets:
        n_read = len(events)
        keep = first_of_each(events["user"], events["item"], n_items)
        if keep is not None:
            report["duplicates"] += n_read - len(keep)
            events = events[keep]
        distinct.add(events)
        if protocol.min_rating is not None:
            events = events[events["passes"]]
            rated.add(events)
        if len(events) < n_read:
            _replace(path, events)
    report["distinct"] = distinct.report()
    counts = distinct
    if protocol.min_rating is not None:
        report["after_rating"], counts = rated.report(), rated
    if protocol.min_item_users is not None or protocol.min_user_items is not None:
        popular = None if protocol.min_item_users is None else counts.items >= protocol.min_item_users
        for path, events in buckets:
            n_read = len(events)
            if popular is not None:
                events = events[popular[events["item"]]]
                of_items.add(events)
            if protocol.min_user_items is not None:
                events = _of_active(events, protocol.min_user_items)
                left.add(events)
            if len(events) < n_read:
                _replace(path, events)
    if protocol.min_item_users is not None:
        report["after_items"], counts = of_items.report(), of_items
    if protocol.min_user_items is not None:
        report["after_users"], counts = left.report(), left
    return counts.users


def _of_active(events: NDArray[Any], least: int) -> NDArray[Any]:
    """The events of users who have at least so many."""
    if len(events) == 0:
        return events
    place = events["user"] - events["user"].min()
    kept: NDArray[Any] = events[(np.bincount(place) >= least)[place]]
    return kept
