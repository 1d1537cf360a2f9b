"""Several processes on one model: as one process, up to rounding; and what happens when one is lost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from cfsfl_fast import CFSFLConfig, checkpoint
from cfsfl_fast.cli import main
from cfsfl_fast.datasets import Dataset
from cfsfl_fast.distributed import ALONE, Group
from cfsfl_fast.runs import Run
from tests.processes import PATIENCE, outputs, started, torchrun
from tests.test_training import QUICK, command

LINES = {"loss", "reward_loss", "expert_reward", "list_reward"}


class Nth(Group):
    """A group that only counts."""

    def __init__(self, rank: int, size: int) -> None:
        super().__init__()
        self.rank, self.size = rank, size


@pytest.mark.parametrize(("n", "size"), [(500, 4), (7, 3), (3, 4), (1, 2), (64, 1)])
def test_a_batch_is_shared_out_whole(n: int, size: int) -> None:
    users = torch.randperm(n)
    parts = [Nth(rank, size).part(users, -1) for rank in range(size)]
    together = torch.cat(parts)
    assert torch.equal(together[together >= 0], users)
    assert all(len(part) for part in parts), "an operation of no users"
    assert max(len(part) for part in parts) - min(len(part) for part in parts) <= 1


def test_alone_nothing_is_sent() -> None:
    x = torch.ones(3)
    ALONE.check_same([x], "x")
    assert (ALONE.sums([x])[0].tolist(), ALONE.first(lambda: "a")) == ([1, 1, 1], "a")
    assert ALONE.part(x, -1) is x
    assert ALONE.joined(x, 3) is x


MESSAGES = """
import json, sys, torch
from cfsfl_fast.distributed import ProcessError, processes
with processes(torch.device("cpu")) as mesh:
    group = mesh.everyone
    big, small, odd = torch.full((1 << 19,), 1.0 + group.rank), torch.tensor(2.0), torch.ones(4, 6).t()
    counts = torch.tensor([group.rank, 1])
    big, small, odd, counts = group.sums([big, small, odd, counts])
    begin, end = group.span(5)
    rows = torch.arange(10).view(5, 2)
    found = [bool((big == 3).all()), float(small), bool((odd == 2).all()), counts.tolist()]
    found += [torch.equal(group.joined(rows[begin:end], 5), rows), group.first(lambda: [group.rank, None, "\\u00e9"])]
    try:
        group.first(lambda: 1 / 0)
    except (ProcessError, ZeroDivisionError) as error:
        found.append(f"{type(error).__name__}: {error}")
    group.check_same([big], "the weights")
    big[3] += 1e-6 * group.rank
    try:
        group.check_same([small, big], "the weights")
    except ProcessError as error:
        found.append(str(error)[:33])
    print(json.dumps(found))
"""


def test_sums_and_messages() -> None:
    first, second = (json.loads(text) for text in outputs(["-c", MESSAGES], 2))
    assert first[:6] == second[:6] == [True, 4, True, [1, 2], True, [0, None, "é"]]
    assert first[6:] == ["ZeroDivisionError: division by zero", "the weights differ between the pr"]
    assert second[6] == "ProcessError: process 0 stopped: division by zero"
    assert second[7] == first[7]


@pytest.fixture(scope="module")
def whole(toy: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process."""
    out = tmp_path_factory.mktemp("one") / "run"
    Run(toy, out, CFSFLConfig(**QUICK), show_progress=False).train()
    return out


