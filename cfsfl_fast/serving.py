"""A trained model behind HTTP: POST a history by item ids, get the best items.

    POST /recommend  {"items": [260, 1210], "n": 10}  ->  {"items": [...], "scores": [...], "unknown": []}
    GET  /health     whether it answers, and what it serves
    GET  /metrics    counters and histograms as Prometheus reads them

Requests that arrive while the model computes are answered together by its next call. Nothing waits for a batch to fill:
a lone request is answered at once, and under load batches grow by themselves.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from cfsfl_fast import backends
from cfsfl_fast.interactions import Interactions
from cfsfl_fast.model import CFSFL

try:
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import JSONResponse, PlainTextResponse, Response
    from starlette.routing import Route
except ImportError as error:
    raise ImportError(f"serving needs a web framework ({error}): pip install 'cfsfl-fast[serve]'") from error

log = logging.getLogger(__name__)

BODY_SECONDS = 10.0
"""A body that takes longer to arrive is given up."""

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
_USERS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


@dataclass(frozen=True)
class Limits:
    """What a server takes on.

    Attributes:
        n: items that one request may ask for.
        items: items of a history.
        body: bytes of a request.
        batch: users that the model answers at once.
        waiting: requests that may wait for the model; more are turned away with 503.
    """

    n: int = 1000
    items: int = 10_000
    body: int = 1 << 20
    batch: int = 64
    waiting: int = 1024

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise ValueError(f"limit {name} must be at least 1; got {value}")


class Histogram:
    """Counts of values up to each bound, as Prometheus wants them."""

    def __init__(self, name: str, what: str, bounds: tuple[float, ...]) -> None:
        self.name, self.what, self.bounds = name, what, bounds
        self.counts, self.sum = [0] * (len(bounds) + 1), 0.0

    def add(self, value: float) -> None:
        """Counts a value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def lines(self) -> list[str]:
        """The text format."""
        total = np.cumsum(self.counts).tolist()
        bounds = [*map(str, self.bounds), "+Inf"]
        return [
            f"# HELP {self.name} {self.what}",
            f"# TYPE {self.name} histogram",
            *(f'{self.name}_bucket{{le="{b}"}} {n}' for b, n in zip(bounds, total, strict=True)),
            f"{self.name}_sum {self.sum}",
            f"{self.name}_count {total[-1]}",
        ]


class _Json(JSONResponse):
    """json in UTF-8; half a surrogate pair, which json can say and UTF-8 cannot, goes back as the escape it came as."""

    def render(self, content: Any) -> bytes:
        text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        return text.encode(errors="backslashreplace")


@dataclass
class _Asked:
    """A request that waits for the model."""

    history: np.ndarray  # ascending indices
    n: int
    answer: asyncio.Future[tuple[list[int], list[float]]] = field(repr=False)


