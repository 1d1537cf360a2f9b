"""Inputs that nobody would think of: each a clear ValueError or TypeError, or the answer that a slow oracle gives.

make fuzz     # thousands of each, and a table of what came of them
"""

from __future__ import annotations

import bz2
import dataclasses
import gzip
import io
import itertools
import json
import lzma
import math
import re
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cfsfl_fast import CFSFL, CFSFLConfig, cpp, library
from cfsfl_fast.datasets import Events, load_source, read_events, read_histories
from cfsfl_fast.interactions import Interactions, as_interactions
from tests.conftest import effort, tally
from tests.test_model import M, build, by_the_book

REFUSED, RIGHT = "refused", "right"


def fuzzed(share: float = 0.5) -> Callable[[Any], Any]:
    """So many examples as the profile says, times a share; the tests write files, and hypothesis would mind."""
    checks = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large]
    return settings(max_examples=effort(share), deadline=None, suppress_health_check=checks)


def attempt(what: str, act: Callable[[], Any], check: Callable[[Any], None], *also: type[Exception]) -> str:
    """Tallies what comes of an input; anything but a refusal in words or a checked answer is the test's error."""
    try:
        found = act()
    except (ValueError, TypeError, *also):
        tally[what, REFUSED] += 1
        return REFUSED
    check(found)
    tally[what, RIGHT] += 1
    return RIGHT


# Histories

N_ITEMS = 9
sizes = st.integers(0, 6)
values = st.sampled_from([1.0, 1.0, 1.0, 0.5, 7.0, 0.0, -1.0, math.nan, math.inf, -math.inf, 1e-320])
triplets = st.lists(st.tuples(st.integers(0, 5), st.integers(0, N_ITEMS - 1), values), max_size=14)
FORMS = (
    "csr",
    "csc",
    "coo",
    "bsr",
    "lil",
    "dok",
    "dia",
    "numpy",
    "torch",
    "torch csr",
    "torch coo",
    "torch csc",
    "pair",
)


def form_of(cells: dict[tuple[int, int], float], n_users: int, form: str, dtype: str) -> Any:
    """The same cells in one of the forms that are taken."""
    dense = np.zeros((n_users, N_ITEMS), dtype)
    for (row, item), value in cells.items():
        dense[row, item] = value
    if form == "numpy":
        return dense
    if form.startswith("torch"):
        tensor = torch.from_numpy(dense)
        return {
            "torch": tensor.clone,
            "torch csr": tensor.to_sparse_csr,
            "torch coo": tensor.to_sparse_coo,
            "torch csc": tensor.to_sparse_csc,
        }[form]()
    csr = sp.csr_matrix(dense)
    if form == "pair":
        return csr.indices, csr.indptr
    return csr.asformat(form) if min(csr.shape) else csr


def check_rows(x: Interactions, expected: list[set[int]]) -> None:
    """x holds the expected sets, ascending."""
    offsets = x.offsets.tolist()
    assert offsets[0] == 0
    found = [x.items[a:b].tolist() for a, b in itertools.pairwise(offsets)]
    assert found == [sorted(row) for row in expected]


@fuzzed(2)
@given(triplets, st.integers(0, 3), st.sampled_from(FORMS), st.sampled_from(["float32", "float64", "int8", "bool"]))
def test_histories(rows: list[tuple[int, int, float]], more: int, form: str, dtype: str) -> None:
    n_users = max((row for row, _, _ in rows), default=-1) + 1 + more
    with np.errstate(invalid="ignore", under="ignore"):
        cells = {(row, item): np.asarray(value).astype(dtype).item() for row, item, value in rows}
        x = form_of(cells, n_users, form, dtype)
    bad = any(value < 0 or not math.isfinite(value) for value in cells.values()) and form != "pair"
    expected = [{i for (u, i), value in cells.items() if u == user and value != 0} for user in range(n_users)]
    if form == "pair":
        expected = [{i for (u, i), value in cells.items() if u == user and value != 0} for user in range(n_users)]
    found = attempt("histories", lambda: as_interactions(x, N_ITEMS), lambda x: check_rows(x, expected))
    assert (found == REFUSED) == bad


numbers = st.one_of(st.integers(-3, 12), st.sampled_from([2**31, -(2**31), 2**40, 2**62, -(2**63), 2**63 - 1]))


