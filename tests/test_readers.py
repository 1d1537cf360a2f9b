"""Every reader, plain, compressed and in its folder; odd inputs; malformed ones with the right line in the message."""

import bz2
import csv
import gzip
import io
import itertools
import lzma
import os
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

from cfsfl_fast.datasets import Events, load_source, read_events, read_histories, synthetic_dataset
from cfsfl_fast.datasets.events import _distinct

DATA = Path(os.environ.get("CFSFL_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
SMALL = DATA / "ml-latest-small_ratings.csv.xz"

TRIPLES = [(7, 31, 2.5), (7, 1029, 3.0), (12, 31, 5.0), (3, 2, 0.5), (100000, 131262, 4.0)]
CSV = "userId,movieId,rating,timestamp\n" + "".join(f"{u},{i},{r},1260759144\n" for u, i, r in TRIPLES)
DAT = "".join(f"{u}::{i}::{int(r * 2)}::978300760\n" for u, i, r in TRIPLES)
TAB = "".join(f"{u}\t{i}\t{int(r * 2)}\t881250949\n" for u, i, r in TRIPLES)
DOUBLED = [(u, i, int(r * 2)) for u, i, r in TRIPLES]
NETFLIX = "31:\n7,3,2005-09-06\n12,5,2005-05-13\n1029:\n7,4,2005-10-19\n"
NETFLIX_TRIPLES = [(7, 31, 3), (12, 31, 5), (7, 1029, 4)]
MSD = "b80344d0\tSOAKIMP\t1\nb80344d0\tSOAPDEY\t2\n85c1f87f\tSOAKIMP\t12\n"
MSD_TRIPLES = [("b80344d0", "SOAKIMP", 1), ("b80344d0", "SOAPDEY", 2), ("85c1f87f", "SOAKIMP", 12)]


def triples(events: Events) -> list[tuple[Any, Any, Any]]:
    users, items = events.user_ids[events.users].tolist(), events.item_ids[events.items].tolist()
    ratings = [None] * len(users) if events.ratings is None else events.ratings.tolist()
    assert events.user_ids.tolist() == sorted(set(users))
    assert events.item_ids.tolist() == sorted(set(items))
    return list(zip(users, items, ratings, strict=True))


def zipped(name: str, content: bytes) -> bytes:
    memory = io.BytesIO()
    with zipfile.ZipFile(memory, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("README.txt", "about the data")
        archive.writestr(f"inside/{name}", content)
    return memory.getvalue()


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


PACKINGS: dict[str, Callable[[Path, str, bytes], Path]] = {
    "plain": lambda root, name, text: write(root / name, text),
    "gz": lambda root, name, text: write(root / f"{name}.gz", gzip.compress(text)),
    "xz": lambda root, name, text: write(root / f"{name}.xz", lzma.compress(text)),
    "bz2": lambda root, name, text: write(root / f"{name}.bz2", bz2.compress(text)),
    "zip": lambda root, name, text: write(root / "archive.zip", zipped(name, text)),
    "folder": lambda root, name, text: write(root / "folder" / name, text).parent,
    "gz in folder": lambda root, name, text: write(root / "folder" / f"{name}.gz", gzip.compress(text)).parent,
    "zip in folder": lambda root, name, text: write(root / "folder" / "a.zip", zipped(name, text)).parent,
    "folder in folder": lambda root, name, text: write(root / "folder" / "ml" / name, text).parent.parent,
}
FILES = {
    "ratings.csv": (CSV, TRIPLES),
    "ratings.dat": (DAT, DOUBLED),
    "u.data": (TAB, DOUBLED),
    "train_triplets.txt": (MSD, MSD_TRIPLES),
    "combined_data_1.txt": (NETFLIX, NETFLIX_TRIPLES),
}


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("name", FILES)
def test_every_format_in_every_packing(tmp_path: Path, name: str, packing: str) -> None:
    text, expected = FILES[name]
    source = PACKINGS[packing](tmp_path, name, text.encode())
    assert triples(read_events(source)) == expected


@pytest.mark.parametrize(
    ("name", "format"),
    [
        ("ratings.csv", "movielens-csv"),
        ("ratings.dat", "movielens-dat"),
        ("u.data", "movielens-data"),
        ("train_triplets.txt", "msd"),
        ("combined_data_1.txt", "netflix"),
    ],
)
def test_content_or_an_explicit_format_decide_where_the_name_is_unknown(tmp_path: Path, name: str, format: str) -> None:
    text, expected = FILES[name]
    source = write(tmp_path / "mine.bin", text)
    assert triples(read_events(source)) == expected
    assert triples(read_events(source, format=format)) == expected


@pytest.mark.parametrize("block_bytes", [1, 2, 3, 5, 7, 11, 16, 29, 64, 4096])
@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_blocks_may_end_anywhere(tmp_path: Path, name: str, line_end: str, block_bytes: int) -> None:
    text, expected = FILES[name]
    source = write(tmp_path / name, text.replace("\n", line_end))
    assert triples(read_events(source, block_bytes=block_bytes)) == expected


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("block_bytes", [1, 5, 4096])
@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda text: "\ufeff" + text, id="byte order mark"),
        pytest.param(lambda text: text[:-1], id="no final newline"),
        pytest.param(lambda text: text + "\n\n\r\n", id="blank lines at the end"),
        pytest.param(lambda text: text.replace("\n", "\n\n"), id="blank lines between"),
        pytest.param(lambda text: text.replace("\n", "\r\n")[:-1], id="ends in a carriage return"),
    ],
)
def test_harmless_oddities(tmp_path: Path, name: str, block_bytes: int, change: Callable[[str], str]) -> None:
    text, expected = FILES[name]
    assert triples(read_events(write(tmp_path / name, change(text)), block_bytes=block_bytes)) == expected


