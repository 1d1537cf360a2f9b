"""Files that something damaged, or that somebody made to do harm: refused with ValueError, or harmless."""

from __future__ import annotations

import gzip
import io
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from cfsfl_fast import CFSFL, CFSFLConfig, arrays, checkpoint
from cfsfl_fast.cli import main
from cfsfl_fast.datasets import Dataset, open_dataset, save_dataset, synthetic_dataset
from cfsfl_fast.runs import STATE, Run, read_state
from tests.conftest import ROOT, effort, tally
from tests.test_model import M, build
from tests.test_training import QUICK

FLIPS = effort(0.2)
"""Of each file beyond its header, and of the header where the effort is not that of `make fuzz`, which flips all."""


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model with item ids."""
    model = build()
    model.item_ids = np.array([f"item {i}" for i in range(M)])
    folder = tmp_path_factory.mktemp("model") / "model"
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def small_data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Dataset, Path]:
    """A data set and its prepared folder."""
    data = synthetic_dataset(120, 60, events_per_user=12)
    folder = tmp_path_factory.mktemp("data") / "data"
    save_dataset(data, folder)
    return data, folder


@pytest.fixture(scope="module")
def started(toy: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped in its stage 1."""
    folder = tmp_path_factory.mktemp("run") / "run"
    run = Run(toy, folder, CFSFLConfig(**QUICK), show_progress=False)

    def stop(_: Any) -> None:
        if run.progress["epoch"] == 1:
            raise KeyboardInterrupt

    run.on_epoch = stop
    with pytest.raises(KeyboardInterrupt):
        run.train()
    return folder


def header_bytes(path: Path) -> int:
    """Of a safetensors or npy file; a json file is all header."""
    content = path.read_bytes()
    if path.suffix == ".safetensors":
        return 8 + int.from_bytes(content[:8], "little")
    return 10 + int.from_bytes(content[8:10], "little") if path.suffix == ".npy" else len(content)


def flips(path: Path, seed: int) -> Any:
    """The file with one bit or one whole byte another: in its header, and in the rest."""
    content = path.read_bytes()
    random = np.random.default_rng(seed)
    head = min(header_bytes(path), len(content))
    header = range(head) if effort() > 100 else random.choice(head, min(FLIPS, head), replace=False).tolist()
    places = [*header, *random.integers(0, len(content), FLIPS).tolist()]
    for place in places:
        changed = bytearray(content)
        changed[place] ^= 0xFF if random.random() < 0.2 else 1 << int(random.integers(8))
        path.write_bytes(changed)
        yield place
    path.write_bytes(content)


def outcome(read: Callable[[], Any], fits: Callable[[Any], bool]) -> str:
    """ "refused", or "harmless" where what is read fits; any other error is the test's."""
    try:
        found = read()
    except ValueError:
        return "refused"
    assert fits(found)
    return "harmless"


@pytest.mark.parametrize("name", [checkpoint.CONFIG, checkpoint.MODEL, checkpoint.ITEM_IDS])
def test_every_flip_in_a_model_is_refused(model_folder: Path, name: str) -> None:
    for place in flips(model_folder / name, 1):
        found = outcome(lambda: CFSFL.from_pretrained(model_folder), lambda _: False)
        tally[f"flip in {name}", found] += 1
        assert found == "refused", place
    CFSFL.from_pretrained(model_folder)


def test_every_flip_in_a_training_state_is_refused(started: Path, toy: Dataset) -> None:
    for place in flips(started / STATE, 2):
        found = outcome(lambda: read_state(started / STATE), lambda _: False)
        tally[f"flip in {STATE}", found] += 1
        assert found == "refused", place
    Run(toy, started, CFSFLConfig(**QUICK), resume=True, show_progress=False)


def in_range(data: Dataset) -> bool:
    """Whether compiled code may walk the matrices, and everything that looks at them gets through or refuses."""
    for matrix in data.matrices().values():
        assert matrix.indptr[0] == 0
        assert matrix.indptr[-1] == len(matrix.indices)
        assert (np.diff(matrix.indptr) >= 0).all()
        assert ((matrix.indices >= 0) & (matrix.indices < data.n_items)).all()
    data.describe()
    return True


@pytest.mark.parametrize("verify", [False, True], ids=["", "verified"])
def test_every_flip_in_prepared_data_is_refused_or_harmless(small_data: tuple[Dataset, Path], verify: bool) -> None:
    data, folder = small_data
    before = {name: matrix.copy() for name, matrix in data.matrices().items()}
    for path in sorted(folder.iterdir()):
        head = header_bytes(path)
        for place in flips(path, 3):
            found = outcome(lambda: open_dataset(folder, verify=verify), in_range)
            tally[f"flip in prepared {'data, verified' if verify else 'data'}", found] += 1
            if found == "harmless" and (verify or place < head):  # blanks of a header, a file's version of its format
                read = open_dataset(folder, verify=verify)
                assert all((matrix != before[name]).nnz == 0 for name, matrix in read.matrices().items()), (path, place)
                assert all(np.array_equal(a, b) for a, b in zip(read.ids().values(), data.ids().values(), strict=True))
    open_dataset(folder, verify=True).validate()


