"""Timing for benches: rivals interleaved in one run, medians, shares of a roof of the same session, saved rows.

Run with `pytest benches/ -s`. Rows go to benches/results/<bench>.jsonl. CFSFL_BENCH_ROUNDS sets the rounds (default 9).
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

RESULTS = Path(__file__).parent / "results"
ROUNDS = int(os.environ.get("CFSFL_BENCH_ROUNDS", "9"))


def pytest_collect_file(parent: Any, file_path: Path) -> Any:
    """Benches are named bench_*.py."""
    if file_path.match("bench_*.py") and not parent.session.isinitpath(file_path):
        return pytest.Module.from_parent(parent, path=file_path)
    return None


def processor() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def commit() -> str:
    """The commit that is checked out, marked where files differ from it."""
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=RESULTS.parent, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or "unknown"


def race(rivals: dict[str, Callable[[], Any]], rounds: int = ROUNDS) -> dict[str, list[float]]:
    """Seconds of each rival in each round, one after the other; a first round is not counted."""
    times: dict[str, list[float]] = {name: [] for name in rivals}
    for r in range(rounds + 1):
        for name, run in rivals.items():
            start = time.perf_counter()
            run()
            if r:
                times[name].append(time.perf_counter() - start)
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


Report = Callable[..., None]


@pytest.fixture
def report(request: pytest.FixtureRequest, roof: dict[str, float]) -> Iterator[Report]:
    """report(case, times, against, flops=, bytes=): prints a row per rival and saves it."""
    rows: list[dict[str, Any]] = []

    def add(case: str, times: dict[str, list[float]], against: str, flops: float = 0, bytes: float = 0) -> None:
        for name, seconds in times.items():
            median = statistics.median(seconds)
            ratio = statistics.median(s / t for s, t in zip(seconds, times[against], strict=True))
            row = {"case": case, "rival": name, "ms": round(median * 1e3, 3), f"of {against}": round(ratio, 3)}
            if flops:
                row["of product rate"] = round(flops / median / 1e9 / roof["gflops"], 3)
            if bytes:
                row["of copy rate"] = round(bytes / median / 1e9 / roof["gbytes"], 3)
            print("  ".join(f"{k} {v}" for k, v in row.items()))
            rows.append(row)

    yield add
    RESULTS.mkdir(exist_ok=True)
    where = {
        "device": processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit(),
        "roof": {k: round(v, 1) for k, v in roof.items()},
    }
    with (RESULTS / f"{request.module.__name__}.jsonl").open("a") as file:
        for row in rows:
            file.write(json.dumps({**row, **where}) + "\n")
