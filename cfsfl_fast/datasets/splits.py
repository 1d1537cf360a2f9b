"""A split that somebody made: five csv files of `uid,sid`, in a folder or an archive, as a `Dataset`."""

import re
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from cfsfl_fast.datasets.dataset import Dataset, check_counts, pairs_to_csr
from cfsfl_fast.datasets.matrices import held_out_counts, with_targets
from cfsfl_fast.datasets.readers import SPLIT_FILES, Columns, Source, csv_layout
from cfsfl_fast.datasets.sources import SourceFile, read_blocks
from cfsfl_fast.datasets.table import MAX_ID_BYTES, Ids, Ints, Lines, parse_lines, split_lines


def read_split(source: Source) -> Dataset:
    """Reads `train.csv, validation_tr.csv, validation_te.csv, test_tr.csv, test_te.csv` of columns uid, sid.

    `unique_sid.txt` and `unique_uid.txt`, where present, hold the ids of items and users 0, 1, ..., one a line.
    Held-out users without a target are skipped and counted. Nothing is filtered.

    Raises:
        ValueError: ids that are not integers from 0, or beyond the lists of external ids.
    """
    files = {file.base_name: file for file in source.files}
    pairs = {name: _read_pairs(files[name]) for name in SPLIT_FILES}
    item_ids = _read_list(files["unique_sid.txt"]) if "unique_sid.txt" in files else None
    names = _read_list(files["unique_uid.txt"]) if "unique_uid.txt" in files else None
    n_items = 1 + max(int(items.max(initial=-1)) for _, items in pairs.values())
    n_users = 1 + max(int(users.max(initial=-1)) for users, _ in pairs.values())
    n_events = sum(len(users) for users, _ in pairs.values())
    if item_ids is None:
        check_counts(source.path.name, n_items, n_events, "items", "events")
        item_ids = np.arange(n_items, dtype=np.int64)
    elif n_items > len(item_ids):
        raise ValueError(f"{source.path.name}: item {n_items - 1}, but unique_sid.txt names {len(item_ids)}")
    if names is not None and n_users > len(names):
        raise ValueError(f"{source.path.name}: user {n_users - 1}, but unique_uid.txt names {len(names)}")

    users = np.unique(pairs["train.csv"][0])
    train = _matrix(pairs["train.csv"], users, len(item_ids))
    report: dict[str, Any] = {"train": {"users": len(users), "items": len(item_ids), "events": train.nnz}}
    groups = []
    for part in ("validation", "test"):
        tr, te = pairs[f"{part}_tr.csv"], pairs[f"{part}_te.csv"]
        held_out = np.unique(np.concatenate([tr[0], te[0]]))
        fold_in, targets = (_matrix(side, held_out, len(item_ids)) for side in (tr, te))
        group = with_targets(fold_in, targets, _named(held_out, names))
        report[part] = held_out_counts(group, len(held_out))
        groups.append(group)
    return Dataset(source.path.name, train, groups[0], groups[1], item_ids, _named(users, names), report)


def _read_pairs(file: SourceFile) -> tuple[Ints, Ints]:
    layout, header = csv_layout(file, Columns())
    users: list[Ints] = []
    items: list[Ints] = []
    for block, first_line in read_blocks(file):
        lines = split_lines(block, first_line, file.name)
        if header and len(lines.start):
            header, lines = False, lines.without_first()
        if len(lines.start) == 0:
            continue
        chunk = parse_lines(lines, layout)
        for ids in (chunk.users, chunk.items):
            whole = ids.dtype.kind == "i" and bool((ids >= 0).all())
            if not whole:
                lines.malformed(0 if ids.dtype.kind != "i" else int(np.argmin(ids >= 0)), "uid,sid counted from 0")
        users.append(chunk.users)
        items.append(chunk.items)
    empty = [np.empty(0, np.int64)]
    return np.concatenate(users or empty), np.concatenate(items or empty)


def _read_list(file: SourceFile) -> Ids:
    texts: list[str] = []
    for block, first_line in read_blocks(file):
        lines: Lines = split_lines(block, first_line, file.name)
        for row in range(len(lines.start)):
            texts.append(lines.text(row).strip())
            if len(texts[-1]) > MAX_ID_BYTES:
                lines.malformed(row, f"identifiers of at most {MAX_ID_BYTES} bytes")
    if len(set(texts)) != len(texts):
        raise ValueError(f"{file.name}: expected every id once; found {len(texts)} lines and {len(set(texts))} ids")
    return np.array([int(text) for text in texts], np.int64) if _all_integers(texts) else np.array(texts, np.str_)


def _all_integers(texts: list[str]) -> bool:
    return all(re.fullmatch("0|[1-9][0-9]{0,17}", text) for text in texts)


def _matrix(pairs: tuple[Ints, Ints], users: Ints, n_items: int) -> sp.csr_matrix:
    return pairs_to_csr(np.searchsorted(users, pairs[0]), pairs[1], (len(users), n_items))


def _named(users: Ints, names: Ids | None) -> NDArray[Any]:
    return users if names is None else names[users]