@fuzzed(2)
@given(st.sampled_from(["csr", "csc", "coo", "pair", "torch csr", "torch coo"]), st.data())
def test_histories_whose_arrays_were_altered(form: str, data: st.DataObject) -> None:
    """After they were made, when nothing looks at them any more but what takes them."""
    pairs = [(r, i) for r in range(4) for i in range(N_ITEMS) if (r * 3 + i) % 4 == 0]
    x = form_of(dict.fromkeys(pairs, 1.0), 4, form, "float32")
    wide = np.dtype(np.int64)
    if form == "pair":
        arrays = [ids.astype(wide) for ids in x]
        x = tuple(arrays)
    elif form.startswith("torch"):
        ids = [x.crow_indices(), x.col_indices()] if form == "torch csr" else list(x.coalesce()._indices().clone())
        arrays = [i.numpy() for i in ids]
        if form == "torch coo":
            x = torch.sparse_coo_tensor(torch.stack(ids), torch.ones(len(pairs)), (4, N_ITEMS), check_invariants=False)
            arrays = [x._indices()[0].numpy(), x._indices()[1].numpy()]
    elif form == "coo":
        x.coords = tuple(ids.astype(wide) for ids in x.coords)
        arrays = list(x.coords)
    else:
        x.indices, x.indptr = x.indices.astype(wide), x.indptr.astype(wide)
        arrays = [x.indices, x.indptr]
        assert x.has_canonical_format  # and SciPy believes it from here on
    for _ in range(data.draw(st.integers(1, 3))):
        array = arrays[data.draw(st.integers(0, len(arrays) - 1))]
        array[data.draw(st.integers(0, len(array) - 1))] = data.draw(numbers)

    def sound(x: Interactions) -> None:
        offsets = x.offsets.tolist()
        assert len(offsets) == 5
        for a, b in itertools.pairwise(offsets):
            row = x.items[a:b].tolist()
            assert row == sorted(set(row))
            assert all(0 <= item < N_ITEMS for item in row)

    attempt("histories, arrays altered", lambda: as_interactions(x, N_ITEMS), sound)


anything = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(),
        st.text(max_size=5),
        st.binary(max_size=5),
        st.complex_numbers(),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.tuples(inner, inner), st.dictionaries(st.text(max_size=3), inner, max_size=2)
    ),
    max_leaves=6,
)


@fuzzed()
@given(anything)
def test_histories_that_are_anything(x: Any) -> None:
    attempt("histories, anything", lambda: as_interactions(x, N_ITEMS), lambda x: None)


# Configs and models


@fuzzed(2)
@given(
    st.dictionaries(
        st.sampled_from([f.name for f in dataclasses.fields(CFSFLConfig)]),
        st.one_of(
            anything, st.integers(-2, 40), st.sampled_from(["auto", "vae", "dae", "mf", "full", "hard", "all", "none"])
        ),
        max_size=4,
    ),
    anything,
)
def test_configs(fields: dict[str, Any], n_items: Any) -> None:
    def check(config: CFSFLConfig) -> None:
        assert CFSFLConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
        config.resolved(100)

    attempt("configs", lambda: CFSFLConfig.from_dict(fields), check)
    small = {"hidden_dim": 4, "latent_dim": 2, "lookup_dim": 4, "feedback_dim": 4}
    given = {k: v for k, v in fields.items() if not (isinstance(v, int) and v > 500)}
    few = n_items if not isinstance(n_items, int) or n_items < 1000 else 7
    attempt(
        "models", lambda: CFSFL(few, **{**small, **given}), lambda m: m.recommend(np.zeros((1, m.n_items)), 3, steps=1)
    )


MODEL = build(steps=2)
ids_of_anything = st.one_of(
    st.none(), st.lists(st.integers(-2, M + 1), max_size=8), st.sets(st.integers(0, M - 1), max_size=60), anything
)


