"""The server: answers as the model gives them, batches under load, refuses with words, and stays up."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from cfsfl_fast import CFSFL
from cfsfl_fast.cli import main
from tests.conftest import clusters

httpx = pytest.importorskip("httpx", reason="pip install httpx")
pytest.importorskip("starlette", reason="pip install 'cfsfl-fast[serve]'")

from cfsfl_fast import serving  # noqa: E402
from cfsfl_fast.serving import Limits, Server  # noqa: E402

X = clusters(40)
M = X.shape[1]


def model(item_ids: Any = None) -> CFSFL:
    torch.manual_seed(0)
    made = CFSFL(M, steps=2, top_k=6, hidden_dim=24, latent_dim=8, lookup_dim=8, feedback_dim=8).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    made.item_ids = item_ids
    return made


def served(server: Server, talk: Callable[[Any], Awaitable[Any]]) -> Any:
    """Runs the application in this process and gives a client to `talk`."""

    async def run() -> Any:
        app = server.app()
        transport = httpx.ASGITransport(app)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://here") as client,
        ):
            return await talk(client)

    return asyncio.run(run())


def ask(server: Server, body: Any, **options: Any) -> Any:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return served(server, lambda client: client.post("/recommend", content=content, **options))


@pytest.mark.parametrize("kind", ["numbers", "whole numbers", "texts"])
def test_an_answer_is_the_models(kind: str) -> None:
    ids = {"numbers": None, "whole numbers": np.arange(M) * 10 + 5, "texts": np.array([f"i{j}" for j in range(M)])}[
        kind
    ]
    made = model(ids)
    names = list(range(M)) if ids is None else ids.tolist()
    history = X[7].indices
    found = ask(Server(made), {"items": [names[j] for j in history[::-1]] * 2, "n": 6})
    assert found.status_code == 200
    wanted, scores = made.recommend(X[7], 6)
    assert found.json()["items"] == [names[j] for j in wanted[0].tolist()]
    assert found.json()["scores"] == scores[0].tolist()
    assert found.json()["unknown"] == []


def test_unknown_items_are_named_and_count_for_nothing() -> None:
    made = model(np.arange(M) + 100)
    found = ask(Server(made), {"items": [100, "nothing", "101", 7, 7], "n": M}).json()
    assert found["unknown"] == ["nothing", 7]
    history = np.zeros((1, M))
    history[0, :2] = 1
    wanted = made.recommend(history, M)[0][0]
    assert found["items"] == (wanted[wanted >= 0] + 100).tolist(), "as many as there are"
    assert ask(Server(made), {"items": []}).json()["items"] == (made.recommend(np.zeros((1, M)))[0][0] + 100).tolist()


def test_halves_of_surrogate_pairs_go_back_as_they_came() -> None:
    found = ask(Server(model()), b'{"items": ["\\ud800", "\xc3\xa9"]}')
    assert (found.status_code, found.json()["unknown"]) == (200, ["\ud800", "é"])
    found = ask(Server(model()), b'{"\\udfff": 1}')
    assert found.status_code == 400
    assert found.json()["error"].startswith('unknown field "\udfff"; ')


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        (b"{", 400, "not json"),
        (b"[" * 100_000, 400, "not json"),
        (b"\xff", 400, "not json"),
        (b"", 400, "not json"),
        ([1, 2], 400, "must be an object"),
        ({}, 400, '"items" must be a list of item ids; got nothing'),
        ({"items": "1,2"}, 400, "got a text"),
        ({"items": [1.5]}, 400, "a whole number or a text; got 1.5"),
        ({"items": [None]}, 400, "got nothing"),
        ({"items": [True]}, 400, "got true or false"),
        ({"items": [[1]]}, 400, "got a list"),
        ({"items": [1], "n": 0}, 400, "from 1 to 50; got 0"),
        ({"items": [1], "n": 51}, 400, "from 1 to 50; got 51"),
        ({"items": [1], "n": "5"}, 400, 'got "5"'),
        ({"items": [1], "n": True}, 400, "got true"),
        (b'{"items": [1], "n": NaN}', 400, "got NaN"),
        ({"items": [1], "k": 5}, 400, 'unknown field "k"'),
        ({"items": [1] * 101}, 413, "may have 100 ids; got 101"),
        ({"items": ["x" * 3000]}, 413, "may have 2000 bytes"),
    ],
)
def test_bad_requests_are_refused_with_words(body: Any, status: int, words: str) -> None:
    server = Server(model(), Limits(n=50, items=100, body=2000 if not isinstance(body, bytes) else 1 << 20))
    found = ask(server, body)
    assert found.status_code == status
    assert words in found.json()["error"]
    assert server.responses == {status: 1}


def test_other_paths_methods_and_bodies() -> None:
    server = Server(model(), Limits(body=100))

    async def talk(client: Any) -> None:
        assert (await client.get("/recommend")).status_code == 405
        assert (await client.get("/nowhere")).json() == {"error": "Not Found"}

        async def endless() -> Any:
            while True:
                yield b" " * 60

        assert (await client.post("/recommend", content=endless())).status_code == 413

        async def slow() -> Any:
            yield b"{"
            await asyncio.sleep(60)

        assert (await client.post("/recommend", content=slow())).status_code == 408
        assert (await client.post("/recommend", json={"items": [1]})).status_code == 200

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(serving, "BODY_SECONDS", 0.2)
        served(server, talk)


def test_requests_that_wait_are_answered_together() -> None:
    made = model()
    server = Server(made, Limits(batch=8))
    calls: list[int] = []
    answer = server.answer

    def slowly(histories: list[np.ndarray], n: int) -> Any:
        calls.append(len(histories))
        time.sleep(0.05)
        return answer(histories, n)

    server.answer = slowly  # type: ignore[method-assign]

    async def talk(client: Any) -> list[Any]:
        bodies = [{"items": X[u].indices.tolist(), "n": 1 + u % 5} for u in range(20)]
        return list(await asyncio.gather(*(client.post("/recommend", json=body) for body in bodies)))

    for user, found in enumerate(served(server, talk)):
        wanted, scores = made.recommend(X[user], 1 + user % 5)
        assert found.json()["items"] == wanted[0].tolist()
        assert found.json()["scores"] == scores[0].tolist(), "the same bits in any batch"
    assert calls[0] == 1, "warm-up"
    assert sum(calls[1:]) == 20
    assert max(calls) == 8
    assert len(calls) <= 6


def test_too_many_wait_and_a_model_that_fails() -> None:
    server = Server(model(), Limits(batch=1, waiting=2))
    gate, computing = threading.Event(), threading.Event()
    answer = server.answer
    failing = False

    def gated(histories: list[np.ndarray], n: int) -> Any:
        if len(histories[0]) == 1:  # not the warm-up
            computing.set()
            gate.wait(10)
        if failing:
            raise ValueError("damaged")
        return answer(histories, n)

    server.answer = gated  # type: ignore[method-assign]

    async def talk(client: Any) -> None:
        nonlocal failing
        posts = [asyncio.create_task(client.post("/recommend", json={"items": [1]}))]
        while not computing.is_set():
            await asyncio.sleep(0.01)
        posts += [asyncio.create_task(client.post("/recommend", json={"items": [1]})) for _ in range(5)]
        done, _ = await asyncio.wait(posts, return_when=asyncio.FIRST_COMPLETED, timeout=5)
        refused = next(iter(done)).result()
        assert refused.status_code == 503
        assert refused.headers["retry-after"] == "1"
        gate.set()
        statuses = sorted([(await post).status_code for post in posts])
        assert statuses == [200] * 3 + [503] * 3, "one computes, two wait"
        failing = True
        failed = await client.post("/recommend", json={"items": [1, 2]})
        assert (failed.status_code, failed.json()) == (500, {"error": "the model failed: damaged"})
        failing = False
        assert (await client.post("/recommend", json={"items": [1, 2]})).status_code == 200

    served(server, talk)


def test_health_and_metrics() -> None:
    server = Server(model())

    async def talk(client: Any) -> tuple[Any, str]:
        await asyncio.gather(*(client.post("/recommend", json={"items": [u]}) for u in range(5)))
        await client.post("/recommend", json={})
        return (await client.get("/health")).json(), (await client.get("/metrics")).text

    health, text = served(server, talk)
    assert (health["status"], health["n_items"], health["steps"]) == ("ok", M, 2)
    sample = re.compile(r'[a-z_]+(\{[a-z]+="[^"]+"\})? [0-9.e+-]+')
    assert all(line.startswith("# ") or sample.fullmatch(line) for line in text.splitlines())
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert values['cfsfl_responses_total{status="200"}'] == "5"
    assert values['cfsfl_responses_total{status="400"}'] == "1"
    assert values['cfsfl_request_seconds_bucket{le="+Inf"}'] == values["cfsfl_request_seconds_count"] == "5"
    assert float(values["cfsfl_batch_users_sum"]) == 5
    assert float(values["cfsfl_model_seconds_total"]) > 0
    buckets = [int(v) for name, v in values.items() if name.startswith("cfsfl_batch_users_bucket")]
    assert buckets == sorted(buckets)


def test_limits_are_checked() -> None:
    with pytest.raises(ValueError, match="limit batch must be at least 1; got 0"):
        Limits(batch=0)


def test_without_the_extra_the_command_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    result = CliRunner().invoke(main, ["serve", str(tmp_path)])
    assert result.exit_code == 2
    assert result.stderr.endswith("pip install 'cfsfl-fast[serve]'\n")
    assert len(result.stderr.splitlines()) == 1


def test_the_command(tmp_path: Path) -> None:
    pytest.importorskip("uvicorn", reason="pip install 'cfsfl-fast[serve]'")
    made = model()
    made.save_pretrained(tmp_path / "run")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "cfsfl_fast", "serve", str(tmp_path / "run"), "--port", str(port)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            assert any("Uvicorn running" in line for line in process.stderr)
            body = json.dumps({"items": X[3].indices.tolist(), "n": 4}).encode()
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/recommend", body, timeout=10) as answer:
                assert json.load(answer)["items"] == made.recommend(X[3], 4)[0][0].tolist()
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(120)
    assert process.returncode in (0, -signal.SIGINT, 130)