class Server:
    """The application's state: the model, the requests that wait, and what is counted.

    Args:
        model: a trained model. Its items go by `item_ids`, or by their numbers where it has none.
        limits: what is turned away.
    """

    def __init__(self, model: CFSFL, limits: Limits | None = None) -> None:
        self.model, self.limits = model.eval(), limits or Limits()
        self.item_ids: list[Any] = list(range(model.n_items)) if model.item_ids is None else model.item_ids.tolist()
        self.index = {str(item): j for j, item in enumerate(self.item_ids)}
        self.responses: Counter[int] = Counter()
        self.seconds = Histogram("cfsfl_request_seconds", "Seconds of answered requests.", _SECONDS)
        self.users = Histogram("cfsfl_batch_users", "Users that a call of the model answered.", _USERS)
        self.model_seconds = 0.0
        self.waiting: asyncio.Queue[_Asked]

    def app(self) -> Starlette:
        """The ASGI application; any ASGI server runs it, in one process."""
        return Starlette(
            routes=[
                Route("/recommend", self.recommend, methods=["POST"]),
                Route("/health", self.health),
                Route("/metrics", self.metrics),
            ],
            exception_handlers={HTTPException: self._refused},
            lifespan=self._life,
        )

    @contextlib.asynccontextmanager
    async def _life(self, app: Starlette) -> AsyncIterator[None]:
        self.waiting = asyncio.Queue(self.limits.waiting)
        with ThreadPoolExecutor(1, "model") as thread:
            loop = asyncio.get_running_loop()
            await loop.run_in_executor(thread, self.answer, [np.arange(min(3, self.model.n_items))], 1)  # warm
            worker = asyncio.create_task(self._work(thread))
            yield
            worker.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await worker
            while not self.waiting.empty():
                self.waiting.get_nowait().answer.cancel()

    async def _work(self, thread: ThreadPoolExecutor) -> None:
        """Answers whatever waits, again and again."""
        loop = asyncio.get_running_loop()
        while True:
            batch = [await self.waiting.get()]
            while len(batch) < self.limits.batch and not self.waiting.empty():
                batch.append(self.waiting.get_nowait())
            batch = [asked for asked in batch if not asked.answer.cancelled()]
            if not batch:
                continue
            began = time.perf_counter()
            try:
                histories, n = [asked.history for asked in batch], max(asked.n for asked in batch)
                answers = await loop.run_in_executor(thread, self.answer, histories, n)
            except Exception as error:
                log.exception("a batch of %d failed", len(batch))
                for asked in batch:
                    if not asked.answer.done():
                        asked.answer.set_exception(RuntimeError(f"the model failed: {error}"))
                continue
            self.model_seconds += time.perf_counter() - began
            self.users.add(len(batch))
            for asked, (ids, scores) in zip(batch, answers, strict=True):
                if not asked.answer.done():  # its client may have gone
                    asked.answer.set_result((ids[: asked.n], scores[: asked.n]))

    def answer(self, histories: list[np.ndarray], n: int) -> list[tuple[list[int], list[float]]]:
        """One call of the model: the n best unseen items of each history, fewer where there are not so many."""
        items = torch.from_numpy(np.concatenate([*histories, np.empty(0, np.int64)]).astype(np.int64))
        offsets = torch.tensor(np.cumsum([0, *map(len, histories)]))
        ids, scores = self.model.recommend(Interactions(items, offsets, self.model.n_items), n)
        found = zip(ids.tolist(), scores.tolist(), (ids >= 0).sum(1).tolist(), strict=True)
        return [(row[:size], values[:size]) for row, values, size in found]

    # Requests

    async def recommend(self, request: Request) -> Response:
        """POST /recommend."""
        began = time.perf_counter()
        history, unknown, n = self._asked(await self._body(request))
        asked = _Asked(history, n, asyncio.get_running_loop().create_future())
        try:
            self.waiting.put_nowait(asked)
        except asyncio.QueueFull:
            raise HTTPException(503, f"{self.limits.waiting} requests wait already", {"Retry-After": "1"}) from None
        try:
            ids, scores = await asked.answer
        except RuntimeError as error:
            raise HTTPException(500, str(error)) from None
        self.responses[200] += 1
        self.seconds.add(time.perf_counter() - began)
        return _Json({"items": [self.item_ids[j] for j in ids], "scores": scores, "unknown": unknown})

    async def _body(self, request: Request) -> Any:
        """The JSON of a request."""
        announced = request.headers.get("content-length", "0")
        limit = self.limits.body
        if announced.isdigit() and int(announced) > limit:
            raise HTTPException(413, f"a body may have {limit} bytes; this one has {announced}")
        body = bytearray()

        async def read() -> None:
            async for chunk in request.stream():
                body.extend(chunk)
                if len(body) > limit:
                    raise HTTPException(413, f"a body may have {limit} bytes; this one has more")

        try:
            await asyncio.wait_for(read(), BODY_SECONDS)
        except asyncio.TimeoutError:
            raise HTTPException(408, f"the body did not arrive within {BODY_SECONDS:.0f} s") from None
        except ClientDisconnect:
            raise HTTPException(400, "the body ends too early") from None
        try:
            return json.loads(body)
        except (ValueError, RecursionError) as error:
            raise HTTPException(400, f"the body is not json: {error}") from None

    def _asked(self, body: Any) -> tuple[np.ndarray, list[Any], int]:
        """The history's indices, the ids that are no items, and how many items are wanted."""
        if not isinstance(body, dict):
            raise HTTPException(400, f'the body must be an object, {{"items": [...], "n": 10}}; got {_kind(body)}')
        if other := sorted(set(body) - {"items", "n"}):
            raise HTTPException(400, f'unknown field "{other[0]}"; there are "items" and "n"')
        items, n = body.get("items"), body.get("n", 10)
        if not isinstance(items, list):
            raise HTTPException(400, f'"items" must be a list of item ids; got {_kind(items)}')
        if len(items) > self.limits.items:
            raise HTTPException(413, f'"items" may have {self.limits.items} ids; got {len(items)}')
        wrong = next((item for item in items if isinstance(item, bool) or not isinstance(item, (int, str))), None)
        if wrong is not None or None in items:
            raise HTTPException(400, f"an item id must be a whole number or a text; got {_kind(wrong)}")
        if isinstance(n, bool) or not isinstance(n, int) or not 1 <= n <= self.limits.n:
            raise HTTPException(400, f'"n" must be a whole number from 1 to {self.limits.n}; got {json.dumps(n)[:40]}')
        known = {self.index[str(item)] for item in items if str(item) in self.index}
        unknown = list(dict.fromkeys(item for item in items if str(item) not in self.index))
        return np.array(sorted(known), np.int64), unknown, n

    async def health(self, request: Request) -> Response:
        """GET /health."""
        config = self.model.config
        return _Json(
            {
                "status": "ok",
                "n_items": self.model.n_items,
                "recommender": config.recommender,
                "steps": config.steps,
                "device": str(self.model.device),
                "backend": backends.resolve(self.model.device, self.model.backend),
            }
        )

    async def metrics(self, request: Request) -> Response:
        """GET /metrics."""
        lines = ["# HELP cfsfl_responses_total Answers by status.", "# TYPE cfsfl_responses_total counter"]
        lines += [f'cfsfl_responses_total{{status="{s}"}} {n}' for s, n in sorted(self.responses.items())]
        lines += [*self.seconds.lines(), *self.users.lines()]
        lines += ["# HELP cfsfl_model_seconds_total Seconds that the model computed."]
        lines += ["# TYPE cfsfl_model_seconds_total counter", f"cfsfl_model_seconds_total {self.model_seconds}"]
        lines += ["# HELP cfsfl_waiting Requests that wait for the model.", "# TYPE cfsfl_waiting gauge"]
        lines += [f"cfsfl_waiting {self.waiting.qsize()}"]
        return PlainTextResponse("\n".join(lines) + "\n", media_type="text/plain; version=0.0.4")

    async def _refused(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        self.responses[error.status_code] += 1
        return _Json({"error": error.detail}, error.status_code, error.headers)


def _kind(value: Any) -> str:
    """What a JSON value is, for a message."""
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "nothing"}
    return names.get(type(value), f"{value}"[:40])