def test_verify_finds_an_altered_id(small_data: tuple[Dataset, Path]) -> None:
    _, folder = small_data
    path = folder / "train_indices.npy"
    content = path.read_bytes()
    changed = bytearray(content)
    changed[-4] ^= 1
    path.write_bytes(changed)
    try:
        open_dataset(folder)
        with pytest.raises(ValueError, match=r"train_indices\.npy: altered, its content does not have the checksum"):
            open_dataset(folder, verify=True)
    finally:
        path.write_bytes(content)


@pytest.mark.parametrize(
    "command",
    [
        ["train", "DATA", "--out", "OUT"],
        ["evaluate", "MODEL", "DATA"],
        ["baseline", "ease", "DATA", "--out", "OUT"],
        ["reproduce", "table3", "DATA", "--out", "OUT"],
        ["sweep", "MODEL", "DATA", "--out", "OUT"],
        ["describe", "DATA", "--verify"],
    ],
    ids=lambda command: command[0],
)
def test_commands_that_give_figures_notice_an_altered_id(
    command: list[str], small_data: tuple[Dataset, Path], model_folder: Path, tmp_path: Path
) -> None:
    """In the middle of an array, and as good an id as the other."""
    data, folder = small_data
    places = {"DATA": folder, "MODEL": model_folder, "OUT": tmp_path / "out"}
    path = folder / "test_fold_in_indices.npy"
    content = path.read_bytes()
    changed = bytearray(content)
    middle = header_bytes(path) + 4 * (data.test.fold_in.nnz // 2)
    changed[middle] = (changed[middle] + 1) % data.n_items
    path.write_bytes(changed)
    try:
        found = CliRunner().invoke(main, [str(places.get(word, word)) for word in command])
    finally:
        path.write_bytes(content)
    assert found.exit_code == 2
    assert found.stderr.strip().endswith("altered, its content does not have the checksum that was written with it")
    assert len(found.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


# Made to do harm


def npy(header: dict[str, Any] | str, body: bytes = b"", version: int = 1) -> bytes:
    """A .npy file whose header says whatever one likes."""
    text = (header if isinstance(header, str) else repr(header)).encode() + b"\n"
    size = len(text).to_bytes(2 if version == 1 else 4, "little")
    return b"\x93NUMPY" + bytes([version, 0]) + size + text + body


def described(shape: Any, descr: Any = "<i8") -> dict[str, Any]:
    """The header of an array."""
    return {"descr": descr, "fortran_order": False, "shape": shape}


def pickled() -> bytes:
    """An object array whose loading would leave a file behind."""
    buffer = io.BytesIO()
    np.save(buffer, np.array([_Bomb()], dtype=object), allow_pickle=True)
    return buffer.getvalue()


class _Bomb:
    def __reduce__(self) -> Any:
        return os.system, ("touch executed",)


BAD_ARRAYS = {
    "2^60 elements": npy(described((2**60,)), b"\0" * 64),
    "2^33 elements": npy(described((2**33,)), b"\0" * 64),
    "negative": npy(described((-1, -8)), b"\0" * 64),
    "overflowing shape": npy(described((2**32, 2**32)), b"\0" * 8),
    "no width": npy(described((2**60,), "<U0")),
    "widest text": npy(described((1,), f"<U{2**28}"), b"\0" * 64),
    "objects": pickled(),
    "claims objects": npy(described((1,), "|O"), b"\x80\x04N."),
    "structure": npy(described((1,), [("a", "<i8")]), b"\0" * 8),
    "nested brackets": npy("(" * 5000),
    "nested minus": npy("-" * 9000 + "1"),
    "header of 4 GB": b"\x93NUMPY\x02\x00\xff\xff\xff\xff{}",
    "code": npy("__import__('os').system('touch executed')"),
    "another format": b"\x93NUMPY\x09\x00" + b"\0" * 100,
    "nothing": b"",
}
"""None of them may stand where item ids are expected, or rows."""


@pytest.mark.parametrize("what", BAD_ARRAYS)
def test_arrays_that_lie_are_refused(
    what: str, model_folder: Path, small_data: tuple[Dataset, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.npy").write_bytes(BAD_ARRAYS[what])
    if what != "structure":
        with pytest.raises(ValueError, match=r"a\.npy: damaged or truncated"):
            arrays.map_npy(tmp_path / "a.npy")
    _, folder = small_data
    content = (folder / "train_indices.npy").read_bytes()
    (folder / "train_indices.npy").write_bytes(BAD_ARRAYS[what])
    try:
        with pytest.raises(ValueError, match=r"train_indices\.npy"):
            open_dataset(folder)
    finally:
        (folder / "train_indices.npy").write_bytes(content)
    # A model whose checksums were made to fit.
    model = build()
    checkpoint.save_model(tmp_path / "model", M, model.config, model.state_dict(), np.arange(M))
    (tmp_path / "model" / checkpoint.ITEM_IDS).write_bytes(BAD_ARRAYS[what])
    checkpoint.write_model(tmp_path / "model", model.state_dict())
    with pytest.raises(ValueError, match=r"item_ids\.npy"):
        CFSFL.from_pretrained(tmp_path / "model")
    assert not (tmp_path / "executed").exists()


CONFIGS = {
    "n_items": (10**12, "n_items must be at most 2147483647|n_items"),
    "hidden_dim": (2**31 - 1, "no model has these sizes|has shape"),
    "lookup_dim": (10**15, "lookup_dim must be at most"),
    "steps": (10**9, "steps must be at most 10000"),
    "top_k": (0.5, "top_k must be a whole number"),
    "epochs": ([10**400, 1, 1], "epochs must be at most"),
    "dropout": (float("nan"), "dropout must be a finite number"),
    "recommender": ("__import__('os')", "recommender must be one of"),
    "control": ("yes", "control must be True or False"),
    "seed": (2**70, "seed must be at most"),
}


@pytest.mark.parametrize("field", CONFIGS)
def test_a_config_that_asks_for_the_absurd_is_refused(field: str, tmp_path: Path) -> None:
    model = build()
    model.save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / checkpoint.CONFIG
    value, words = CONFIGS[field]
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    checkpoint.write_model(tmp_path / "model", model.state_dict())  # its checksums fit
    with pytest.raises(ValueError, match=words):
        CFSFL.from_pretrained(tmp_path / "model")


@pytest.mark.parametrize(
    "text", ['{"a":' * 200_000, "[" * 200_000, '{"n_items": ' + "9" * 10_000 + "}", "null", "\xff"]
)
def test_json_that_is_no_config_is_refused(text: str, tmp_path: Path) -> None:
    build().save_pretrained(tmp_path / "model")
    (tmp_path / "model" / checkpoint.CONFIG).write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"config\.json"):
        CFSFL.from_pretrained(tmp_path / "model")


def safetensors(header: Any, body: bytes = b"") -> bytes:
    """A safetensors file whose header says whatever one likes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


BAD_TENSORS = {
    "2^60 elements": safetensors({"a": {"dtype": "F32", "shape": [2**60], "data_offsets": [0, 2**62]}}, b"\0" * 64),
    "overlapping": safetensors(
        {f"t{i}": {"dtype": "F32", "shape": [16], "data_offsets": [0, 64]} for i in range(9)}, b"\0" * 64
    ),
    "header of 2^62": (2**62).to_bytes(8, "little") + b"{}",
    "deep": safetensors(b'{"a":' * 100_000),
    "nameless": safetensors({"": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}}, b"\0" * 4),
    "metadata of lists": safetensors(
        {"__metadata__": {"cfsfl": "[1, 2]"}, "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, b"\0" * 4
    ),
    "deep metadata": safetensors({"__metadata__": {"cfsfl": "[" * 200_000}}),
    "zip": b"PK\x03\x04" + b"\0" * 100,
    "pickle": b"\x80\x04N.",
}


@pytest.mark.parametrize("what", BAD_TENSORS)
def test_tensors_that_lie_are_refused(what: str, tmp_path: Path) -> None:
    build().save_pretrained(tmp_path / "model")
    (tmp_path / "model" / checkpoint.MODEL).write_bytes(BAD_TENSORS[what])
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        CFSFL.from_pretrained(tmp_path / "model")


STATES: dict[str, Any] = {
    "elsewhere": {"stage": "../../outside"},
    "no stage": {"stage": "dessert"},
    "negative": {"epoch": -1},
    "a text": {"step": "many"},
    "another best": {"best": {"../x": {"epoch": 0, "score": 1.0}}},
    "no best": {"best": 3},
}


@pytest.mark.parametrize("what", STATES)
def test_a_training_state_that_lies_is_refused(what: str, started: Path, toy: Dataset) -> None:
    content = (started / STATE).read_bytes()
    tensors, progress = read_state(started / STATE)
    checkpoint.write_tensors(started / STATE, tensors, {"progress": json.dumps(progress | STATES[what])})
    try:
        with pytest.raises(ValueError, match=r"training\.safetensors is not what a run goes on from"):
            Run(toy, started, CFSFLConfig(**QUICK), resume=True, show_progress=False)
    finally:
        (started / STATE).write_bytes(content)


@pytest.mark.parametrize(
    ("name", "tensor", "words"),
    [
        ("model/lookup.weight", torch.zeros(3, 8), r"lookup\.weight has shape \(3, 8\)"),
        ("model/stray", torch.zeros(3), "tensor 'stray' is unknown"),
        ("optimiser/main/stray/exp_avg", torch.zeros(3), "no optimiser of this stage has a state 'main/stray/exp_avg'"),
        ("optimiser/main/lookup.weight", torch.zeros(3), "no optimiser of this stage has a state"),
        ("optimiser/main/recommender.hidden.bias/exp_avg", torch.zeros(3), r"of shape \(3,\)"),
    ],
)
def test_a_training_state_of_other_parameters_is_refused(
    name: str, tensor: torch.Tensor, words: str, started: Path, toy: Dataset
) -> None:
    content = (started / STATE).read_bytes()
    tensors, progress = read_state(started / STATE)
    checkpoint.write_tensors(started / STATE, {**tensors, name: tensor}, {"progress": json.dumps(progress)})
    try:
        with pytest.raises(ValueError, match=words):
            Run(toy, started, CFSFLConfig(**QUICK), resume=True, show_progress=False)
    finally:
        (started / STATE).write_bytes(content)


# Memory


def zipped(**members: bytes) -> bytes:
    """A compressed archive."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, content in members.items():
            archive.writestr(name.replace("__", "."), content)
    return buffer.getvalue()


def plain(value: Any) -> bytes:
    """An array as .npy."""
    buffer = io.BytesIO()
    np.save(buffer, value)
    return buffer.getvalue()


def traps() -> dict[str, bytes]:
    """Small files that would like much memory."""
    csr = {"format__npy": plain(np.array(b"csr")), "shape__npy": plain([3, 4])}
    lines = ("a," + "x" * 500 + "\n" + "1,2\n" * 900_000).encode()
    zeros = np.zeros(300_000_000, np.uint8)
    compact = {"n_users__npy": plain(3), "n_items__npy": plain(4), "a_counts__npy": plain([1, 1, 1])}
    deltas = {"a_deltas__npy": plain([1, 2, 3])}
    return {
        "bomb.npz": zipped(**csr, data__npy=npy(described((300_000_000,), "|u1"), zeros.tobytes())),
        "lies.npz": zipped(**csr, data__npy=npy(described((2**40,)))),
        "rows.npz": zipped(
            format__npy=plain(np.array(b"coo")),
            shape__npy=plain([10**12, 10**12]),
            row__npy=plain([10**12 - 1]),
            col__npy=plain([5]),
            data__npy=plain([1.0]),
        ),
        "users.npz": zipped(**{**compact, **deltas, "n_users__npy": plain(10**12)}),
        "items.npz": zipped(**{**compact, **deltas, "n_items__npy": plain(2**62)}),
        "counts.npz": zipped(**{**compact, **deltas, "a_counts__npy": plain([2**62, 2**62, 2**62, 2**62 + 3])}),
        "bomb.csv.gz": gzip.compress(b"user,item\n" + b"1,2\n" * 75_000_000, 1),
        "bomb.zip": zipped(ratings__csv=b"user,item\n" + b"1,2\n" * 75_000_000),
        "wide.csv": b"user,item\n" + lines,
        "line.csv": b"user,item\n1," + b"9" * 30_000_000,
    }


def test_small_files_take_no_absurd_memory(tmp_path: Path) -> None:
    """In a process that may take 1 GB more than it has after its imports."""
    for name, content in traps().items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "split").mkdir()
    for name in ("train", "validation_tr", "validation_te", "test_tr", "test_te"):
        (tmp_path / "split" / f"{name}.csv").write_text(f"uid,sid\n0,{10**17}\n")
    found = subprocess.run(
        [sys.executable, "-c", _READ_ALL, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert found.returncode == 0, found.stderr
    outcomes = json.loads(found.stdout)
    assert outcomes.pop("wide.csv").startswith("900001 events")
    assert outcomes.pop("rows.npz").startswith("1 events")
    for name, what in outcomes.items():
        assert what.startswith("ValueError"), (name, what)
    assert len(outcomes) == 9


_READ_ALL = """
import json, resource, sys
from pathlib import Path
from cfsfl_fast.datasets import load_source, read_events

taken = int(next(l for l in open("/proc/self/status") if l.startswith("VmSize")).split()[1]) * 1024
resource.setrlimit(resource.RLIMIT_AS, (taken + (1 << 30),) * 2)
found = {}
for path in sorted(Path(sys.argv[1]).iterdir()):
    try:
        events = load_source(path) if path.is_dir() else read_events(path)
        found[path.name] = f"{events.report['events_read']} events"
    except BaseException as error:
        found[path.name] = f"{type(error).__name__}: {error}"
print(json.dumps(found))
"""
