"""Runs pytest in several processes at once, each with every n-th test: most of a kernel's test is compiling.
For `make gpu`, whose machine has no pytest-xdist.

python -m tests.in_shares 6 -m gpu tests/test_triton_gpu.py
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from typing import IO

import pytest

SHARE = "PYTEST_SHARE"
"""Environment variable of one process: i/n."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves the process its own share."""
    i, n = map(int, os.environ[SHARE].split("/"))
    left = [item for at, item in enumerate(items) if at % n != i]
    items[:] = items[i::n]
    config.hook.pytest_deselected(items=left)


def main(n: int, arguments: list[str]) -> int:
    """0 if every process found its tests passing, or none to run; lines are printed as they come, with the process."""

    def tell(i: int, lines: IO[str]) -> None:
        for line in lines:
            print(f"{i}| {line}", end="", flush=True)

    command = [sys.executable, "-m", "pytest", "-v", "--tb=short", "-p", "tests.in_shares", *arguments]
    processes = [
        subprocess.Popen(
            command, env={**os.environ, SHARE: f"{i}/{n}"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for i in range(n)
    ]
    tellers = [threading.Thread(target=tell, args=(i, p.stdout)) for i, p in enumerate(processes)]
    for teller in tellers:
        teller.start()
    for teller in tellers:
        teller.join()
    codes = [p.wait() for p in processes]
    none = int(pytest.ExitCode.NO_TESTS_COLLECTED)
    return max((code for code in codes if code != none), default=none)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
