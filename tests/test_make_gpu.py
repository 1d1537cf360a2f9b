"""`make gpu`'s driver: rounds, late and failing parts, left-over processes, rows and the exit code."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
from _pytest.mark.expression import Expression

from tests.conftest import ROOT


@pytest.fixture(scope="module")
def gpu() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu", ROOT / "benches" / "gpu.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu"] = module
    spec.loader.exec_module(module)
    return module


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_parts_fail_and_run_late_and_the_rest_goes_on(
    gpu: ModuleType, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    results = tmp_path / "results"
    results.mkdir()
    rows = results / "bench_loop.jsonl"
    rows.write_text('{"case": "old", "rival": "old", "ms": 1}\n')
    row = {"case": "inference", "rival": "bf16", "us": 151.2, "x eager": 12.5, "users/s": 3311258}
    text = json.dumps(row) + '\n{"case": "ha'
    child = tmp_path / "child"
    sleeper = f"import time; time.sleep(5); open({str(child)!r}, 'w')"
    late = (
        f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {sleeper!r}])\n"
        "try:\n time.sleep(60)\nexcept KeyboardInterrupt:\n print('what failed so far'); time.sleep(60)"
    )
    todo = [
        gpu.Round(10, [gpu.Part("broken", python("raise SystemExit(3)")), gpu.Part("absent", ["/no/such/program"])]),
        gpu.Round(10, [gpu.Part("writes", python(f"open({str(rows)!r}, 'a').write({text!r})"))]),
        gpu.Round(3, [gpu.Part("late", python(late))]),
        gpu.Round(10, [gpu.Part("after", python("print('after the late one')"))]),
    ]
    began = time.monotonic()
    code = gpu.main(["--results", str(results), "--seconds", "40"], [todo[0], todo[1], *todo[3:]])
    assert time.monotonic() - began < 40
    shown = capfd.readouterr().out
    assert code == 1
    assert "after the late one" in shown
    header, line = (text for text in shown.splitlines() if text.startswith(("case  ", "inference")))
    assert header.split()[:7] == ["case", "rival", "us", "x", "eager", "of", "product"]
    assert line.split() == ["inference", "bf16", "151.2", "12.5", "3311258"]
    assert "old" not in shown
    outcomes = [json.loads(text) for text in (results / gpu.PARTS).read_text().splitlines()]
    assert [(o["name"], o["how"].split()[0].strip(":")) for o in outcomes] == [
        ("broken", "failed"), ("absent", "failed"), ("writes", "ok"), ("after", "ok"),
    ]  # fmt: skip
    assert {"device", "torch", "triton", "commit"} <= set(outcomes[0])

    (outcome,) = gpu.run(todo[2].parts, 3.0, results / "logs")
    assert outcome.how == "late"
    assert "what failed so far" in (results / "logs" / "late.txt").read_text()
    time.sleep(3)
    assert not child.exists(), "a late part's own process went on"


def test_parts_of_a_round_run_at_the_same_time(gpu: ModuleType, tmp_path: Path) -> None:
    parts = [gpu.Part(name, python("import time; time.sleep(2)")) for name in "abc"]
    began = time.monotonic()
    assert [o.how for o in gpu.run(parts, 20.0, tmp_path)] == ["ok"] * 3
    assert time.monotonic() - began < 5.5


def test_what_a_round_leaves_is_the_nexts(gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And where nothing is left, each still has its share."""
    given, clock = [], [0.0]

    def run(parts: list[str], seconds: float, logs: Path) -> list[str]:
        given.append(seconds)
        clock[0] += min(takes[len(given) - 1], seconds)
        return parts

    monkeypatch.setattr(gpu, "run", run)
    monkeypatch.setattr(gpu.time, "monotonic", lambda: clock[0])
    todo = [gpu.Round(seconds, [str(seconds)]) for seconds in (10, 20, 30)]
    takes = [4.0, 99.0, 99.0]
    assert len(list(gpu.run_all(todo, 60.0, tmp_path))) == 3
    assert given == [10, 26, 30]
    given.clear()
    takes = [99.0, 99.0, 99.0]
    assert len(list(gpu.run_all(todo, 30.0, tmp_path))) == 3
    assert given == [5, 10, 15]


@pytest.mark.parametrize("cuda", [True, False])
def test_every_part_is_there_to_run(gpu: ModuleType, tmp_path: Path, cuda: bool) -> None:
    todo = gpu.rounds(tmp_path, cuda)
    assert sum(r.seconds for r in todo) <= 475, "eight minutes, and what starting and ending take"
    parts = [part for _, parts in todo for part in parts]
    assert len({part.name for part in parts}) == len(parts)
    names = {word for part in parts for word in part.command if word.endswith(".py")}
    for name in names:
        assert (ROOT / name).is_file(), name
    files = [path for path in (ROOT / "tests").glob("test_*.py") if path != Path(__file__)]
    marked = {path.name for path in files if "mark.gpu" in path.read_text() or "import CUDA" in path.read_text()}
    assert marked == {Path(name).name for name in names if name.startswith("tests/")}


def test_every_part_finds_its_tests_with_what_the_machine_has(gpu: ModuleType, tmp_path: Path) -> None:
    """torch, triton, numpy, scipy, pybind11, setuptools, pytest and pytest-benchmark."""
    absent = ("hypothesis", "click", "tqdm", "safetensors", "polars", "matplotlib", "sklearn", "implicit")
    parts = [part for cuda in (True, False) for _, parts in gpu.rounds(tmp_path, cuda) for part in parts]
    files = {word for part in parts for word in part.command if word.endswith(".py")}
    tests = sorted(name for name in files if name.startswith("tests/") or "bench_" in name)
    code = (
        "import importlib.abc, sys\n"
        "class Absent(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.partition('.')[0] in {absent}: raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Absent())\n"
        f"import pytest; sys.exit(pytest.main({['-q', '--collect-only', *tests]!r}))"
    )
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run(python(code), cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    collected = [line.lower() for line in done.stdout.splitlines() if "::" in line]
    for part in parts:
        chosen = [text for flag, text in itertools.pairwise(part.command) if flag == "-k"]
        if chosen:  # the last one counts
            expression = Expression.compile(chosen[-1])
            mine = tuple(word.lower() for word in part.command if ".py" in word)
            found = [
                line
                for line in collected
                if line.startswith(mine) and expression.evaluate(lambda text, line=line, **_: text.lower() in line)
            ]
            assert found, f"{part.name}: nothing is {chosen[-1]!r}"


def test_shares_of_a_test_run(tmp_path: Path) -> None:
    """Every test runs once; one that fails is told and makes the whole fail, a share without tests does not."""
    file = tmp_path / "test_some.py"
    file.write_text("".join(f"def test_{i}() -> None:\n    assert {i} != 2\n" for i in range(3)))
    options = ["-p", "no:cacheprovider", "--rootdir", str(tmp_path), str(file)]
    command = [sys.executable, "-m", "tests.in_shares"]
    done = subprocess.run([*command, "2", *options], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    told = [line for line in done.stdout.splitlines() if "::" in line and line.endswith("%]")]
    assert sorted((line[0], *line.split("::")[1].split()[:2]) for line in told) == [
        ("0", "test_0", "PASSED"), ("0", "test_2", "FAILED"), ("1", "test_1", "PASSED"),
    ]  # fmt: skip
    done = subprocess.run([*command, "4", *options, "-k", "not 2"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
