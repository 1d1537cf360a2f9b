"""Recommending: the T = 8 loop to the 100 best items, all users of real data against exact searches, and memory."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from conftest import ROOT, Report, captured, race
from eager import EagerCFSFL
from problems import CONFIG, ITEMS, SHAPES, B, T, batch, dense, model, ones, variants

from cfsfl_fast import CFSFL, backends, ops
from cfsfl_fast.datasets import open_dataset
from cfsfl_fast.interactions import Interactions, as_interactions
from cfsfl_fast.training import Noise, recommender_step, view
from cfsfl_fast.updates import Optimisers, update

N = 100


def baseline(made: CFSFL, x: Interactions) -> Callable[[], torch.Tensor]:
    """The N best items by hand."""
    eager = EagerCFSFL(made).to(made.device).eval()
    lowest = torch.full((len(x.items),), float("-inf"), device=made.device)

    @torch.no_grad()
    def by_hand() -> torch.Tensor:
        scores = eager(dense(x, ones(x)), dense(x, x.unit_weights()))[0]
        return scores.index_put_((x.rows, x.items), lowest).topk(N, dim=1).indices

    return by_hand


def test_the_loop_to_a_list_on_a_gpu(gpu_users: int, gpu_shape: str, report: Report, device: torch.device) -> None:
    n_items, n_users = ITEMS[gpu_shape], gpu_users
    made = model(n_items, "trained", device).eval()
    x = batch(n_items, 0, n_users, device)[0].seen
    by_hand = baseline(made, x)
    rivals: dict[str, Callable[[], Any]] = {"eager": by_hand, "eager, one graph": captured(by_hand)}
    expected = by_hand()
    for name, variant in variants(made).items():
        found = variant.recommend(x, N, batch_size=n_users)[0]
        shared = (found[:, :, None] == expected[:, None, :]).any(2).double().mean()
        assert float(shared) > (0.99 if name == "fp32" else 0.9), f"{name}: {shared} of the items"
        rivals[name] = lambda m=variant: m.recommend(x, N, batch_size=n_users)
    flops = 2 * (T + 1) * n_users * n_items * made.config.hidden_dim
    report(f"recommend {N}, trained, M={n_items} B={n_users} T={T}", race(rivals), "eager", flops=flops, users=n_users)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_loop_to_a_list(shape: str, implementations: list[str], report: Report, device: torch.device) -> None:
    if device.type != "cpu":
        pytest.skip("of the CPU; test_the_loop_to_a_list_on_a_gpu is the other")
    made = model(SHAPES[shape], "trained").eval()
    x = batch(SHAPES[shape])[0].seen
    by_hand = baseline(made, x)

    def ours(backend: str) -> torch.Tensor:
        with backends.use_backend(backend):
            return made.recommend(x, N)[0]

    expected = by_hand().sort(1).values
    for backend in implementations:  # near-ties may change places in another order of summation
        assert float((ours(backend).sort(1).values == expected).all(1).double().mean()) > 0.95, backend
    times = race({"eager": by_hand, **{b: lambda b=b: ours(b) for b in implementations}})
    report(f"recommend {N}, trained, M={SHAPES[shape]} B={B} T={T}", times, "eager")


@pytest.mark.parametrize("name", ["ml-1m", "gowalla"])
def test_all_users_against_exact_searches(name: str, report: Report, device: torch.device) -> None:
    """The 100 best of given vectors for every training user, seen items left out."""
    if device.type != "cpu":
        pytest.skip("of the CPU")
    folder = Path(os.environ.get("CFSFL_DATA", ROOT.parent / "shared" / "data"))
    if not (folder / f"{name}.npz").exists():
        pytest.skip(f"{name}.npz is not here; CFSFL_DATA names the folder that has it")
    data = open_dataset(folder / f"{name}.npz")
    x = as_interactions(data.train, data.n_items)
    u, output = _vectors(x)
    weight, bias = output.weight.detach(), output.bias.detach()
    blocks = torch.arange(len(x)).split(512)

    def ours() -> torch.Tensor:
        return torch.cat([ops.linear_topk(u[some], output, N, x.take(some).csr)[0] for some in blocks])

    def by_library() -> torch.Tensor:
        found = []
        for some in blocks:
            seen, scores = x.take(some), torch.addmm(bias, u[some], weight.T)
            scores[seen.rows, seen.items] = float("-inf")
            found.append(scores.topk(N, dim=1).indices)
        return torch.cat(found)

    rivals: dict[str, Callable[[], Any]] = {"torch mm + topk": by_library, "cfsfl_fast": ours}
    # A last column of ones carries the bias into libraries that have none.
    users = torch.cat([u, torch.ones(len(u), 1)], 1).numpy()
    items = torch.cat([weight, bias[:, None]], 1).numpy()
    if importlib.util.find_spec("implicit"):
        from implicit.cpu.topk import topk

        seen = sp.csr_matrix(data.train)
        threads = torch.get_num_threads()
        rivals["implicit"] = lambda: topk(items, users, N, filter_query_items=seen, num_threads=threads)
    if importlib.util.find_spec("faiss"):
        import faiss

        index = faiss.IndexFlatIP(items.shape[1])
        index.add(items)
        longer = min(data.n_items, N + int(x.counts.max()))

        def search() -> np.ndarray:
            """It cannot leave items out: a longer list is searched, then filtered."""
            found = []
            for some in blocks:
                ids = index.search(users[some], longer)[1]
                mine = x.take(some)
                shut = np.zeros((len(some), data.n_items), dtype=bool)
                shut[mine.rows, mine.items] = True
                kept = ~np.take_along_axis(shut, ids, 1)
                order = np.argsort(~kept, axis=1, kind="stable")[:, :N]
                found.append(np.take_along_axis(ids, order, 1))
            return np.concatenate(found)

        rivals["faiss"] = search
    expected = by_library()
    assert float((ours() == expected).double().mean()) > 0.99
    report(f"top {N} of all {len(x)} users of {name}, M={data.n_items}", race(rivals, rounds=2), "torch mm + topk")


def _vectors(x: Any) -> tuple[torch.Tensor, ops.Table]:
    """Codes of all users and the output layer, after a few updates."""
    torch.manual_seed(0)
    made = CFSFL.from_config(x.n_items, CONFIG)
    optimisers = Optimisers(made, "recommender")
    assert optimisers.main is not None
    for number in range(20):
        users = torch.arange(number * B, (number + 1) * B) % len(x)
        data, eps = view(x.take(users), users, CONFIG, number), Noise(users, 200, False, (number,))
        update(optimisers.main, recommender_step(made, data, eps, number))
    with torch.no_grad():
        u = made.recommender(made.recommender.hoist(*x.csr, x.unit_weights())).u
        return u, made.output_table()


PROGRAM = """
import sys, torch
from cfsfl_fast import CFSFL
from cfsfl_fast.datasets import synthetic
from cfsfl_fast.interactions import Interactions, as_interactions
M = int(sys.argv[1])
x = as_interactions(synthetic(500, M, events_per_user=80.0, seed=0), M)
torch.manual_seed(0)
model = CFSFL(M, steps=8, top_k=50).eval()
torch.nn.init.normal_(model.recommender.input.feedback)
model.recommend(x.take(torch.arange(32)), 100)
def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) / 1024
def now():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmRSS")).split()[1]) / 1024
open("/proc/self/clear_refs", "w").write("5")
before = now()
model.recommend(x, 100)
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads peak memory from Linux's /proc")
def test_memory_does_not_grow_with_the_catalogue(report: Report, device: torch.device) -> None:
    """Peak resident memory of a T = 8 recommend beyond what the process held before it."""
    if device.type != "cpu":
        pytest.skip("of the CPU")
    used = {}
    for n_items in (20108, 41140, 82280):
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, str(n_items)],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=True,
        )
        used[n_items] = round(float(done.stdout), 1)
    assert used[82280] < used[20108] + 20
    report(f"peak megabytes of recommend beyond parameters, B={B} T={T}", {}, megabytes=used)