@fuzzed(0.4)
@given(
    st.lists(st.sets(st.integers(0, M - 1), max_size=12), max_size=4),
    st.one_of(st.integers(-1, M + 3), anything),
    st.booleans(),
    ids_of_anything,
    ids_of_anything,
    st.one_of(st.none(), st.integers(-1, 3), anything),
    st.one_of(st.integers(-1, 5), anything),
)
def test_recommend(
    rows: list[set[int]], n: Any, exclude_seen: bool, exclude: Any, candidates: Any, steps: Any, batch_size: Any
) -> None:
    dense = np.zeros((len(rows), M), np.float32)
    for row, items in zip(dense, rows, strict=True):
        row[sorted(items)] = 1

    def check(found: tuple[torch.Tensor, torch.Tensor]) -> None:
        ids, scores = found
        truth = by_the_book(MODEL, dense, 2 if steps is None else steps).detach().numpy() if rows else np.zeros((0, M))
        assert ids.shape == scores.shape == (len(rows), n)
        for user, (row, values) in enumerate(zip(ids.tolist(), scores.tolist(), strict=True)):
            allowed = set(range(M)) if candidates is None else {int(i) for i in candidates}
            allowed -= rows[user] if exclude_seen else set()
            allowed -= {int(i) for i in exclude} if exclude is not None else set()
            listed = [item for item in row if item >= 0]
            assert len(listed) == len(set(listed)) == min(n, len(allowed))
            assert row[len(listed) :] == [-1] * (n - len(listed))
            assert set(listed) <= allowed
            assert np.allclose(values[: len(listed)], truth[user, listed], atol=1e-4)
            assert values == sorted(values, reverse=True)
            if rest := allowed - set(listed):
                assert not listed or truth[user, sorted(rest)].max() <= truth[user, listed[-1]] + 1e-4

    def act() -> Any:
        return MODEL.recommend(
            dense,
            n,
            exclude_seen=exclude_seen,
            exclude=exclude,
            candidates=candidates,
            steps=steps,
            batch_size=batch_size,
        )

    attempt("recommend", act, check)


@fuzzed(0.2)
@given(
    st.lists(st.sets(st.integers(0, M - 1), max_size=12), max_size=4),
    st.one_of(st.none(), st.integers(-1, 4), anything),
)
def test_unroll(rows: list[set[int]], steps: Any) -> None:
    pair = [i for row in rows for i in sorted(row)], np.cumsum([0, *map(len, rows)])

    def check(trace: Any) -> None:
        T = 2 if steps is None else steps
        assert trace.ids.shape == (T, len(rows), 7)
        assert trace.rewards.shape == (T, len(rows))
        assert ((trace.rewards > 0) & (trace.rewards < 1)).all()
        assert trace.feedback.isfinite().all()
        for t in range(T):
            expected = MODEL.recommend(pair, 7, steps=t)[0]
            assert torch.equal(trace.ids[t], expected)

    attempt("unroll", lambda: MODEL.unroll(pair, steps=steps), check)


# Files: mutations of good ones

edits = st.lists(
    st.tuples(
        st.sampled_from(["flip", "set", "insert", "delete", "repeat", "cut", "swap"]),
        st.floats(0, 1, exclude_max=True),
        st.integers(0, 255),
        st.binary(max_size=3),
    ),
    min_size=1,
    max_size=4,
)


def mutated(content: bytes, changes: list[tuple[str, float, int, bytes]]) -> bytes:
    """A file after some accidents."""
    data = bytearray(content)
    for kind, place, number, text in changes:
        at = int(place * len(data))
        if kind == "cut":
            del data[at + number :]
        elif kind == "insert":
            data[at:at] = text
        elif not data:
            continue
        elif kind == "flip":
            data[at] ^= 1 << number % 8
        elif kind == "set":
            data[at] = b'0123456789,:\n\r\t ".-e\0\xff'[number % 22]
        elif kind == "delete":
            del data[at : at + number % 8 + 1]
        elif kind == "repeat":
            data[at:at] = data[at : at + number]
        else:
            data[at : at + 2] = data[at : at + 2][::-1]
    return bytes(data)


