"""Timing for benches: rivals interleaved in one run, medians, shares of a roof of the same session, saved rows.

pytest benches [--results FOLDER] [--rounds N]
"""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from cfsfl_fast import backends

ROOT = Path(__file__).resolve().parent.parent


def pytest_addoption(parser: pytest.Parser) -> None:
    """The options of a run."""
    parser.addoption("--results", type=Path, help="folder that JSON lines are appended to, a file per bench")
    parser.addoption("--rounds", type=int, default=5, help="timed rounds after the warm-up; the median counts")


def pytest_configure(config: pytest.Config) -> None:
    """Denormals count as zero for every side of a comparison, in every thread."""
    race.__kwdefaults__["rounds"] = config.getoption("rounds")
    torch.set_flush_denormal(True)


def processor() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def commit() -> str:
    """The commit that is checked out, marked where files differ from it."""

    def git(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)

    found = git("rev-parse", "--short", "HEAD").stdout.strip()
    changed = git("diff", "--quiet", "HEAD", "--", ".", ":!benches/results").returncode
    return f"{found}-dirty" if found and changed else found or "unknown"


def race(rivals: dict[str, Callable[[], Any]], *, rounds: int = 5) -> dict[str, list[float]]:
    """Seconds of each rival in each round, one after the other; a first round is not counted."""
    times: dict[str, list[float]] = {name: [] for name in rivals}
    for number in range(rounds + 1):
        for name, run in rivals.items():
            began = time.perf_counter()
            run()
            if number:
                times[name].append(time.perf_counter() - began)
    return times


@pytest.fixture(scope="session")
def roof() -> dict[str, float]:
    """What the machine gives: the library's product in GFLOP/s, and a copy in GB/s (bytes read plus written)."""
    a, b, c = torch.randn(500, 600), torch.randn(20108, 600), torch.empty(500, 20108)
    x, y = torch.randn(1 << 24), torch.empty(1 << 24)
    times = race({"mm": lambda: torch.mm(a, b.T, out=c), "copy": lambda: y.copy_(x)})
    return {
        "gflops": 2 * 500 * 600 * 20108 / statistics.median(times["mm"]) / 1e9,
        "gbytes": 2 * 4 * (1 << 24) / statistics.median(times["copy"]) / 1e9,
    }


@pytest.fixture(scope="session")
def implementations() -> list[str]:
    """The backends that can run on this machine's CPU."""
    return [b for b in ("torch", "cpp") if backends.why_not(b, torch.device("cpu")) is None]


Report = Callable[..., None]


@pytest.fixture
def report(request: pytest.FixtureRequest, roof: dict[str, float]) -> Iterator[Report]:
    """report(case, times, against, flops=, bytes=, **about): prints a row per rival, saves it where --results says.
    Without times it is one row of what `about` says.

    "x NAME" says how many times as fast as NAME a rival is: the median of the rounds' ratios.
    """
    rows: list[dict[str, Any]] = []
    capture = request.config.pluginmanager.getplugin("capturemanager")

    def show(row: dict[str, Any]) -> None:
        with capture.global_and_fixture_disabled():
            print("\n" + "  ".join(f"{k} {v}" for k, v in row.items()), end="")
        rows.append(row)

    def add(
        case: str, times: dict[str, list[float]], against: str = "", flops: float = 0, bytes: float = 0, **about: Any
    ) -> None:
        if not times:
            show({"case": case, **about})
        for name, seconds in times.items():
            median = statistics.median(seconds)
            ratio = statistics.median(t / s for s, t in zip(seconds, times[against], strict=True))
            row = {"case": case, "rival": name, "ms": round(median * 1e3, 3), f"x {against}": round(ratio, 2), **about}
            if flops:
                row["of product rate"] = round(flops / median / 1e9 / roof["gflops"], 3)
            if bytes:
                row["of copy rate"] = round(bytes / median / 1e9 / roof["gbytes"], 3)
            show(row)

    yield add
    folder = request.config.getoption("results")
    if folder is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    where = {
        "rounds": request.config.getoption("rounds"),
        "device": processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit(),
        "roof": {k: round(v, 1) for k, v in roof.items()},
    }
    with (folder / f"{request.module.__name__}.jsonl").open("a") as file:
        for row in rows:
            file.write(json.dumps({**row, **where}) + "\n")
