"""The protocol against a slow transcription of its definition in dictionaries and loops, and by its properties."""

import csv
import io
import lzma
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cfsfl_fast.datasets import Dataset, Events, HeldOut, Protocol, read_events, split_events
from cfsfl_fast.datasets.events import collect
from cfsfl_fast.datasets.table import Chunk

DATA = Path(os.environ.get("CFSFL_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
SMALL = DATA / "ml-latest-small_ratings.csv.xz"
needs_small = pytest.mark.skipif(not SMALL.is_file(), reason=f"{SMALL.name} not found; set CFSFL_DATA to its folder")

Triple = tuple[object, object, float]


def slow_split(rows: list[Triple], min_rating, min_item_users, min_user_items, held_out, seed=98765):
    """The protocol, word for word.

    Gives the item ids, the training users' items, and per held-out group the (fold-in, targets) of its users and how
    many were skipped; None where nobody is left to train on.
    """
    seen, distinct = set(), []
    for user, item, rating in rows:
        if (user, item) not in seen:
            seen.add((user, item))
            distinct.append((user, item, rating))
    kept = [(u, i) for u, i, r in distinct if min_rating is None or r > min_rating]
    if min_item_users is not None:
        users_of: dict = {}
        for _, i in kept:
            users_of[i] = users_of.get(i, 0) + 1
        kept = [(u, i) for u, i in kept if users_of[i] >= min_item_users]
    if min_user_items is not None:
        items_of: dict = {}
        for u, _ in kept:
            items_of[u] = items_of.get(u, 0) + 1
        kept = [(u, i) for u, i in kept if items_of[u] >= min_user_items]

    users = sorted({u for u, _ in kept})
    if len(users) <= 2 * held_out:
        return None
    shuffled = [users[k] for k in np.random.RandomState(seed).permutation(len(users))]
    n_train = len(users) - 2 * held_out
    train_users = set(shuffled[:n_train])
    item_ids = list(dict.fromkeys(i for u, i in kept if u in train_users))
    vocabulary = set(item_ids)
    train: dict = {}
    for u, i in kept:
        if u in train_users:
            train.setdefault(u, set()).add(i)
    parts = []
    for group in (shuffled[n_train : n_train + held_out], shuffled[n_train + held_out :]):
        rows_of: dict = {u: [] for u in group}
        for u, i in kept:
            if u in rows_of and i in vocabulary:
                rows_of[u].append(i)
        random = np.random.RandomState(seed)
        result = {}
        for u in sorted(rows_of):
            n = len(rows_of[u])
            if n >= 5:
                target = set(random.choice(n, size=int(0.2 * n), replace=False).tolist())
                targets = {i for k, i in enumerate(rows_of[u]) if k in target}
                result[u] = (set(rows_of[u]) - targets, targets)
        parts.append((result, len(group) - len(result)))
    return item_ids, train, parts


def rows_by_id(matrix, user_ids, item_ids) -> dict[object, set[object]]:
    return {
        user: set(item_ids[matrix.indices[matrix.indptr[n] : matrix.indptr[n + 1]]].tolist())
        for n, user in enumerate(user_ids.tolist())
    }


def assert_same(dataset: Dataset, expected: tuple) -> None:
    item_ids, train, parts = expected
    assert dataset.item_ids.tolist() == item_ids
    assert rows_by_id(dataset.train, dataset.user_ids, dataset.item_ids) == train
    for name, group, (users, skipped) in zip(
        ("validation", "test"), (dataset.validation, dataset.test), parts, strict=True
    ):
        fold_in = rows_by_id(group.fold_in, group.user_ids, dataset.item_ids)
        targets = rows_by_id(group.targets, group.user_ids, dataset.item_ids)
        assert fold_in == {u: pair[0] for u, pair in users.items()}
        assert targets == {u: pair[1] for u, pair in users.items()}
        assert dataset.report[name]["skipped"] == skipped


def events_from(rows: list[Triple], chunk: int = 1 << 20) -> Events:
    def ids(column: list) -> np.ndarray:
        return np.array(column, np.int64) if isinstance(column[0], int) else np.array([c.encode() for c in column])

    def chunks() -> Iterator[Chunk]:
        for start in range(0, len(rows), chunk):
            users, items, ratings = (list(column) for column in zip(*rows[start : start + chunk], strict=True))
            yield Chunk(ids(users), ids(items), np.array(ratings, float))

    return collect(chunks(), "rows")


@needs_small
@pytest.mark.parametrize(
    ("min_rating", "min_item_users", "min_user_items", "held_out", "seed"),
    [
        (3.5, None, 5, 60, 98765),
        (3.5, None, 5, 100, 1),
        (None, None, 5, 67, 98765),
        (None, 20, 20, 50, 98765),
        (4.0, 10, 5, 200, 7),
        (4.5, None, None, 150, 98765),
    ],
)
def test_movielens_small_is_split_word_for_word(
    min_rating: float | None, min_item_users: int | None, min_user_items: int | None, held_out: int, seed: int
) -> None:
    rows = [
        (int(row["userId"]), int(row["movieId"]), float(row["rating"]))
        for row in csv.DictReader(io.StringIO(lzma.decompress(SMALL.read_bytes()).decode()))
    ]
    options = (min_rating, min_item_users, min_user_items, held_out, seed)
    dataset = split_events(read_events(SMALL), Protocol(*options))
    dataset.validate()
    assert_same(dataset, slow_split(rows, *options))


@needs_small
def test_any_block_size_gives_the_same_split() -> None:
    protocol = Protocol(min_rating=3.5, min_user_items=5, held_out=60)
    whole = split_events(read_events(SMALL), protocol)
    for block_bytes in (4099, 77_777):
        parts = split_events(read_events(SMALL, block_bytes=block_bytes), protocol)
        assert parts.report == whole.report
        assert parts.item_ids.tolist() == whole.item_ids.tolist()
        for a, b in zip(parts.matrices().values(), whole.matrices().values(), strict=True):
            assert (a != b).nnz == 0


random_rows = st.lists(
    st.tuples(st.integers(-3, 25), st.integers(0, 14), st.sampled_from([0.5, 3.0, 3.5, 4.0, 5.0])),
    min_size=40,
    max_size=220,
)


@settings(max_examples=60, deadline=None)
@given(
    rows=random_rows,
    min_rating=st.sampled_from([None, 3.0]),
    min_item_users=st.sampled_from([None, 3]),
    min_user_items=st.sampled_from([None, 2, 5]),
    as_text=st.booleans(),
    chunk=st.sampled_from([1, 7, 1000]),
)
def test_any_events_are_split_word_for_word(
    rows: list[Triple],
    min_rating: float | None,
    min_item_users: int | None,
    min_user_items: int | None,
    as_text: bool,
    chunk: int,
) -> None:
    if as_text:  # "u-1" < "u0" < "u10" < "u2": lexicographic, not numeric
        rows = [(f"u{u}", f"ä{i}", r) for u, i, r in rows]
    protocol = Protocol(min_rating, min_item_users, min_user_items, held_out=3, seed=5)
    expected = slow_split(rows, min_rating, min_item_users, min_user_items, 3, 5)
    if expected is None:
        with pytest.raises(ValueError, match=r"no event passes|held_out = 3"):
            split_events(events_from(rows, chunk), protocol)
    else:
        dataset = split_events(events_from(rows, chunk), protocol)
        dataset.validate()
        assert_same(dataset, expected)


@pytest.fixture(scope="module")
def example() -> tuple[Dataset, Protocol]:
    random = np.random.default_rng(3)
    pairs = {(int(u), int(i)) for u, i in zip(random.zipf(1.3, 9000) % 211, random.zipf(1.2, 9000) % 97, strict=True)}
    rows = [(u, i, 1.0) for u, i in sorted(pairs, key=lambda pair: hash(pair))]
    protocol = Protocol(min_user_items=3, held_out=30)
    return split_events(events_from(rows), protocol), protocol


def test_users_of_the_three_parts_are_disjoint_and_all_there(example: tuple[Dataset, Protocol]) -> None:
    dataset, _ = example
    report = dataset.report
    parts = [set(ids.tolist()) for ids in (dataset.user_ids, dataset.validation.user_ids, dataset.test.user_ids)]
    assert sum(map(len, parts)) == len(set.union(*parts))
    skipped = report["validation"]["skipped"] + report["test"]["skipped"]
    assert skipped > 0
    assert sum(map(len, parts)) + skipped == report["after_users"]["users"]


def test_a_fifth_of_the_items_rounded_down_are_targets(example: tuple[Dataset, Protocol]) -> None:
    dataset, _ = example
    for group in (dataset.validation, dataset.test):
        n_targets = np.diff(group.targets.indptr)
        n = n_targets + np.diff(group.fold_in.indptr)
        assert n.min() >= 5
        assert n_targets.tolist() == [int(0.2 * k) for k in n.tolist()]
        assert group.fold_in.multiply(group.targets).nnz == 0


def test_counts_of_the_report_add_up(example: tuple[Dataset, Protocol]) -> None:
    dataset, _ = example
    report = dataset.report
    assert report["events_read"] == report["distinct"]["events"] + report["duplicates"]
    assert report["train"] == {"users": dataset.n_users, "items": dataset.n_items, "events": dataset.train.nnz}
    for name, group in (("validation", dataset.validation), ("test", dataset.test)):
        assert report[name]["users"] + report[name]["skipped"] == report[name]["held_out"] == 30
        assert report[name]["fold_in_events"] == group.fold_in.nnz
        assert report[name]["target_events"] == group.targets.nnz


def test_every_item_has_a_training_user_and_one_column(example: tuple[Dataset, Protocol]) -> None:
    dataset, _ = example
    assert len(set(dataset.item_ids.tolist())) == dataset.n_items == dataset.train.shape[1]
    assert np.bincount(dataset.train.indices, minlength=dataset.n_items).min() >= 1


def test_another_seed_gives_another_split(example: tuple[Dataset, Protocol]) -> None:
    rows = [(u, i, 1.0) for u in range(50) for i in range(10)]
    one, two = (split_events(events_from(rows), Protocol(held_out=5, seed=seed)) for seed in (1, 2))
    assert one.test.user_ids.tolist() != two.test.user_ids.tolist()


def test_fold_in_is_drawn_anew_for_test() -> None:
    rows = [(u, i, 1.0) for u in range(30) for i in range(20)]  # equal histories: equal draws
    dataset = split_events(events_from(rows), Protocol(held_out=4))
    assert (dataset.validation.targets != dataset.test.targets).nnz == 0


def test_of_repeated_events_the_first_counts() -> None:
    rows = [(u, i, 5.0) for u in range(12) for i in range(6)]
    again = [*rows[:1], (0, 1, 1.0), *rows[1:], (0, 0, 1.0)]  # user 0: item 1 first with 1.0, item 0 first with 5.0
    dataset = split_events(events_from(again), Protocol(min_rating=3.5, held_out=1))
    assert dataset.report["duplicates"] == 2
    assert dataset.report["distinct"]["events"] == 72
    assert dataset.report["after_rating"]["events"] == 71


def test_items_that_training_users_never_saw_are_dropped_and_counted() -> None:
    common = [(u, i, 1.0) for u in range(20) for i in range(6)]
    own = [(u, 100 + u, 1.0) for u in range(20)]
    dataset = split_events(events_from(common + own), Protocol(held_out=4))
    assert dataset.report["validation"]["events_of_unknown_items"] == 4
    assert set(dataset.item_ids.tolist()) == set(range(6)) | {100 + u for u in dataset.user_ids.tolist()}


@pytest.mark.parametrize(("n_users", "expected"), [(5, 1), (19, 1), (20, 2), (2000, 200)])
def test_auto_holds_out_a_tenth(n_users: int, expected: int) -> None:
    rows = [(u, i, 1.0) for u in range(n_users) for i in range(5)]
    dataset = split_events(events_from(rows), Protocol.preset("none"))
    assert len(dataset.validation.user_ids) == len(dataset.test.user_ids) == expected


def test_held_out_users_must_leave_some_to_train_on() -> None:
    rows = [(u, i, 1.0) for u in range(10) for i in range(5)]
    assert split_events(events_from(rows[:50]), Protocol(held_out=4)).n_users == 2
    with pytest.raises(ValueError, match=r"held_out = 5 .* found 10 users"):
        split_events(events_from(rows), Protocol(held_out=5))


def test_no_ratings_where_the_protocol_needs_them() -> None:
    events = collect([Chunk(np.arange(9), np.arange(9), None)], "plays.csv")
    with pytest.raises(ValueError, match=r"plays\.csv: the protocol keeps ratings above 3\.5; found no ratings"):
        split_events(events, Protocol.preset("ml-20m"))


def test_presets_are_the_published_ones() -> None:
    expected = {
        "ml-20m": (3.5, None, 5, 10_000),
        "netflix": (3.5, None, 5, 40_000),
        "msd": (None, 200, 20, 50_000),
        "none": (None, None, 5, "auto"),
    }
    for name, values in expected.items():
        p = Protocol.preset(name)
        assert (p.min_rating, p.min_item_users, p.min_user_items, p.held_out) == values
        assert (p.seed, p.target_share, p.min_fold_in_items) == (98765, 0.2, 5)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"held_out": 0}, "held_out"),
        ({"held_out": "all"}, "held_out"),
        ({"target_share": 1.0}, "share"),
        ({"seed": -1}, "seed"),
    ],
)
def test_impossible_protocols_are_refused(wrong: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Protocol(**wrong)


def test_unknown_preset_names_the_known() -> None:
    with pytest.raises(ValueError, match=r"'ml20m'.*ml-20m, netflix, msd, none"):
        Protocol.preset("ml20m")


def test_validate_finds_a_target_that_is_fold_in(example: tuple[Dataset, Protocol]) -> None:
    dataset, _ = example
    group = dataset.test
    broken = HeldOut(group.targets, group.targets, group.user_ids)
    damaged = Dataset(
        dataset.name, dataset.train, dataset.validation, broken, dataset.item_ids, dataset.user_ids, dataset.report
    )
    with pytest.raises(ValueError, match="test has a target that is also in the fold-in"):
        damaged.validate()