def test_netflix_folder_is_read_in_order_of_names(tmp_path: Path) -> None:
    for folder, names in (
        ("a", ("combined_data_1.txt", "combined_data_2.txt")),
        ("b", ("mv_0000031.txt", "mv_0000099.txt")),
    ):
        write(tmp_path / folder / names[1], "99:\n5,1,2005-01-01\n")
        write(tmp_path / folder / names[0], NETFLIX)
        write(tmp_path / folder / "probe.txt", "31:\n7\n")
        assert triples(read_events(tmp_path / folder)) == [*NETFLIX_TRIPLES, (5, 99, 1)]


def test_netflix_movie_goes_on_over_blocks_and_may_have_no_ratings(tmp_path: Path) -> None:
    source = write(tmp_path / "mv_1.txt", "1:\n2:\n7,1,2005-01-01\n8,2,2005-01-01\n3:\n")
    assert triples(read_events(source, block_bytes=8)) == [(7, 2, 1), (8, 2, 2)]


@pytest.mark.skipif(not SMALL.is_file(), reason=f"{SMALL.name} not found; set CFSFL_DATA to its folder")
def test_real_movielens_file() -> None:
    rows = csv.DictReader(io.StringIO(lzma.decompress(SMALL.read_bytes()).decode()))
    expected = [(int(row["userId"]), int(row["movieId"]), float(row["rating"])) for row in rows]
    assert triples(read_events(SMALL)) == expected


