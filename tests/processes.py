"""Starts the command line or a function in several processes, as torchrun does, and waits for them."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator

from tests.conftest import ROOT

PATIENCE = 120
"""Seconds that processes may take on a busy machine."""


def environment(rank: int = 0, size: int = 1, port: int = 0, **more: str) -> dict[str, str]:
    """What torchrun gives process `rank` of `size`."""
    ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    master = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    threads = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "PYTHONPATH": str(ROOT)}
    return {**os.environ, **(ranks | master if size > 1 else {}), **threads, **more}


def free_port() -> int:
    with socket.socket() as asked:
        asked.bind(("127.0.0.1", 0))
        return int(asked.getsockname()[1])


@contextlib.contextmanager
def started(arguments: list[str], size: int, **more: str) -> Iterator[list[subprocess.Popen[str]]]:
    """`python ARGUMENTS` in `size` processes of one group; whoever still runs at the end is killed."""
    port = free_port()
    running = [
        subprocess.Popen(
            [sys.executable, *arguments],
            env=environment(rank, size, port, **more),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]
    try:
        yield running
    finally:
        for process in running:
            process.kill()
            process.wait()


def outputs(arguments: list[str], size: int, **more: str) -> list[str]:
    """What each process printed; every one must end well."""
    with started(arguments, size, **more) as running:
        found = [process.communicate(timeout=PATIENCE) for process in running]
        for process, (_, errors) in zip(running, found, strict=True):
            assert process.returncode == 0, errors
    return [printed for printed, _ in found]


def torchrun(arguments: list[str], size: int) -> str:
    """What `torchrun --nproc-per-node SIZE ARGUMENTS` prints; its processes end with it."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}"]
    process = subprocess.Popen(
        [*launcher, *arguments],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        printed, errors = process.communicate(timeout=PATIENCE)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert process.returncode == 0, errors
    return printed
