"""The server on loopback against the bare call: one client, and 64 at once. Clients and server share the machine."""

from __future__ import annotations

import asyncio
import json
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
import torch
from conftest import Report
from problems import SHAPES, batch, model

from cfsfl_fast.interactions import Interactions

pytest.importorskip("uvicorn", reason="pip install 'cfsfl-fast[serve]'")

N, M = 10, SHAPES["ml-20m"]
REQUESTS = {1: 200, 64: 1280}
"""By clients."""


def histories() -> Interactions:
    """What 64 users ask with."""
    return batch(M)[0].seen.take(torch.arange(64))


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """A server of a trained model in a process of its own."""
    folder = tmp_path_factory.mktemp("served") / "run"
    model(M, "trained").eval().save_pretrained(folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        number = int(free.getsockname()[1])
    command = [sys.executable, "-m", "cfsfl_fast", "serve", str(folder), "--port", str(number)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert any("Uvicorn running" in line for line in process.stderr), "the server did not start"
        yield number
        process.terminate()


async def client(port: int, bodies: list[bytes], answers: list[tuple[float, dict[str, list[float]]]]) -> None:
    """Posts bodies one after the other over one connection; notes seconds and answers."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for body in bodies:
        began = time.perf_counter()
        writer.write(b"POST /recommend HTTP/1.1\r\nHost: here\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        assert head.startswith(b"http/1.1 200"), head
        size = int(head.split(b"content-length:")[1].split(b"\r\n")[0])
        answer = json.loads(await reader.readexactly(size))
        answers.append((time.perf_counter() - began, answer))
    writer.close()


@pytest.mark.parametrize("clients", REQUESTS)
def test_serving(clients: int, port: int, report: Report) -> None:
    made, x = model(M, "trained").eval(), histories()
    rows = [x.items[a:b].tolist() for a, b in zip(x.offsets[:-1], x.offsets[1:], strict=True)]
    wanted = made.recommend(x, N)[0].tolist()
    bare = []
    for _ in range(6):
        began = time.perf_counter()
        made.recommend(x.take(torch.arange(clients)), N)
        bare.append(time.perf_counter() - began)
    each = REQUESTS[clients] // clients
    bodies = [[json.dumps({"items": rows[(c + i) % 64], "n": N}).encode() for i in range(each)] for c in range(clients)]
    answers: list[list[tuple[float, dict[str, list[float]]]]] = [[] for _ in range(clients)]

    async def everybody() -> float:
        began = time.perf_counter()
        await asyncio.gather(*(client(port, bodies[c], answers[c]) for c in range(clients)))
        return time.perf_counter() - began

    seconds = asyncio.run(everybody())
    for c, found in enumerate(answers):
        assert [a["items"] for _, a in found] == [wanted[(c + i) % 64] for i in range(each)]
    latencies = sorted(s for found in answers for s, _ in found[1:])
    call, median = statistics.median(bare[1:]), statistics.median(latencies)
    report(
        f"POST /recommend, {clients} clients, M={M} T=8 n={N}",
        {},
        clients=clients,
        requests=REQUESTS[clients],
        **{"median ms": round(median * 1e3, 2)},
        **{"p99 ms": round(latencies[int(0.99 * len(latencies))] * 1e3, 2)},
        **{"requests/s": round(REQUESTS[clients] / seconds, 1)},
        **{f"recommend of {clients}, ms": round(call * 1e3, 2)},
        **{"x of the call": round(median / call, 2)},
    )