@pytest.mark.parametrize(
    ("text", "options", "expected"),
    [
        ("1,2\n3,4\n", {}, [(1, 2, None), (3, 4, None)]),
        ("1;2;5\n3;4;1\n", {}, [(1, 2, 5), (3, 4, 1)]),
        ("1|2|5\n", {}, [(1, 2, 5)]),
        ("user_id\titem_id\n1\t2\n", {}, [(1, 2, None)]),
        ("when,Item,User,stars\nx,2,1,4.5\n", {}, [(1, 2, 4.5)]),
        ("uid,sid\n0,9\n", {}, [(0, 9, None)]),
        ("who,what\nann,tea\n", {"user_column": "who", "item_column": "what"}, [("ann", "tea", None)]),
        ("what,who,n\ntea,ann,3\n", {"user_column": 1, "item_column": 0, "rating_column": "n"}, [("ann", "tea", 3)]),
        ("ann,tea\nbob,milk\n", {}, [("ann", "tea", None), ("bob", "milk", None)]),
        ("user,item\n1,2\n", {"header": False}, [("user", "item", None), ("1", "2", None)]),
        ("1,2\n3,4\n", {"header": True, "user_column": 0, "item_column": 1}, [(3, 4, None)]),
        ("1:2:3\n", {"delimiter": ":"}, [(1, 2, 3)]),
        ("x,1,2\n", {"user_column": 2, "item_column": 1, "header": False}, [(2, 1, None)]),
        ("user,item\n 1 , 2\n3,4 \n", {}, [(1, 2, None), (3, 4, None)]),
        ("user,item\nAnna Lee,green tea\n", {}, [("Anna Lee", "green tea", None)]),
        ("user,item\nZoë,茶\n", {}, [("Zoë", "茶", None)]),
        ('"user","item","title"\n"1","2","a, b"\n3,4,"say ""hi"""\n', {}, [(1, 2, None), (3, 4, None)]),
        ('user,item,rating\n"a,b",2,1.5\n', {}, [("a,b", 2, 1.5)]),
    ],
)
def test_csv_in_its_many_shapes(tmp_path: Path, text: str, options: dict, expected: list) -> None:
    assert triples(read_events(write(tmp_path / "some.csv", text), **options)) == expected


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        (["10", "9", "-3"], [10, 9, -3]),
        (["007", "7"], ["007", "7"]),
        (["0", "-0"], ["0", "-0"]),
        (["1", "+1"], ["1", "+1"]),
        (["1.0", "1"], ["1.0", "1"]),
        (["999999999999999999", "-999999999999999999"], [10**18 - 1, 1 - 10**18]),
        (["9223372036854775808", "1"], ["9223372036854775808", "1"]),
        (["2147483648", "-2147483648", "5"], [2**31, -(2**31), 5]),
        (["1", "2", "x"], ["1", "2", "x"]),
        (["x", "1", "10"], ["x", "1", "10"]),
        (["-", "1"], ["-", "1"]),
    ],
)
@pytest.mark.parametrize("block_bytes", [4, 1 << 20])
def test_ids_are_integers_if_all_are_and_text_otherwise(
    tmp_path: Path, ids: list[str], expected: list, block_bytes: int
) -> None:
    source = write(tmp_path / "some.csv", "user,item\n" + "".join(f"{i},1\n" for i in ids))
    events = read_events(source, block_bytes=block_bytes)
    assert events.user_ids[events.users].tolist() == expected
    assert events.user_ids.dtype.kind == ("i" if isinstance(expected[0], int) else "U")


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(
        st.tuples(
            st.text(
                st.characters(codec="utf-8", exclude_characters='\0\n\r," \x1f', exclude_categories=("Cs",)), min_size=1
            ),
            st.integers(-(10**18) + 1, 10**18 - 1),
            st.floats(allow_nan=False, allow_infinity=False),
        ),
        min_size=1,
        unique_by=lambda row: row[:2],
    ),
    block_bytes=st.integers(1, 64),
)
def test_any_table_comes_back(tmp_path_factory: pytest.TempPathFactory, rows: list, block_bytes: int) -> None:
    text = "user,item,rating\n" + "".join(f"{u},{i},{r!r}\n" for u, i, r in rows)
    source = write(tmp_path_factory.mktemp("table") / "some.csv", text)
    events = read_events(source, block_bytes=block_bytes)
    users = events.user_ids[events.users]
    assert [str(user) for user in users.tolist()] == [row[0] for row in rows]
    assert events.item_ids[events.items].tolist() == [row[1] for row in rows]
    assert events.ratings is not None
    assert events.ratings.tolist() == [row[2] for row in rows]


@pytest.mark.parametrize("text", ["3.5", "4", ".5", "4.", "1e1", "-2", "+2.25", "0.1", "123456.123456789", "1" * 30])
def test_ratings_are_read_as_python_reads_them(tmp_path: Path, text: str) -> None:
    events = read_events(write(tmp_path / "some.csv", f"user,item,rating\n1,2,{text}\n"))
    assert events.ratings is not None
    assert events.ratings.tolist() == [float(text)]


@pytest.mark.parametrize("block_bytes", [3, 1 << 20])
def test_the_first_of_repeated_events_stays(tmp_path: Path, block_bytes: int) -> None:
    source = write(tmp_path / "some.csv", "user,item,rating\n1,2,5\n1,3,4\n1,2,1\n2,2,3\n1,3,9\n")
    events = read_events(source, block_bytes=block_bytes)
    assert triples(events) == [(1, 2, 5), (1, 3, 4), (2, 2, 3)]
    assert events.report == {"events_read": 5, "duplicates": 2, "explicit_zeros": 0}


def test_texts_that_share_a_hash_stay_apart(tmp_path: Path) -> None:
    twins = ["abcdefghijklmnop", "coavdfinuxZUrO`L"]  # found by search: equal under the encoder's 64-bit hash
    first, _ = _distinct(np.array(twins, "S16"))
    assert sorted(first.tolist()) == [twin.encode() for twin in twins]
    source = write(tmp_path / "some.csv", "user,item\n" + f"{twins[1]},1\n{twins[0]},1\n{twins[1]},2\n")
    assert triples(read_events(source)) == [(twins[1], 1, None), (twins[0], 1, None), (twins[1], 2, None)]


GOOD = "1,2,3.5,4\n"
HEADER = "userId,movieId,rating,timestamp\n"


