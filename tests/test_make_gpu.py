"""`make gpu`'s driver: late and failing parts, left-over processes, rows and the exit code."""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

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
    sleeper = f"import time; time.sleep(4); open({str(child)!r}, 'w')"
    todo = [
        gpu.Part("broken", python("raise SystemExit(3)"), 30),
        gpu.Part("absent", ["/no/such/program"], 30),
        gpu.Part("writes", python(f"open({str(rows)!r}, 'a').write({text!r})"), 30),
        gpu.Part("late", python(f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {sleeper!r}]); "
                                "time.sleep(60)"), 2.5),
        gpu.Part("after", python("print('after the late one')"), 30),
    ]  # fmt: skip
    began = time.monotonic()
    code = gpu.main(["--results", str(results), "--seconds", "60"], todo)
    assert time.monotonic() - began < 30
    shown = capfd.readouterr().out
    assert code == 1
    assert "after the late one" in shown
    header, line = (text for text in shown.splitlines() if text.startswith(("case  ", "inference")))
    assert header.split() == ["case", "rival", "us", "x", "eager", "of", "product", "rate", "users/s", "peak", "MB"]
    assert line.split() == ["inference", "bf16", "151.2", "12.5", "3311258"]
    assert "old" not in shown
    outcomes = [json.loads(text) for text in (results / gpu.PARTS).read_text().splitlines()]
    assert [(o["name"], o["how"].split()[0].strip(":")) for o in outcomes] == [
        ("broken", "failed"), ("absent", "failed"), ("writes", "ok"), ("late", "late"), ("after", "ok"),
    ]  # fmt: skip
    time.sleep(2.5)
    assert not child.exists(), "a late part's own process went on"


def test_all_well_is_0_and_no_time_is_not(gpu: ModuleType, tmp_path: Path) -> None:
    quick = gpu.Part("quick", python("pass"), 30)
    assert gpu.main(["--results", str(tmp_path)], [quick, quick]) == 0
    slow = gpu.Part("slow", python("import time; time.sleep(60)"), 30)
    assert gpu.main(["--results", str(tmp_path), "--seconds", "2"], [slow, quick]) == 1
    last = json.loads((tmp_path / gpu.PARTS).read_text().splitlines()[-1])
    assert (last["name"], last["how"]) == ("quick", "no time")


@pytest.mark.parametrize("cuda", [True, False])
def test_every_part_is_there_to_run(gpu: ModuleType, tmp_path: Path, cuda: bool) -> None:
    todo = gpu.parts(tmp_path, cuda)
    names = {word for part in todo for word in part.command if word.endswith(".py")}
    for name in names:
        assert (ROOT / name).is_file(), name
    files = [path for path in (ROOT / "tests").glob("test_*.py") if path != Path(__file__)]
    marked = {path.name for path in files if "mark.gpu" in path.read_text() or "import CUDA" in path.read_text()}
    assert marked == {Path(name).name for name in names if name.startswith("tests/")}