PAIRS = [(u, i) for u in range(1, 13) for i in range(1, 10) if (u * i) % 3]
TEXTS = {
    "ratings.csv": "userId,movieId,rating,timestamp\n" + "".join(f"{u},{i},{u % 5}.5,9\n" for u, i in PAIRS),
    "ratings.dat": "".join(f"{u}::{i}::{u % 5 + 1}::978300760\n" for u, i in PAIRS),
    "u.data": "".join(f"{u}\t{i}\t{u % 5 + 1}\t881250949\n" for u, i in PAIRS),
    "train_triplets.txt": "".join(f"b80344d{u}\tSOAKIMP{i}\t{u % 5 + 1}\n" for u, i in PAIRS),
    "combined_data_1.txt": "".join(
        f"{i}:\n" + "".join(f"{u},3,2005-09-06\n" for u in range(1, 9)) for i in range(1, 8)
    ),
}
FORMATS = {"ratings.csv": "movielens-csv", "ratings.dat": "movielens-dat", "u.data": "movielens-data"}
FORMATS |= {"train_triplets.txt": "msd", "combined_data_1.txt": "netflix"}
LINES = {
    "ratings.csv": (",", 4, True),
    "ratings.dat": ("::", 4, True),
    "u.data": ("\t", 4, True),
    "train_triplets.txt": ("\t", 3, False),
}


class BadError(Exception):
    """The oracle refuses."""


def slow_lines(content: bytes) -> Iterator[str]:
    """The lines that are not blank."""
    content = content.removeprefix(b"\xef\xbb\xbf")
    if b"\0" in content or content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise BadError
    try:
        text = content.decode()
    except UnicodeDecodeError:
        raise BadError from None
    for line in text.split("\n"):
        line = line.removesuffix("\r")
        if line:
            yield line


def slow_id(text: str, integer: bool) -> int | str:
    """An identifier: a canonical integer or, where texts are allowed, any text."""
    text = text.strip(" ")
    if re.fullmatch("0|-?[1-9][0-9]{0,17}", text, re.ASCII):
        return int(text)
    if integer or not text or len(text.encode()) > 512:
        raise BadError
    return text


def slow_rating(text: str) -> float:
    """A finite number, blanks around it."""
    text = text.strip(" ")
    if not re.fullmatch("[!-~]+", text) or "_" in text:  # what float would take, too
        raise BadError
    try:
        value = float(text)
    except ValueError:
        raise BadError from None
    if not math.isfinite(value):
        raise BadError
    return value


def slow_events(name: str, content: bytes) -> dict[tuple[str, str], float]:
    """Line by line, as the format is described: the first rating of every pair."""
    found: dict[tuple[str, str], float] = {}
    movie: int | None = None
    lines = list(slow_lines(content))
    if name == "ratings.csv" and (not lines or lines.pop(0) != "userId,movieId,rating,timestamp"):
        raise BadError
    for line in lines:
        if name == "combined_data_1.txt":
            if line.endswith(":"):
                if not re.fullmatch("[0-9]{1,9}:", line, re.ASCII):
                    raise BadError
                movie = int(line[:-1])
                continue
            cells = line.split(",")
            if len(cells) != 3 or movie is None:
                raise BadError
            user, item, rating = slow_id(cells[0], True), movie, slow_rating(cells[1])
        else:
            delimiter, n_columns, integer = LINES[name]
            if ":::" in line and delimiter == "::":
                raise BadError  # where does it end?
            cells = line.split(delimiter)
            if len(cells) != n_columns:
                raise BadError
            user, item, rating = slow_id(cells[0], integer), slow_id(cells[1], integer), slow_rating(cells[2])
        found.setdefault((str(user), str(item)), rating)
    if not found:
        raise BadError
    return found


