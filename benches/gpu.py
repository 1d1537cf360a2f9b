"""`make gpu`: builds, proves and measures on a machine with a GPU and no network, in eight minutes.

Runs its parts one after the other, each with a limit of its own; one that fails or is late stops none after it. A
table of the rows that the benches wrote comes last, and the exit code is 1 if a part failed. Without a CUDA device the
tests say what they miss, and the benches run small on the CPU.

    python benches/gpu.py --results benches/results [--seconds 480]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PARTS = "gpu_parts.jsonl"
"""File in the results' folder: what each part came to."""


OPERATIONS = ("feedback_step", "linear_topk", "linear_nll", "row_bag")


class Part(NamedTuple):
    """A command and the seconds it may take."""

    name: str
    command: list[str]
    limit: float


class Outcome(NamedTuple):
    """How a part ended: "ok", "failed N", "late" (ended at its limit) or "no time" (not begun)."""

    name: str
    how: str
    seconds: float


def parts(results: Path, cuda: bool) -> list[Part]:
    """What `make gpu` does, the most telling first; of the benches only the small ones without a CUDA device."""
    python = [sys.executable]
    test = [*python, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
    bench = [*python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--results", str(results)]
    bench += (
        ["--rounds", "5"]
        if cuda
        else ["--rounds", "1", "--device", "cpu", "-k", "not drifting and not ml-20m and not msd"]
    )
    todo = [
        Part("build", [*python, "setup.py", "-q", "build_ext", "--inplace"], 120),
        Part("machine", [*python, "benches/machine.py"], 60),
        Part("tests of graphs", [*test, "tests/test_graphs.py", "tests/test_captured.py"], 90),
        Part("bench_loop", [*bench, "benches/bench_loop.py"], 90),
        Part("bench_training", [*bench, "benches/bench_training.py"], 90),
        Part("tests of kernels", [*test, "tests/test_triton_gpu.py"], 120),
        Part("bench_recommend", [*bench, "benches/bench_recommend.py"], 60),
        Part(
            "operations",
            [*bench, "-k", "every_size and B=500", *(f"benches/bench_{op}.py" for op in OPERATIONS)],
            90,
        ),
        Part("bench_schedule", [*bench, "benches/bench_schedule.py"], 90),
        Part("tests of numerics", [*test, "tests/test_numerics.py", "tests/test_synthetic.py"], 60),
        Part("profile", [*python, "benches/profile_loop.py", "--results", str(results)], 60),
        Part("torch.compile", [*bench, "--compile", "-k", "compiled", "benches/bench_loop.py"], 100),
    ]
    heavy = {"bench_training", "bench_recommend", "operations", "torch.compile"}
    return [part for part in todo if cuda or part.name not in heavy]


def run(part: Part, limit: float) -> Outcome:
    """Runs a part; at its limit it is ended with all that it started."""
    print(f"\n== {part.name} (at most {limit:.0f} s): {' '.join(part.command)}", flush=True)
    began = time.monotonic()
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    environment = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", **os.environ, "PYTHONPATH": paths}
    try:
        process = subprocess.Popen(part.command, cwd=ROOT, env=environment, start_new_session=True)
    except OSError as error:
        return Outcome(part.name, f"failed: {error.strerror}", 0.0)
    try:
        code = process.wait(limit)
        how = "ok" if code == 0 else f"failed {code}"
    except subprocess.TimeoutExpired:
        how = "late"
    with contextlib.suppress(ProcessLookupError):  # also what a part left behind
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return Outcome(part.name, how, time.monotonic() - began)


def run_all(todo: Sequence[Part], seconds: float) -> list[Outcome]:
    """Runs parts as long as time is left."""
    ends = time.monotonic() + seconds
    found = []
    for part in todo:
        left = ends - time.monotonic()
        found.append(run(part, min(part.limit, left)) if left > 1 else Outcome(part.name, "no time", 0.0))
    return found


def positions(results: Path) -> dict[Path, int]:
    """How long each file of rows is."""
    return {path: path.stat().st_size for path in results.glob("bench_*.jsonl")}


def new_rows(results: Path, before: dict[Path, int]) -> list[dict[str, Any]]:
    """The rows that were added since; a half-written line, of a part that was ended, is left out."""
    rows = []
    for path in sorted(results.glob("bench_*.jsonl")):
        for line in path.read_bytes()[before.get(path, 0) :].splitlines():
            with contextlib.suppress(ValueError):
                rows.append(json.loads(line))
    return rows


COLUMNS = ("case", "rival", "us", "x eager", "of product rate", "users/s", "peak MB")


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows as a person reads them."""
    lines = [COLUMNS]
    for row in rows:
        us = row.get("us", round(row["ms"] * 1e3, 1) if "ms" in row else "")
        lines.append(tuple(str(us if name == "us" else row.get(name, "")) for name in COLUMNS))
    widths = [max(len(line[i]) for line in lines) for i in range(len(COLUMNS))]
    shown = ("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)) for line in lines)
    return "\n".join(line.rstrip() for line in shown)


def main(arguments: Sequence[str] | None = None, todo: Sequence[Part] | None = None) -> int:
    """The command; todo: other parts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=ROOT / "benches" / "results")
    parser.add_argument("--seconds", type=float, default=480.0, help="for everything")
    given = parser.parse_args(arguments)
    results = given.results.resolve()
    results.mkdir(parents=True, exist_ok=True)
    if todo is None:
        import torch

        todo = parts(results, torch.cuda.is_available())
    before = positions(results)
    found = run_all(todo, given.seconds)
    with (results / PARTS).open("a") as file:
        for outcome in found:
            file.write(json.dumps(outcome._asdict()) + "\n")
    rows = new_rows(results, before)
    print("\n" + (table(rows) if rows else "no rows were measured"))
    print("\n" + "\n".join(f"{o.name:<20} {o.how:<10} {o.seconds:6.1f} s" for o in found), flush=True)
    return 0 if all(outcome.how == "ok" for outcome in found) else 1


if __name__ == "__main__":
    sys.exit(main())
