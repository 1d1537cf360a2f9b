"""T = 8 inference to the full scores [B, M], against the eager baseline, in one interleaved run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import Report, captured, race
from eager import EagerCFSFL
from problems import ITEMS, SHAPES, B, T, batch, dense, model, ones, variants

from cfsfl_fast import CFSFL, backends
from cfsfl_fast.interactions import Interactions


class Problem:
    """A model by hand and by the library, and a batch of histories."""

    def __init__(self, shape: str, kind: str, n_users: int, device: torch.device) -> None:
        self.made = model(ITEMS[shape], kind, device).eval()
        self.eager = EagerCFSFL(self.made).to(device).eval()
        self.x: Interactions = batch(ITEMS[shape], 0, n_users, device)[0].seen
        self.flops = 2 * (T + 1) * n_users * ITEMS[shape] * self.made.config.hidden_dim

    @torch.no_grad()
    def by_hand(self, network: Callable[..., Any] | None = None) -> torch.Tensor:
        """The baseline's scores."""
        run = self.eager if network is None else network  # a compiled network is neither true nor false
        return run(dense(self.x, ones(self.x)), dense(self.x, self.x.unit_weights()))[0]

    @torch.no_grad()
    def ours(self, made: CFSFL, backend: str = "auto") -> torch.Tensor:
        """The library's."""
        with backends.use_backend(backend):
            return made(self.x)

    def repeats(self) -> list[float]:
        """Share of users whose list is the one before, per step."""
        with torch.no_grad():
            trace = self.made.unroll(self.x)
        shares = (trace.ids[1:] == trace.ids[:-1]).all(2).double().mean(1)
        return [round(float(share), 3) for share in shares]


def close(found: torch.Tensor, expected: torch.Tensor, atol: float) -> float:
    """Share of users whose scores agree. A near-tie at the end of a list may fall the other way in another order of
    summation; then that user drifts.
    """
    return float(torch.isclose(found, expected, atol=atol).all(1).double().mean())


@pytest.mark.parametrize("kind", ["trained", "drifting"])
@pytest.mark.parametrize("shape", SHAPES)
def test_inference(
    shape: str, kind: str, implementations: list[str], compiles: bool, report: Report, device: torch.device
) -> None:
    if device.type != "cpu":
        pytest.skip("of the CPU; test_inference_on_a_gpu is the other")
    p = Problem(shape, kind, B, device)
    expected = p.by_hand()
    for backend in implementations:
        assert close(p.ours(p.made, backend), expected, 1e-4) > (0.99 if kind == "trained" else 0.9), backend
    rivals = {"eager": p.by_hand, **{b: lambda b=b: p.ours(p.made, b) for b in implementations}}
    if compiles and (shape, kind) == ("ml-20m", "trained"):  # a minute to compile: once is enough
        compiled = torch.compile(p.eager)
        rivals["torch.compile"] = lambda: p.by_hand(compiled)
    times = race(rivals)
    report(f"inference, {kind}, M={SHAPES[shape]} B={B} T={T}", times, "eager", lists_repeated=p.repeats())


def on_gpu(
    p: Problem, rivals: dict[str, Callable[[], Any]], report: Report, what: str, only: tuple[str, ...] = ()
) -> None:
    """Checks, then times the rivals and the variants of the library's model, or only some of them. What is wrong or
    fails has no figure, and does not take the others theirs.
    """
    expected, made = p.by_hand(), {name: m for name, m in variants(p.made).items() if not only or name in only}
    wrong = {}
    for name, m in made.items():
        atol, least = {"fp32": (1e-3, 0.97), "tf32": (0.05, 0.8), "bf16": (0.5, 0.8)}[m.precision]
        try:
            share = close(p.ours(m), expected, atol)
        except Exception as error:
            wrong[name] = repr(error)
            continue
        if share <= least:
            wrong[name] = f"{share:.3f} of the users within {atol}"
    rivals |= {name: lambda m=m: p.ours(m) for name, m in made.items() if name not in wrong}
    times = race(rivals)
    if p.made.device.type == "cuda":
        graphs = {name: made[name].graphs for name in made if name not in wrong}
        wrong |= {name: "not replayed" for name, g in graphs.items() if g.mode and not g.replays}
    n_users = len(p.x)
    case = f"{what}, trained, M={p.x.n_items} B={n_users} T={T}"
    report(case, times, "eager", flops=p.flops, users=n_users, lists_repeated=p.repeats())
    assert not wrong, wrong


def test_inference_on_a_gpu(gpu_users: int, gpu_shape: str, report: Report, device: torch.device) -> None:
    p = Problem(gpu_shape, "trained", gpu_users, device)
    rivals: dict[str, Callable[[], Any]] = {"eager": p.by_hand, "eager, one graph": captured(p.by_hand)}
    on_gpu(p, rivals, report, "inference")


def test_inference_compiled_on_a_gpu(
    compiles: bool, gpu_users: int, gpu_shape: str, report: Report, device: torch.device
) -> None:
    if not compiles:
        pytest.skip("needs --compile")
    p = Problem(gpu_shape, "trained", gpu_users, device)
    network = torch.compile(p.eager, mode="max-autotune")
    rivals: dict[str, Callable[[], Any]] = {"eager": p.by_hand, "max-autotune": lambda: p.by_hand(network)}
    on_gpu(p, rivals, report, "inference beside torch.compile", ("fp32", "bf16"))