@pytest.mark.parametrize("block_bytes", [6, 50, 1 << 20])
@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("ratings.csv", HEADER + GOOD * 15 + "1,2,3.5\n" + GOOD, f"line 17: expected {HEADER[:-1]}; found '1,2,3.5'"),
        ("ratings.csv", HEADER + GOOD * 3 + "1,2,3,4,5\n" + "1,2,3\n", "line 5: expected .* found '1,2,3,4,5'"),
        ("ratings.csv", HEADER + GOOD * 3 + "1,2,3\n" + "1,2,3,4,5\n", "line 5: expected .* found '1,2,3'"),
        ("ratings.csv", HEADER + GOOD + "1,x2,3,4\n", "line 3: expected .* found '1,x2,3,4'"),
        ("ratings.csv", HEADER + GOOD + "1,02,3,4\n", "line 3: expected .* found '1,02,3,4'"),
        ("ratings.csv", HEADER + GOOD + ",2,3,4\n", "line 3: expected .* found ',2,3,4'"),
        ("ratings.csv", HEADER + GOOD + "1,2,good,4\n", "line 3: expected .* found '1,2,good,4'"),
        ("ratings.csv", HEADER + GOOD + "1,2,,4\n", "line 3: expected .* found '1,2,,4'"),
        ("ratings.csv", HEADER + GOOD + "1,2,.,4\n", "line 3: expected .* found '1,2,.,4'"),
        ("ratings.csv", HEADER + GOOD + "1,2,1.2.3,4\n", "line 3: expected .* found '1,2,1.2.3,4'"),
        ("ratings.csv", HEADER + GOOD + "1,2,\t3,4\n", "line 3: expected .* found '1,2,.t3,4'"),
        ("ratings.csv", HEADER + GOOD + "1,2,\u0663,4\n", "line 3: expected .* found '1,2,\u0663,4'"),
        ("ratings.csv", HEADER + GOOD + "1,2,1_0,4\n", "line 3: expected .* found '1,2,1_0,4'"),
        ("ratings.csv", HEADER + "\n\r\n" + GOOD + "1,2,nan,4\n", "line 5: expected a finite rating; found 'nan'"),
        ("ratings.csv", HEADER + GOOD + "1,2,-inf,4\n", "line 3: expected a finite rating; found '-inf'"),
        ("ratings.csv", HEADER + GOOD + "1,2,1e999,4\n", "line 3: expected a finite rating; found '1e999'"),
        ("ratings.csv", HEADER + GOOD + "x" * 200 + "\n", r"line 3: expected .* found 'x{77}\.\.\.'"),
        ("ratings.dat", "1::2::3::4\n1::2::3:4\n", "line 2: expected UserID::MovieID::Rating::Timestamp; found"),
        ("u.data", "1\t2\t3\t4\n1 2 3 4\n", "line 2: expected user, item, rating and timestamp between tabs; found"),
        ("train_triplets.txt", "a\tb\t1\na\tb\n", "line 2: expected user, song and play count between tabs; found"),
        ("mv_1.txt", "1:\n7,3,2005\n8,2\n", r"line 3: expected 'movie_id:' or 'user,rating,date'; found '8,2'"),
        ("mv_1.txt", "7,3,2005\n1:\n", "line 1: expected 'movie_id:' before the first rating"),
        ("mv_1.txt", "1:\n7,3,2005\nx:\n", "line 3: expected 'movie_id:' or"),
        ("some.csv", "user,item\n1,2\n1\n", "line 3: expected user,item; found '1'"),
        ("some.csv", "user,item\n1,2\n\n,3\n", "line 4: expected user,item; found ',3'"),
        ("some.csv", 'user,item\n1,2\n"a,3\n', "line 3: expected user,item; found"),
        ("some.csv", 'user,item\n1,2\n"a",3,4\n', "line 3: expected user,item; found"),
        ("some.csv", "user,item\n1,2\n" + "y" * 600 + ",1\n", "line 3: expected identifiers of at most 512 bytes"),
        ("some.csv", "user,item\n1,2\n1,\0\n", "line 3: expected text; found binary data"),
        ("some.csv", "user,item\n1,2\n1,ä\n".encode("latin-1"), "line 3: expected UTF-8 text; found byte 0xe4"),
        ("some.csv", "user,item\n1,2\n".encode("utf-16"), "line 1: expected UTF-8 text; found UTF-16"),
    ],
)
def test_malformed_lines_are_named(
    tmp_path: Path, name: str, text: str | bytes, message: str, block_bytes: int
) -> None:
    source = write(tmp_path / name, text)
    with pytest.raises(ValueError, match=f"^{name}, {message}"):
        read_events(source, block_bytes=block_bytes)


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("person,film\n1,2\n", {}, "line 1: which column is the user"),
        ("user,item\n1,2\n", {"user_column": "who"}, "line 1: expected a column 'who'; found user, item"),
        ("1,2\n3,4\n", {"item_column": 2}, "line 1: expected a column 2 for the item; found 2 columns"),
        ("1,2\n3,4\n", {"item_column": 0}, "user and item are both column 0"),
        ("word\nword\n", {}, "line 1: expected cells between tabs, commas"),
        ("userId,movieId,rating,timestamp\n", {}, "expected events; found none"),
        ("", {}, "the file is empty"),
        ("\n\n", {"format": "csv"}, "the file is empty"),
        (
            "user,item\n1,2\n",
            {"format": "movielens-csv"},
            "line 1: expected the header userId,movieId,rating,timestamp",
        ),
    ],
)
def test_files_that_are_not_what_they_should_be(tmp_path: Path, text: str, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_events(write(tmp_path / "some.csv", text), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "movielens"}, "unknown format 'movielens'; expected auto or one of movielens-csv"),
        ({"delimiter": ",,"}, "delimiter must be one character"),
        ({"user_column": "u", "header": False}, "'u' is given by name, but header is False"),
        ({"block_bytes": 0}, "block_bytes must be at least 1; got 0"),
        ({"format": "scipy"}, "not of format 'scipy'"),
        (
            {"format": "netflix", "user_column": 0},
            "options of csv and parquet; found netflix",
        ),
        ({"format": "split"}, "not of format 'split'"),
    ],
)
def test_impossible_options(tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_events(write(tmp_path / "some.csv", "1,2\n"), **options)


@pytest.mark.parametrize("compress", [gzip.compress, lzma.compress, bz2.compress])
@pytest.mark.parametrize("share", [0.3, 0.97])
def test_truncated_compression_is_refused(tmp_path: Path, compress: Callable[[bytes], bytes], share: float) -> None:
    random = np.random.default_rng(0)
    text = HEADER + "".join(f"{u},{i},3.5,4\n" for u, i in random.integers(0, 9**9, (20_000, 2)))
    content = compress(text.encode())
    source = write(tmp_path / "ratings.csv.z", content[: int(share * len(content))])
    with pytest.raises(ValueError, match=r"ratings\.csv\.z: damaged or truncated"):
        read_events(source)


def test_damaged_archives_are_refused(tmp_path: Path) -> None:
    archive = zipped("ratings.csv", (HEADER + GOOD * 1000).encode())
    with pytest.raises(ValueError, match=r"short\.zip: damaged or truncated"):
        read_events(write(tmp_path / "short.zip", archive[: len(archive) // 2]))
    middle = archive.rindex(b"inside/ratings.csv", 0, len(archive) // 2) + 40
    flipped = archive[:middle] + bytes([archive[middle] ^ 255]) + archive[middle + 1 :]
    with pytest.raises(ValueError, match=r"flipped\.zip.*: damaged"):
        read_events(write(tmp_path / "flipped.zip", flipped))
    with pytest.raises(ValueError, match=r"wrong\.tar\.xz: damaged or truncated"):
        read_events(write(tmp_path / "wrong.tar.xz", b"no archive at all"))


def test_binary_junk_is_refused(tmp_path: Path) -> None:
    junk = np.random.default_rng(1).integers(0, 256, 5000, np.uint8).tobytes()
    with pytest.raises(ValueError, match=r"ratings\.csv"):
        read_events(write(tmp_path / "ratings.csv", junk), format="movielens-csv")
    with pytest.raises(ValueError, match=r"ratings\.csv"):
        read_events(write(tmp_path / "ratings.csv", junk))


def test_missing_ambiguous_and_empty_places(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no such file or folder: .*nowhere\.csv"):
        read_events(tmp_path / "nowhere.csv")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty: expected one file with interactions; found nothing"):
        read_events(tmp_path / "empty")
    write(tmp_path / "two" / "a.csv", "1,2\n")
    write(tmp_path / "two" / "b.csv", "1,2\n")
    with pytest.raises(ValueError, match=r"two: expected one file with interactions; found two/a\.csv, two/b\.csv"):
        read_events(tmp_path / "two")


def test_a_line_without_end_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"some\.csv, line 3: expected lines of text; found one of over 1 MiB"):
        read_events(write(tmp_path / "some.csv", "user,item\n1,2\n" + "x" * (3 << 20)), block_bytes=1 << 19)


def test_scipy_matrix(tmp_path: Path) -> None:
    dense = np.array([[0, 2.5, 0], [0, 0, 0], [1, 0, 4]])
    for kind in (sp.csr_matrix, sp.csc_matrix, sp.coo_matrix, sp.csr_array):
        sp.save_npz(tmp_path / "m.npz", kind(dense))
        assert triples(read_events(tmp_path / "m.npz")) == [(0, 1, 2.5), (2, 0, 1), (2, 2, 4)]
    assert triples(read_events(tmp_path)) == [(0, 1, 2.5), (2, 0, 1), (2, 2, 4)]


def test_scipy_matrix_with_explicit_zeros_and_nan(tmp_path: Path) -> None:
    matrix = sp.csr_matrix((np.array([1.0, 0.0, 2.0]), np.array([0, 1, 2]), np.array([0, 2, 3])), shape=(2, 3))
    sp.save_npz(tmp_path / "m.npz", matrix)
    events = read_events(tmp_path / "m.npz")
    assert triples(events) == [(0, 0, 1), (1, 2, 2)]
    assert events.report["explicit_zeros"] == 1
    matrix.data[2] = np.nan
    sp.save_npz(tmp_path / "m.npz", matrix)
    with pytest.raises(ValueError, match=r"m\.npz, row 1: expected finite ratings; found nan"):
        read_events(tmp_path / "m.npz")


def test_damaged_scipy_matrix(tmp_path: Path) -> None:
    matrix = sp.csr_matrix(np.eye(3))
    matrix.indices[1] = 77
    sp.save_npz(tmp_path / "m.npz", matrix)
    with pytest.raises(ValueError, match=r"m\.npz: damaged sparse matrix"):
        read_events(tmp_path / "m.npz")
    np.savez(tmp_path / "o.npz", something=np.arange(3))
    with pytest.raises(ValueError, match=r"o\.npz: expected a saved sparse matrix or the compact layout; found"):
        read_events(tmp_path / "o.npz")


def compact_arrays(**changes: Any) -> dict[str, Any]:
    """Users 0 .. 3; `all` has rows {1, 4}, {}, {0, 1, 2}; `more` is user 3 alone with {3}."""
    arrays = {
        "n_users": np.int64(4),
        "n_items": np.int64(5),
        "all_counts": np.array([2, 0, 3], np.uint8),
        "all_deltas": np.array([1, 3, 0, 1, 1], np.uint16),
        "more_counts": np.array([1], np.uint8),
        "more_deltas": np.array([3], np.uint16),
        "more_first_user": np.int64(3),
    }
    return arrays | changes


def test_compact_union_of_all_matrices(tmp_path: Path) -> None:
    np.savez(tmp_path / "c.npz", **compact_arrays())
    pairs = [(0, 1), (0, 4), (2, 0), (2, 1), (2, 2), (3, 3)]
    assert triples(read_events(tmp_path / "c.npz")) == [(u, i, None) for u, i in pairs]
    names = np.array(["a", "b10", "b9", "ä"])
    np.savez(tmp_path / "c.npz", **compact_arrays(user_ids=names, item_ids=np.array([10, 20, 30, 40, 50], np.uint16)))
    assert triples(read_events(tmp_path / "c.npz")) == [(names[u], 10 + 10 * i, None) for u, i in pairs]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"all_counts": np.array([2, 0, 4], np.uint8)}, "all: the counts add up to 6; found 5 deltas"),
        ({"all_deltas": np.array([1, 4, 0, 1, 1])}, "all: expected item indices in 0 .. 4; found 0 .. 5"),
        ({"all_deltas": np.array([1, 0, 0, 1, 1])}, "all: items of a row must ascend"),
        ({"more_first_user": np.int64(4)}, "more: users 4 .. 4, but n_users is 4"),
        ({"item_ids": np.arange(4)}, "expected 5 integers or texts as item_ids; found int64 (4,)"),
        ({"user_ids": np.array([None] * 4, object)}, "damaged or truncated"),
    ],
)
def test_damaged_compact_file(tmp_path: Path, changes: dict, message: str) -> None:
    np.savez(tmp_path / "c.npz", **compact_arrays(**changes))
    with pytest.raises(ValueError) as refused:  # noqa: PT011
        read_events(tmp_path / "c.npz")
    assert message in str(refused.value)
    assert str(refused.value).startswith("c.npz")


def split_files(root: Path) -> dict[str, Path]:
    texts = {
        "train.csv": "uid,sid\n0,0\n0,2\n2,1\n1,2\n",
        "validation_tr.csv": "uid,sid\n3,0\n4,2\n",
        "validation_te.csv": "uid,sid\n3,2\n",
        "test_tr.csv": "uid,sid\n5,1\n",
        "test_te.csv": "uid,sid\n5,0\n5,2\n",
        "unique_sid.txt": "110\n31\n7\n",
    }
    return {name: write(root / name, text) for name, text in texts.items()}


def check_split(source: Path, item_ids: list) -> None:
    dataset = load_source(source)
    dataset.validate()
    assert dataset.item_ids.tolist() == item_ids
    assert dataset.train.toarray().tolist() == [[1, 0, 1], [0, 0, 1], [0, 1, 0]]
    assert dataset.validation.fold_in.toarray().tolist() == [[1, 0, 0]]
    assert dataset.validation.targets.toarray().tolist() == [[0, 0, 1]]
    assert dataset.validation.user_ids.tolist() == [3]
    assert dataset.report["validation"]["skipped"] == 1
    assert dataset.test.targets.toarray().tolist() == [[1, 0, 1]]


def test_finished_split_in_a_folder_or_an_archive(tmp_path: Path) -> None:
    files = split_files(tmp_path / "pro_sg")
    check_split(tmp_path / "pro_sg", [110, 31, 7])
    with tarfile.open(tmp_path / "split.tar.xz", "w:xz") as archive:
        for name, path in files.items():
            archive.add(path, f"pro_sg/{name}")
    with zipfile.ZipFile(tmp_path / "split.zip", "w") as zip_archive:
        for name, path in files.items():
            zip_archive.write(path, name)
    check_split(tmp_path / "split.tar.xz", [110, 31, 7])
    check_split(tmp_path / "split.zip", [110, 31, 7])
    files["unique_sid.txt"].unlink()
    check_split(tmp_path / "pro_sg", [0, 1, 2])


def test_finished_split_that_does_not_fit(tmp_path: Path) -> None:
    files = split_files(tmp_path / "pro_sg")
    with pytest.raises(ValueError, match="brings its own split; no protocol can be applied"):
        load_source(tmp_path / "pro_sg", protocol="none")
    with pytest.raises(ValueError, match="a finished split has no raw events"):
        read_events(tmp_path / "pro_sg")
    write(files["unique_sid.txt"], "110\n31\n")
    with pytest.raises(ValueError, match=r"item 2, but unique_sid\.txt names 2"):
        load_source(tmp_path / "pro_sg")
    write(files["unique_sid.txt"], "110\n31\n110\n")
    with pytest.raises(ValueError, match=r"unique_sid\.txt: expected every id once"):
        load_source(tmp_path / "pro_sg")
    write(files["test_te.csv"], "uid,sid\n5,0\n5,-2\n")
    with pytest.raises(ValueError, match=r"test_te\.csv, line 3: expected uid,sid counted from 0; found '5,-2'"):
        load_source(tmp_path / "pro_sg")


@pytest.mark.parametrize(
    ("file", "text", "words"),
    [
        ("test_te.csv", "uid,sid\n5,0\n2,2\n", "a user is in more than one part"),
        ("validation_te.csv", "uid,sid\n3,0\n", "validation has a target that is also in the fold-in"),
    ],
)
def test_finished_split_that_tells_its_answers(file: str, text: str, words: str, tmp_path: Path) -> None:
    files = split_files(tmp_path / "pro_sg")
    write(files[file], text)
    with pytest.raises(ValueError, match=words):
        load_source(tmp_path / "pro_sg")


def test_finished_split_in_one_file_that_tells_its_answers(tmp_path: Path) -> None:
    dataset = synthetic_dataset(60, 30, events_per_user=8)
    arrays: dict[str, Any] = {"n_users": 60, "n_items": dataset.n_items}
    first = 0
    for name, matrix, starts in (
        ("train", dataset.train, True),
        ("vad_tr", dataset.validation.fold_in, True),
        ("vad_te", dataset.validation.targets, False),
        ("test_tr", dataset.test.fold_in, False),  # the same users as for validation
        ("test_te", dataset.test.targets, False),
    ):
        rows = [matrix.indices[a:b] for a, b in itertools.pairwise(matrix.indptr)]
        arrays[f"{name}_counts"] = np.diff(matrix.indptr)
        arrays[f"{name}_deltas"] = np.concatenate([np.diff(row, prepend=0) for row in rows])
        arrays[f"{name}_first_user"] = first - (0 if starts else len(rows))
        first += len(rows) if starts else 0
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(ValueError, match="a user is in more than one part"):
        load_source(tmp_path / "a.npz")


def test_parquet(tmp_path: Path) -> None:
    polars = pytest.importorskip("polars", reason="polars is not installed (the extra `data`)")
    frame = polars.DataFrame(
        {"when": [1, 2, 3], "user_id": [5, 5, 1], "item": ["a", "é", "a"], "rating": [1.5, 2.0, 3.0]}
    )
    frame.write_parquet(tmp_path / "events.parquet")
    expected = [(5, "a", 1.5), (5, "é", 2.0), (1, "a", 3.0)]
    assert triples(read_events(tmp_path / "events.parquet")) == expected
    assert triples(read_events(tmp_path)) == expected
    swapped = read_events(tmp_path / "events.parquet", user_column="item", item_column="when")
    assert [row[:2] for row in triples(swapped)] == [("a", 1), ("é", 2), ("a", 3)]
    for column, value, message in (
        ("user_id", [5, None, 1], "row 1: expected a value in column 'user_id'; found none"),
        ("rating", [1.0, 2.0, float("nan")], "row 2: expected a finite rating; found nan"),
        ("rating", ["a", "b", "c"], "expected numbers in column 'rating'"),
        ("user_id", [1.0, 2.0, 3.0], "expected integers or texts in column 'user_id'"),
    ):
        frame.with_columns(polars.Series(column, value)).write_parquet(tmp_path / "events.parquet")
        with pytest.raises(ValueError, match=rf"events\.parquet.*{message}"):
            read_events(tmp_path / "events.parquet")
    content = (tmp_path / "events.parquet").read_bytes()
    write(tmp_path / "events.parquet", content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"events\.parquet: not a readable parquet file"):
        read_events(tmp_path / "events.parquet")


def test_parquet_without_polars_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "polars", None)
    with pytest.raises(ImportError, match=r"pip install 'cfsfl-fast\[data\]'"):
        read_events(write(tmp_path / "events.parquet", b"PAR1 and so on"))


