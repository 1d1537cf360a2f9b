"""`make gpu`: builds, proves and measures on a machine with a GPU and no network, in eight minutes.

Runs its rounds one after the other. What a round leaves of its seconds is the next one's to use, so every round begins,
and all end in time; a part that fails or is late stops none after it. Parts of one round run at the same time: tests,
and the compiling of the kernels that the benches then find compiled. What a part says is in `RESULTS/logs`, its end on
the screen; a table of the rows that the benches wrote comes last, and the exit code is 1 if a part failed.

Without a CUDA device it is a rehearsal: every part starts, benches take tiny models on the CPU through the code that a
GPU runs, tests of a GPU are skipped, and rows go to `RESULTS/rehearsal`.

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
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent

PARTS = "gpu_parts.jsonl"
"""File in the results' folder: what each part came to."""

SECONDS = "CFSFL_BENCH_SECONDS"
"""Environment variable that tells a part how long it may take."""

GRACE = 6.0
"""Seconds before its limit at which a part is interrupted, so that pytest still says what failed."""

OPERATIONS = ("feedback_step", "linear_topk", "linear_nll", "row_bag")

REHEARSAL = """no CUDA device: a rehearsal. Every part starts; the benches run tiny models on the CPU through the code
that a GPU runs; what needs a GPU (tests, captures, Triton kernels and their benches) is skipped. No figure below is a
GPU's.
"""


class Part(NamedTuple):
    """A command."""

    name: str
    command: list[str]


class Round(NamedTuple):
    """Parts that run at the same time, and their share of the whole time."""

    seconds: float
    parts: list[Part]


class Outcome(NamedTuple):
    """How a part ended: "ok", "failed N", "late" (ended at its limit) or "no time" (not begun)."""

    name: str
    how: str
    seconds: float


def rounds(results: Path, cuda: bool) -> list[Round]:
    """What `make gpu` does, the most telling first."""
    python = [sys.executable]
    options = ["-q", "-p", "no:cacheprovider", "--tb=short"]

    def test(processes: int, *files: str) -> list[str]:
        share = [*python, "-m", "tests.in_shares", str(processes if cuda else 1)]
        return [*share, *options[1:], "-m", "gpu", *(f"tests/test_{name}.py" for name in files)]

    bench = [*python, "-m", "pytest", *options, "--results", str(results)]
    bench += ["--rounds", "5"] if cuda else ["--rounds", "1", "--device", "cpu", "--rehearse", "-k", "on_a_gpu"]
    compiled = [*bench, "--compile", "-k", "compiled_on_a_gpu"]
    uncompiled = ["-k", "not compiled" if cuda else "on_a_gpu and not compiled"]
    rehearse = [] if cuda else ["--rehearse"]
    operations = [f"benches/bench_{op}.py" for op in OPERATIONS]
    return [
        Round(30, [Part("build", [*python, "setup.py", "-q", "build_ext", "--inplace"])]),
        Round(8, [Part("machine", [*python, "benches/machine.py"])]),
        Round(115, [
            Part("compile kernels", [*python, "benches/compile_kernels.py", *rehearse]),
            Part("tests of graphs", test(4, "graphs", "captured")),
            Part("tests of kernels", test(6, "triton_gpu")),
            Part("tests of numerics", test(2, "numerics", "synthetic")),
        ]),
        Round(50, [Part("bench_loop", [*bench, *uncompiled, "benches/bench_loop.py"])]),
        Round(95, [Part("bench_training", [*bench, *uncompiled, "benches/bench_training.py"])]),
        Round(60, [Part("bench_schedule", [*bench, "benches/bench_schedule.py"])]),
        Round(30, [Part("profile", [*python, "benches/profile_loop.py", "--results", str(results), *rehearse])]),
        Round(30, [Part("operations", [*bench, "-k", "every_size and not 4096", *operations])]),
        Round(35, [Part("bench_recommend", [*bench, "benches/bench_recommend.py"])]),
        Round(8, [Part("torch.compile, loop", [*compiled, "benches/bench_loop.py"])]),
        Round(8, [Part("torch.compile, training", [*compiled, "benches/bench_training.py"])]),
    ]  # fmt: skip


class Running(NamedTuple):
    """A part that was started; None where it could not be."""

    part: Part
    process: subprocess.Popen[bytes] | None
    error: str
    log: Path


def start(part: Part, seconds: float, log: Path) -> Running:
    """Starts a part; what it says goes to its log."""
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    environment = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", **os.environ, "PYTHONPATH": paths, SECONDS: f"{seconds:.0f}"}
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as file:
        file.write(f"$ {' '.join(part.command)}\n".encode())
        file.flush()
        try:
            process = subprocess.Popen(
                part.command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )
        except OSError as error:
            return Running(part, None, str(error.strerror), log)
    return Running(part, process, "", log)


