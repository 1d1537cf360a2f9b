"""Timing for benches: rivals interleaved in one run, medians, shares of a roof of the same session, saved rows.

pytest benches [--results FOLDER] [--rounds N] [--device cpu|cuda] [--compile] [--rehearse]

On a CUDA device times are those of its own clock (events around CALLS calls), and the products' roof is torch.mm in
bfloat16, whatever a rival multiplies in.
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
    parser.addoption("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where rivals run")
    parser.addoption("--compile", action="store_true", help="torch.compile among the rivals: minutes to compile")
    parser.addoption("--rehearse", action="store_true", help="the benches of a GPU, at a tiny size on the CPU")


def pytest_configure(config: pytest.Config) -> None:
    """Denormals count as zero for every side of a comparison, in every thread."""
    race.__kwdefaults__.update(rounds=config.getoption("rounds"), device=config.getoption("device"))
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


CALLS = 10
"""Calls in a row between two readings of a CUDA device's clock."""

WARM_UP = 4
"""Rounds on a CUDA device that are not counted: kernels compile, graphs are captured."""


class Times(dict[str, list[float]]):
    """Seconds of each rival in each round, and the megabytes that it needed at its peak beyond what was there."""

    def __init__(self, rivals: dict[str, Any]) -> None:
        super().__init__({name: [] for name in rivals})
        self.megabytes: dict[str, float] = {}


def race(rivals: dict[str, Callable[[], Any]], *, rounds: int = 5, device: str = "cpu") -> Times:
    """Seconds of each rival in each round, one after the other; the first rounds are not counted."""
    times = Times(rivals)
    if torch.device(device).type == "cuda":
        return _race_on_cuda(times, rivals, rounds, torch.device(device))
    for number in range(rounds + 1):
        for name, run in rivals.items():
            began = time.perf_counter()
            run()
            if number:
                times[name].append(time.perf_counter() - began)
    return times


def _race_on_cuda(times: Times, rivals: dict[str, Callable[[], Any]], rounds: int, device: torch.device) -> Times:
    with torch.cuda.device(device):
        for name, run in rivals.items():
            torch.cuda.empty_cache()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            for _ in range(WARM_UP):
                run()
            torch.cuda.synchronize()
            times.megabytes[name] = (torch.cuda.max_memory_allocated() - before) / 2**20
        for _ in range(rounds):
            for name, run in rivals.items():
                began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                began.record()
                for _ in range(CALLS):
                    run()
                ended.record()
                ended.synchronize()
                times[name].append(began.elapsed_time(ended) / 1e3 / CALLS)
    return times


def captured(function: Callable[[], Any]) -> Callable[[], None]:
    """A function's kernels as one CUDA graph; what it gives is where its last call before the capture left it. In a
    rehearsal the function itself.
    """
    if not torch.cuda.is_available():
        return function
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    torch._C._cuda_clearCublasWorkspaces()  # its own, not those of the last graph (`cfsfl_fast.graphs`)
    with torch.cuda.graph(graph):
        function()
    torch._C._cuda_clearCublasWorkspaces()
    return graph.replay


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where rivals run."""
    return torch.device(request.config.getoption("device"))


@pytest.fixture(scope="session")
def gpu_shape(request: pytest.FixtureRequest, device: torch.device) -> str:
    """What a GPU's bench runs on, of `problems.ITEMS`."""
    if device.type != "cuda" and not request.config.getoption("rehearse"):
        pytest.skip("needs a CUDA device, or --rehearse")
    return "ml-20m" if device.type == "cuda" else "tiny"


@pytest.fixture(params=[500, 4096])
def gpu_users(request: pytest.FixtureRequest, gpu_shape: str) -> int:
    """B of a GPU's bench, or of its rehearsal."""
    return int(request.param) // (64 if gpu_shape == "tiny" else 1)


@pytest.fixture(scope="session")
def compiles(request: pytest.FixtureRequest, device: torch.device) -> bool:
    """Whether torch.compile is among the rivals."""
    return device.type == "cpu" or bool(request.config.getoption("compile"))


@pytest.fixture(scope="session")
def roof(device: torch.device) -> dict[str, float]:
    """What the machine gives: the library's product in GFLOP/s, and a copy in GB/s (bytes read plus written)."""
    on_cuda = device.type == "cuda"
    m, k, n = (8192, 8192, 8192) if on_cuda else (500, 600, 20108)
    a, b = torch.randn(m, k, device=device), torch.randn(n, k, device=device)
    a, b = (a.bfloat16(), b.bfloat16()) if on_cuda else (a, b)
    c = torch.empty(m, n, device=device, dtype=a.dtype)
    size = 1 << 28 if on_cuda else 1 << 24
    x, y = torch.randn(size, device=device), torch.empty(size, device=device)
    times = race({"mm": lambda: torch.mm(a, b.T, out=c), "copy": lambda: y.copy_(x)})
    return {
        "gflops": 2 * m * k * n / statistics.median(times["mm"]) / 1e9,
        "gbytes": 2 * 4 * size / statistics.median(times["copy"]) / 1e9,
    }


@pytest.fixture(scope="session")
def implementations() -> list[str]:
    """The backends that can run on this machine's CPU."""
    return [b for b in ("torch", "cpp") if backends.why_not(b, torch.device("cpu")) is None]


Report = Callable[..., None]


@pytest.fixture
def report(request: pytest.FixtureRequest, roof: dict[str, float], device: torch.device) -> Iterator[Report]:
    """report(case, times, against, flops=, bytes=, users=, **about): prints a row per rival, saves it where --results
    says. Without times it is one row of what `about` says.

    "x NAME" says how many times as fast as NAME a rival is: the median of the rounds' ratios.
    """
    rows: list[dict[str, Any]] = []
    capture = request.config.pluginmanager.getplugin("capturemanager")

    def show(row: dict[str, Any]) -> None:
        with capture.global_and_fixture_disabled():
            print("\n" + "  ".join(f"{k} {v}" for k, v in row.items()), end="")
        rows.append(row)

    def add(
        case: str,
        times: dict[str, list[float]],
        against: str = "",
        flops: float = 0,
        bytes: float = 0,
        users: int = 0,
        **about: Any,
    ) -> None:
        if not times:
            show({"case": case, **about})
        for name, seconds in times.items():
            median = statistics.median(seconds)
            ratio = statistics.median(t / s for s, t in zip(seconds, times[against], strict=True))
            row = {"case": case, "rival": name, "ms": round(median * 1e3, 3), f"x {against}": round(ratio, 2), **about}
            if device.type == "cuda":
                row["us"] = round(median * 1e6, 1)
            if users:
                row["users/s"] = round(users / median)
            if isinstance(times, Times) and name in times.megabytes:
                row["peak MB"] = round(times.megabytes[name])
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
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit(),
        "roof": {k: round(v, 1) for k, v in roof.items()},
    }
    with (folder / f"{request.module.__name__}.jsonl").open("a") as file:
        for row in rows:
            file.write(json.dumps({**row, **where}) + "\n")