def test_no_progress_bar_where_stderr_is_no_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    read_events(write(tmp_path / "ratings.csv", CSV), show_progress=True)
    assert capsys.readouterr().err == ""


def test_progress_counts_compressed_bytes_to_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(tmp_path / "ratings.csv.gz", gzip.compress(CSV.encode()))
    shown = io.StringIO()
    monkeypatch.setattr(shown, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("sys.stderr", shown)
    read_events(source, show_progress=True)
    assert "100%" in shown.getvalue()


def test_nothing_is_extracted_while_archives_are_read(tmp_path: Path) -> None:
    source = write(tmp_path / "inner" / "evil.zip", zipped("../../ratings.csv", CSV.encode()))
    before = sorted(tmp_path.rglob("*"))
    assert triples(read_events(source)) == TRIPLES
    assert sorted(tmp_path.rglob("*")) == before


ITEMS = np.array([50, 10, 30])


@pytest.mark.parametrize(
    "text",
    [
        "9,10\n4,50\n9,77\n9,50\n8,1\n9,10\n",
        "user,item\n9,10\n4,50\n9,77\n9,50\n8,1\n",
        "a,b\n9,10\n4,50\n9,77\n9,50\n8,1",
    ],
)
def test_histories_of_integers(tmp_path: Path, text: str) -> None:
    users, matrix, n_unknown = read_histories(write(tmp_path / "h.csv", text), ITEMS)
    assert users.tolist() == [9, 4, 8]
    assert matrix.toarray().tolist() == [[1, 1, 0], [1, 0, 0], [0, 0, 0]]
    assert n_unknown == 2


def test_histories_of_text_and_mixed_kinds(tmp_path: Path) -> None:
    source = write(tmp_path / "h.tsv.gz", gzip.compress(b"bob\ttea\t9:15\nann\tmilk\t9:30\nbob\tgin\t\n"))
    users, matrix, n_unknown = read_histories(source, np.array(["milk", "tea"]))
    assert users.tolist() == ["bob", "ann"]
    assert matrix.toarray().tolist() == [[0, 1], [1, 0]]
    assert n_unknown == 1
    numbers = write(tmp_path / "n.csv", "1,10\n2,20\n")
    assert read_histories(numbers, np.array(["20", "x"]))[1].toarray().tolist() == [[0, 0], [1, 0]]
    words = write(tmp_path / "w.csv", "1,10\n2,x\n")
    users, matrix, n_unknown = read_histories(words, ITEMS)
    assert matrix.toarray().tolist() == [[0, 1, 0], [0, 0, 0]]
    assert (users.tolist(), n_unknown) == ([1, 2], 1)


def test_histories_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"h\.csv, line 2: expected user,item; found '3'"):
        read_histories(write(tmp_path / "h.csv", "1,2\n3\n"), ITEMS)
    with pytest.raises(ValueError, match=r"h\.csv: expected pairs of user and item; found none"):
        read_histories(write(tmp_path / "h.csv", "user,item\n"), ITEMS)
    with pytest.raises(FileNotFoundError):
        read_histories(tmp_path / "none.csv", ITEMS)