def as_dict(events: Events) -> dict[tuple[str, str], float]:
    """The events by their own ids."""
    users, items = events.user_ids[events.users].tolist(), events.item_ids[events.items].tolist()
    ratings = [math.nan] * len(users) if events.ratings is None else events.ratings.tolist()
    found = {(str(u), str(i)): r for u, i, r in zip(users, items, ratings, strict=True)}
    assert len(found) == len(users)
    return found


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where files are written and read, again and again."""
    return tmp_path_factory.mktemp("fuzz")


@pytest.mark.parametrize("name", TEXTS)
@fuzzed()
@given(edits, st.integers(1, 400))
def test_text_files(place: Path, name: str, changes: list[tuple[str, float, int, bytes]], block_bytes: int) -> None:
    content = mutated(TEXTS[name].encode(), changes)
    folder = place / name.split(".", 1)[0]
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(content)
    try:
        expected = slow_events(name, content)
    except BadError:
        expected = None

    def check(events: Events) -> None:
        assert expected is not None, "what the format does not allow is read"
        assert as_dict(events) == expected

    def act() -> Events:
        return read_events(folder / name, format=FORMATS[name], block_bytes=block_bytes)

    found = attempt(f"text: {name}", act, check)
    assert (found == REFUSED) == (expected is None)


CSV = "user;item;rating\n" + "".join(f'"u{u}";{i};{u % 5}.25\n' for u, i in PAIRS)


@fuzzed()
@given(edits, st.sampled_from(["auto", "csv"]), st.one_of(st.none(), st.booleans()))
def test_csv_of_any_layout(place: Path, changes: list[tuple[str, float, int, bytes]], format: str, header: Any) -> None:
    (place / "any.csv").write_bytes(mutated(CSV.encode(), changes))

    def check(events: Events) -> None:
        found = as_dict(events)
        assert all(user and item for user, item in found)
        assert all(math.isfinite(rating) or events.ratings is None for rating in found.values())

    attempt("text: any csv", lambda: read_events(place / "any.csv", format=format, header=header), check)


@fuzzed()
@given(
    st.binary(max_size=200),
    st.sampled_from(["a.csv", "a.tsv", "a.txt", "a.npz", "a.parquet", "a.csv.gz", "a.zip", "a.tar"]),
)
def test_files_of_anything(place: Path, content: bytes, name: str) -> None:
    (place / name).write_bytes(content)
    attempt("files of anything", lambda: read_events(place / name), lambda e: as_dict(e) and None)


def packed() -> dict[str, bytes]:
    """One table in every kind of package."""
    text = TEXTS["ratings.csv"].encode()
    tar, archive = io.BytesIO(), io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w:gz") as file:
        info = tarfile.TarInfo("ml/ratings.csv")
        info.size = len(text)
        file.addfile(info, io.BytesIO(text))
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as zipped:
        zipped.writestr("ml/ratings.csv", text)
    return {
        "ratings.csv.gz": gzip.compress(text),
        "ratings.csv.xz": lzma.compress(text),
        "ratings.csv.bz2": bz2.compress(text),
        "a.zip": archive.getvalue(),
        "a.tar.gz": tar.getvalue(),
    }


PACKED = packed()


@fuzzed(0.3)
@given(st.sampled_from(sorted(PACKED)), edits)
def test_packages(place: Path, name: str, changes: list[tuple[str, float, int, bytes]]) -> None:
    (place / name).write_bytes(mutated(PACKED[name], changes))
    expected = slow_events("ratings.csv", TEXTS["ratings.csv"].encode())

    def check(events: Events) -> None:
        found = as_dict(events)
        assert found == expected or name == "a.tar.gz"  # the others carry a checksum

    attempt("packages", lambda: read_events(place / name), check)


def matrices() -> dict[str, bytes]:
    """Matrices in every kind of npz, and parquet."""
    matrix = sp.coo_matrix((np.ones(len(PAIRS)), ([u for u, _ in PAIRS], [i for _, i in PAIRS])), shape=(13, 10))
    found = {}
    for kind in ("csr", "csc", "coo", "bsr", "dia"):
        for packed in (False, True):
            buffer = io.BytesIO()
            sp.save_npz(buffer, matrix.asformat(kind), compressed=packed)
            found[f"{kind}{packed:d}.npz"] = buffer.getvalue()
    csr = matrix.tocsr()
    deltas = np.concatenate([np.diff(csr[u].indices, prepend=0) for u in range(13)])
    buffer = io.BytesIO()
    np.savez(
        buffer, n_users=13, n_items=10, all_counts=np.diff(csr.indptr), all_deltas=deltas, item_ids=np.arange(10) * 7
    )
    found["compact.npz"] = buffer.getvalue()
    return found


MATRICES = matrices()


@fuzzed(1)
@given(st.sampled_from(sorted(MATRICES)), edits)
def test_matrices(place: Path, name: str, changes: list[tuple[str, float, int, bytes]]) -> None:
    (place / name).write_bytes(mutated(MATRICES[name], changes))
    attempt("npz", lambda: load_source(place / name), lambda data: data.validate())


MEMBERS = ["format", "shape", "data", "indices", "indptr", "row", "col", "offsets", "n_users", "n_items"]
MEMBERS += ["a_counts", "a_deltas", "a_first_user", "item_ids", "user_ids"]
arrays = st.one_of(
    st.integers(-2, 2**62),
    st.lists(st.integers(-2, 12), max_size=6),
    st.lists(numbers, max_size=4),
    st.floats(),
    st.lists(st.floats(), max_size=3),
    st.lists(st.text(max_size=3), max_size=4),
    st.just([[1, 2], [3, 4]]),
)


@fuzzed(1)
@given(
    st.dictionaries(
        st.sampled_from(MEMBERS),
        arrays,
        max_size=9,
    ),
    st.sampled_from(["csr", "coo", "compact", "dia", "bsr", ""]),
)
def test_arrays_of_anything(place: Path, members: dict[str, Any], kind: str) -> None:
    needed: dict[str, Any] = {"n_users": 3, "n_items": 9, "a_counts": [1, 0, 2], "a_deltas": [3, 1, 1]}
    if kind != "compact":
        needed = {
            "format": kind.encode(),
            "shape": [3, 9],
            "data": [1.0, 1.0],
            "indices": [1, 2],
            "indptr": [0, 1, 1, 2],
        }
        needed |= {"row": [0, 1], "col": [3, 3], "offsets": [0]}
    np.savez(place / "arrays.npz", **{k: np.asarray(v) for k, v in {**needed, **members}.items()})
    attempt("npz of anything", lambda: read_events(place / "arrays.npz"), lambda e: as_dict(e) and None)


@fuzzed()
@given(edits)
def test_parquet(place: Path, changes: list[tuple[str, float, int, bytes]]) -> None:
    polars = pytest.importorskip("polars")
    buffer = io.BytesIO()
    users, items = ([pair[side] for pair in PAIRS] for side in (0, 1))
    polars.DataFrame({"user": users, "item": [f"i{i}" for i in items], "rating": [1.5] * len(PAIRS)}).write_parquet(
        buffer
    )
    (place / "a.parquet").write_bytes(mutated(buffer.getvalue(), changes))
    attempt("parquet", lambda: read_events(place / "a.parquet"), lambda e: as_dict(e) and None)


@fuzzed()
@given(edits)
def test_new_users(place: Path, changes: list[tuple[str, float, int, bytes]]) -> None:
    (place / "new.csv").write_bytes(mutated("".join(f"ann{u},{i}\n" for u, i in PAIRS).encode(), changes))
    item_ids = np.arange(9)

    def check(found: tuple[Any, sp.csr_matrix, int]) -> None:
        users, rows, _ = found
        assert rows.shape == (len(users), 9)
        assert len(set(users.tolist())) == len(users)
        as_interactions(rows, 9)

    attempt("new users", lambda: read_histories(place / "new.csv", item_ids), check)


SPLIT = {
    "train.csv": "".join(f"{u},{i}\n" for u in range(8) for i in range(5)),
    "validation_tr.csv": "8,0\n8,1\n9,2\n",
    "validation_te.csv": "8,2\n9,3\n",
    "test_tr.csv": "10,0\n11,1\n",
    "test_te.csv": "10,4\n11,2\n",
    "unique_sid.txt": "a\nb\nc\nd\ne\n",
}


@fuzzed()
@given(st.sampled_from(sorted(SPLIT)), edits)
def test_splits(place: Path, name: str, changes: list[tuple[str, float, int, bytes]]) -> None:
    folder = place / "split"
    folder.mkdir(exist_ok=True)
    for file, text in SPLIT.items():
        header = "" if file.endswith("txt") else "uid,sid\n"
        content = (header + text).encode()
        (folder / file).write_bytes(mutated(content, changes) if file == name else content)
    attempt("splits", lambda: load_source(folder), lambda data: data.validate())


# The C++ kernels

KERNELS: dict[str, list[str]] = {
    "row_bag": ["table", "items", "offsets", "weights"],
    "row_bag_backward": ["dout", "items", "offsets", "weights", "M"],
    "row_dot": ["u", "weight", "ids"],
    "linear_topk": ["u", "weight", "bias", "K", "exclude"],
    "linear_nll": ["u", "weight", "bias", "items", "offsets", "exclude", "K"],
    "linear_nll_backward": ["dnll", "u", "weight", "bias", "items", "offsets", "exclude", "lse", "kept"],
    "slim": ["gram", "first", "last", "l1", "l2"],
    "fuse": ["u", "weight", "ids", "scores", "action"],
    "respond": ["u", "reward", "feedback"],
}


def good() -> dict[str, Any]:
    """Arguments that fit each other: B = 3, M = 6, H = D = 4, K = 2."""
    random = torch.Generator().manual_seed(0)

    def floats(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=random)

    return {
        "table": floats(6, 4),
        "dout": floats(3, 4),
        "items": torch.tensor([0, 5, 2, 3]),
        "offsets": torch.tensor([0, 2, 2, 4]),
        "weights": floats(4),
        "M": 6,
        "u": floats(3, 4),
        "weight": floats(6, 4),
        "bias": floats(6),
        "K": 2,
        "exclude": (torch.tensor([1, 4]), torch.tensor([0, 1, 2, 2])),
        "ids": torch.tensor([[1, 5], [0, -1], [2, 3]]),
        "dnll": floats(3),
        "lse": floats(3),
        "kept": floats(3, 6),
        "gram": floats(8, 6).abs().T @ floats(8, 6).abs(),
        "first": 1,
        "last": 5,
        "l1": 0.5,
        "l2": 2.0,
        "scores": floats(3, 2).masked_fill(torch.tensor([[False] * 2, [False, True], [False] * 2]), -math.inf),
        "action": "topk_softmax",
        "reward": [(floats(5, 4), floats(5)), (floats(1, 5), floats(1))],
        "feedback": [(floats(5, 5), floats(5)), (floats(2, 5), floats(2))],
    }


@st.composite
def odd_tensors(draw: st.DrawFn) -> torch.Tensor:
    """Of a wrong shape, dtype or value."""
    shape = draw(st.lists(st.integers(0, 7), max_size=3))
    dtype = draw(st.sampled_from([torch.float32, torch.float32, torch.int64, torch.int32, torch.float64, torch.bool]))
    if dtype == torch.int64:
        flat = draw(st.lists(numbers, min_size=math.prod(shape), max_size=math.prod(shape)))
        return torch.tensor(flat, dtype=dtype).reshape(shape)
    tensor = torch.ones(shape).to(dtype)
    return tensor.T if len(shape) == 2 and draw(st.booleans()) else tensor


@fuzzed(2)
@given(st.sampled_from(sorted(KERNELS)), st.data())
def test_kernels(name: str, data: st.DataObject) -> None:
    arguments = good()
    altered = data.draw(st.lists(st.sampled_from(KERNELS[name]), max_size=2))
    for wrong in altered:
        if wrong in ("M", "K", "first", "last"):
            arguments[wrong] = data.draw(st.integers(0 if wrong in ("M", "K") else -2, 9))
        elif wrong in ("l1", "l2"):
            arguments[wrong] = data.draw(st.sampled_from([0.0, 1e-3, 10.0, -1.0, math.nan, math.inf]))
        elif wrong in ("reward", "feedback"):
            layer = data.draw(st.integers(0, 1))
            arguments[wrong][layer] = (data.draw(odd_tensors()), arguments[wrong][layer][1])
        elif wrong == "exclude":
            arguments[wrong] = (data.draw(odd_tensors()), arguments[wrong][1])
        elif wrong != "action":
            arguments[wrong] = data.draw(odd_tensors())
    chosen = [arguments[argument] for argument in KERNELS[name]]
    given = [a.clone() if isinstance(a, torch.Tensor) else a for a in chosen]  # one of them is written over

    def check(found: Any) -> None:
        expected = getattr(library, name)(*given)
        flat = found if isinstance(found, tuple) else (found,)
        other = expected if isinstance(expected, tuple) else (expected,)
        for one, two in zip(flat[:2], other[:2], strict=True):
            if isinstance(one, torch.Tensor) and name != "linear_nll_backward" and not {"scores", "gram"} & {*altered}:
                assert torch.allclose(one.double(), two.double(), atol=1e-4, rtol=1e-4, equal_nan=True)

    def call() -> Any:
        if "offsets" in KERNELS[name]:  # as the border does, before any implementation
            library.without_room(arguments["items"], arguments["offsets"])
        return getattr(cpp, name)(*chosen)

    attempt(f"kernels: {name}", call, check, RuntimeError, IndexError, AttributeError)
