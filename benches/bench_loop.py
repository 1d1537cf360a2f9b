"""T = 8 inference to the full scores [B, M], against the eager baseline, in one interleaved run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import Report, race
from eager import EagerCFSFL
from problems import SHAPES, B, T, batch, dense, model

from cfsfl_fast import backends


@pytest.mark.parametrize("kind", ["trained", "drifting"])
@pytest.mark.parametrize("shape", SHAPES)
def test_inference(shape: str, kind: str, implementations: list[str], report: Report) -> None:
    made = model(SHAPES[shape], kind).eval()
    eager = EagerCFSFL(made).eval()
    x = batch(SHAPES[shape])[0].seen

    @torch.no_grad()
    def by_hand(network: Callable[..., Any] = eager) -> torch.Tensor:
        return network(dense(x, torch.ones(len(x.items))), dense(x, x.unit_weights()))[0]

    @torch.no_grad()
    def ours(backend: str) -> torch.Tensor:
        with backends.use_backend(backend):
            return made(x)

    expected = by_hand()
    for backend in implementations:
        # A near-tie at the end of a list may fall the other way in another order of summation; then that user drifts.
        close = torch.isclose(ours(backend), expected, atol=1e-4).all(1)
        assert float(close.double().mean()) > (0.99 if kind == "trained" else 0.9), backend
    with torch.no_grad():
        trace = made.unroll(x)
    repeats = (trace.ids[1:] == trace.ids[:-1]).all(2).double().mean(1)
    rivals = {"eager": by_hand, **{b: lambda b=b: ours(b) for b in implementations}}
    if (shape, kind) == ("ml-20m", "trained"):  # a minute to compile: once is enough
        compiled = torch.compile(eager)
        rivals["torch.compile"] = lambda: by_hand(compiled)
    times = race(rivals)
    repeated = [round(float(r), 3) for r in repeats]
    report(f"inference, {kind}, M={SHAPES[shape]} B={B} T={T}", times, "eager", lists_repeated=repeated)