def figures(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def assert_alike(run: Path, whole: Path, rounding: float) -> None:
    """Losses and metrics of every epoch, and the weights after the first updates."""
    for mine, theirs in zip(figures(run), figures(whole), strict=True):
        assert (mine["stage"], mine["epoch"], mine["step"]) == (theirs["stage"], theirs["epoch"], theirs["step"])
        assert mine.keys() == theirs.keys()
        for name in LINES & theirs.keys():
            assert mine[name] == pytest.approx(theirs[name], rel=rounding), (name, mine)
        for name, value in theirs.get("validation", {}).items():
            assert mine["validation"][name] == pytest.approx(value, abs=2e-2), (name, mine)


@pytest.mark.parametrize("size", [2, 4])
def test_a_run_is_that_of_one_process(size: int, toy_folder: Path, whole: Path, tmp_path: Path) -> None:
    # 120 users in batches of 32: the last has 24.
    printed = outputs(command(toy_folder, tmp_path / "run")[1:], size)
    assert "CF-SFL minus" in printed[0]
    assert not any(printed[1:]), "another than the first process talks"
    assert_alike(tmp_path / "run", whole, 1e-4)
    mine, theirs = (checkpoint.read_tensors(run / checkpoint.MODEL)[0] for run in (tmp_path / "run", whole))
    for name, weight in theirs.items():
        far = (mine[name] - weight).norm() / weight.norm()
        assert float(far) < 1e-2, name
    users = [np.load(run / "users.npz") for run in (tmp_path / "run", whole)]
    assert np.array_equal(users[0]["most popular/NDCG@100"], users[1]["most popular/NDCG@100"])


def test_torchrun_resumes_what_one_process_began(toy_folder: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with started(command(toy_folder, out)[1:], 1) as (process,):
        wait_for_lines(out / "metrics.jsonl", 6, process)
        process.send_signal(signal.SIGKILL)
    assert "CF-SFL minus" in torchrun([*command(toy_folder, out)[1:], "--resume"], 2)
    assert_alike(out, whole, 1e-4)


def wait_for_lines(metrics: Path, n: int, process: subprocess.Popen[str]) -> None:
    patience = time.monotonic() + PATIENCE
    while not (metrics.exists() and len(metrics.read_bytes().splitlines()) >= n):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < patience
        time.sleep(0.002)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_process_ends_the_others_with_a_message(how: int, toy_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    asked = [*command(toy_folder, out)[1:], "--epochs=500,2,2", "--patience=0"]
    with started(asked, 2, CFSFL_TIMEOUT="5") as (first, second):
        wait_for_lines(out / "metrics.jsonl", 3, first)
        os.kill(second.pid, how)
        _, errors = first.communicate(timeout=PATIENCE)
    assert first.returncode == 2
    assert "cfsfl: process 0 of 2 lost the others" in errors
    assert "Start all again with --resume" in errors
    assert "Traceback" not in errors
    n_epochs = json.loads(checkpoint.read_tensors(out / "training.safetensors")[1]["progress"])["epoch"]
    assert n_epochs >= 1, "nothing to resume from"


def test_evaluating_and_recommending_share_the_users(toy_folder: Path, whole: Path, tmp_path: Path) -> None:
    asked = ["evaluate", str(whole), str(toy_folder), "--json"]
    assert shared_answer(asked) == CliRunner().invoke(main, asked).stdout
    history = tmp_path / "history.csv"
    history.write_text("user,item\n" + "".join(f"u{n},{n % 7 + k}\n" for n in range(9) for k in range(3)))
    asked = ["recommend", str(whole), f"--history={history}", "-n", "5"]
    alone = CliRunner().invoke(main, asked).stdout
    assert len(alone.splitlines()) > 40
    assert shared_answer(asked) == alone


def shared_answer(asked: list[str]) -> str:
    """What the first of two processes prints; the other prints nothing."""
    first, second = outputs(["-m", "cfsfl_fast", *asked], 2)
    assert second == ""
    return first


def test_a_process_that_never_comes_is_named(toy_folder: Path, tmp_path: Path) -> None:
    with started([*command(toy_folder, tmp_path / "run")[1:]], 2, CFSFL_TIMEOUT="3") as (first, second):
        second.kill()
        _, errors = first.communicate(timeout=PATIENCE)
    assert first.returncode == 2
    assert "did not find each other" in errors or "lost the others" in errors


def test_a_timeout_that_is_no_number_is_refused() -> None:
    text = "import torch; from cfsfl_fast.distributed import processes\nwith processes(torch.device('cpu')): pass"
    with started(["-c", text], 2, CFSFL_TIMEOUT="soon") as (first, _):
        _, errors = first.communicate(timeout=PATIENCE)
    assert "CFSFL_TIMEOUT must be a number of seconds above 0; got 'soon'" in errors


@pytest.mark.skipif(sys.platform != "linux", reason="reads a process's threads from /proc")
def test_no_thread_outlives_the_group() -> None:
    """One that does may ask the interpreter for something when that is gone, and ends the process with an abort."""
    program = (
        "import importlib, pathlib, torch\n"
        "from cfsfl_fast.distributed import processes\n"
        "with processes(torch.device('cpu')) as mesh:\n"
        "    importlib.import_module('torch.distributed.nn.functional')\n"
        "    mesh.everyone.sums([torch.ones(3)])\n"
        "print(sum('gloo' in path.read_text() for path in pathlib.Path('/proc/self/task').glob('*/comm')))\n"
    )
    assert [text.strip() for text in outputs(["-c", program], 2)] == ["0", "0"]