def run(parts: Sequence[Part], seconds: float, logs: Path) -> list[Outcome]:
    """Runs parts at the same time; at the limit they are interrupted and then ended, with all that they started."""
    print(f"\n== {', '.join(part.name for part in parts)} (at most {seconds:.0f} s)", flush=True)
    began = time.monotonic()
    running = [start(part, seconds, logs / f"{part.name.replace(' ', '_').replace(',', '')}.txt") for part in parts]
    ended: dict[str, Outcome] = {}
    interrupted = False
    while len(ended) < len(running):
        passed = time.monotonic() - began
        for part, process, error, _ in running:
            if part.name in ended:
                continue
            code = None if process is None else process.poll()
            if process is None:
                ended[part.name] = Outcome(part.name, f"failed: {error}", 0.0)
            elif code is not None:
                how = "late" if interrupted else "ok" if code == 0 else f"failed {code}"
                ended[part.name] = Outcome(part.name, how, passed)
            elif passed > seconds:
                ended[part.name] = Outcome(part.name, "late", passed)
            elif passed > seconds - min(GRACE, seconds / 4) and not interrupted:
                _signal(process, signal.SIGINT)
        interrupted = passed > seconds - min(GRACE, seconds / 4)
        time.sleep(0.05)
    for _, process, _, _ in running:
        if process is not None:
            _signal(process, signal.SIGKILL)  # also what a part left behind
            process.wait()
    for part, _, _, log in running:
        show(ended[part.name], log)
    return [ended[part.name] for part in parts]


def _signal(process: subprocess.Popen[bytes], number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def show(outcome: Outcome, log: Path) -> None:
    """The end of what a part said: little of one that went well."""
    lines = log.read_text(errors="replace").splitlines()[1:]
    wanted = lines[-3:] if outcome.how == "ok" else lines[-25:]
    print("\n".join([f"-- {outcome.name}: {outcome.how}, {outcome.seconds:.1f} s", *(line[:200] for line in wanted)]))
    sys.stdout.flush()


def run_all(todo: Sequence[Round], seconds: float, logs: Path) -> Iterator[Outcome]:
    """Runs rounds in their shares of the time; what one leaves is handed on."""
    ends, scale = time.monotonic() + seconds, seconds / max(seconds, sum(r.seconds for r in todo))
    after = sum(r.seconds for r in todo) * scale
    for share, parts in todo:
        after -= share * scale
        limit = ends - after - time.monotonic()
        if limit > 1:
            yield from run(parts, limit, logs)
        else:
            yield from (Outcome(part.name, "no time", 0.0) for part in parts)


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


COLUMNS = ("case", "rival", "us", "x eager", "of product rate", "users/s", "peak MB", "NDCG@100")


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows as a person reads them."""
    lines = [COLUMNS]
    for row in rows:
        us = row.get("us", round(row["ms"] * 1e3, 1) if "ms" in row else "")
        lines.append(tuple(str(us if name == "us" else row.get(name, "")) for name in COLUMNS))
    widths = [max(len(line[i]) for line in lines) for i in range(len(COLUMNS))]
    shown = ("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)) for line in lines)
    return "\n".join(line.rstrip() for line in shown)


def machine() -> dict[str, Any]:
    """Where this runs, for every line of `PARTS`; asked of another process, for a GPU may serve one at a time."""
    command = [sys.executable, "benches/machine.py", "--json"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    said = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
    return {**json.loads(said), "began": time.strftime("%Y-%m-%dT%H:%M:%S")}


def note(file: IO[str], outcome: Outcome, where: dict[str, Any]) -> None:
    """Adds a line at once: what is late is not lost."""
    file.write(json.dumps({**outcome._asdict(), **where}) + "\n")
    file.flush()


def main(arguments: Sequence[str] | None = None, todo: Sequence[Round] | None = None) -> int:
    """The command; todo: other rounds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=ROOT / "benches" / "results")
    parser.add_argument("--seconds", type=float, default=470.0, help="for everything")
    given = parser.parse_args(arguments)
    results, where = given.results.resolve(), machine()
    if todo is None:
        if not where["gpus"]:
            print(REHEARSAL, flush=True)
            results /= "rehearsal"
        todo = rounds(results, bool(where["gpus"]))
    results.mkdir(parents=True, exist_ok=True)
    before, found = positions(results), []
    with (results / PARTS).open("a") as file:
        for outcome in run_all(todo, given.seconds, results / "logs"):
            found.append(outcome)
            note(file, outcome, where)
    rows = new_rows(results, before)
    print("\n" + (table(rows) if rows else "no rows were measured"))
    print("\n" + "\n".join(f"{o.name:<24} {o.how:<10} {o.seconds:6.1f} s" for o in found))
    print(f"\n{results}: rows, {PARTS}, profile.txt and logs", flush=True)
    return 0 if all(outcome.how == "ok" for outcome in found) else 1


if __name__ == "__main__":
    sys.exit(main())
