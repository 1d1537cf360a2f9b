"""Interleaved timing, and rows of results with device, versions and commit.

pytest benches [--results FOLDER] [--rounds N]
"""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cfsfl_fast import __version__, ops

ROOT = Path(__file__).resolve().parent.parent


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--results", type=Path, help="folder that a file of JSON lines is written to")
    parser.addoption("--rounds", type=int, default=5, help="timed rounds after the warm-up; the median counts")


@pytest.fixture(scope="session", autouse=True)
def flush_to_zero() -> None:
    """Denormals count as zero for every side of a comparison, in every thread."""
    torch.set_flush_denormal(True)


@pytest.fixture(scope="session")
def backends() -> list[str]:
    """The backends that can run on the CPU of this machine, slowest first."""
    return [b for b in ("torch", "cpp") if ops.why_not(b, torch.device("cpu")) is None]


Times = dict[str, list[float]]


@pytest.fixture(scope="session")
def interleave(request: pytest.FixtureRequest) -> Callable[[dict[str, Callable[[], Any]]], Times]:
    """Seconds of every function in every round: one after the other, so that a slow minute slows all of them."""

    def measure(functions: dict[str, Callable[[], Any]]) -> Times:
        times: Times = {name: [] for name in functions}
        for number in range(request.config.getoption("rounds") + 1):
            for name, function in functions.items():
                began = time.perf_counter()
                function()
                if number:
                    times[name].append(time.perf_counter() - began)
        return times

    return measure


@pytest.fixture(scope="session")
def machine() -> dict[str, Any]:
    """What a row says about where it was measured."""
    model = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        model = names[0].split(":")[1].strip() if names else model
    git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return {
        "device": f"{model}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "cfsfl_fast": __version__,
        "commit": git.stdout.strip() or "unknown",
    }


@pytest.fixture
def record(request: pytest.FixtureRequest, machine: dict[str, Any]) -> Callable[..., None]:
    """Prints a row, and saves it where --results says: medians in milliseconds, ratios to `against` round by round."""

    def save(what: str, times: Times, *, against: str, **about: Any) -> None:
        row = {
            "bench": request.node.nodeid.split("/")[-1],
            "what": what,
            **about,
            "ms": {name: round(1000 * statistics.median(values), 3) for name, values in times.items()},
            "times_faster": {
                name: round(statistics.median(a / b for a, b in zip(times[against], values, strict=True)), 2)
                for name, values in times.items()
                if name != against
            },
            "against": against,
            "rounds": len(times[against]),
            **machine,
        }
        with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
            print("\n" + json.dumps({k: v for k, v in row.items() if k not in machine}))
        if folder := request.config.getoption("results"):
            folder.mkdir(parents=True, exist_ok=True)
            with (folder / f"{Path(request.node.path).stem}.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")

    return save
