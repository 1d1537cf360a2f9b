"""What the loop's benches run on: the paper's shapes, batches of synthetic users, trained and drifting models."""

from __future__ import annotations

import copy
import dataclasses
import functools

import torch

from cfsfl_fast import CFSFL, CFSFLConfig
from cfsfl_fast.datasets import synthetic
from cfsfl_fast.graphs import Graphs
from cfsfl_fast.interactions import Interactions, as_interactions
from cfsfl_fast.training import Noise, View, joint_step, recommender_step, view
from cfsfl_fast.updates import Optimisers, update

SHAPES = {"ml-1m": 3706, "ml-20m": 20108, "msd": 41140}
"""Items of the paper's data sets, and of MovieLens-1M."""

ITEMS = {**SHAPES, "tiny": 300}
"""Also of a rehearsal."""

B, T, K = 500, 8, 50

CONFIG = CFSFLConfig(
    steps=T, top_k=K, reading="full", mask_kept=False, kl="annealed", anneal_steps=1, batch_size=B, patience=0
)
"""The paper's reading, which the eager baseline states too; noise shared by the steps of an update."""


@functools.cache
def histories(n_items: int) -> Interactions:
    """Users of a long-tailed synthetic set, about 70 items each."""
    return as_interactions(synthetic(8 * B, n_items, events_per_user=80.0, seed=0), n_items)


def batch(n_items: int, number: int = 0, n_users: int = B, device: torch.device | str = "cpu") -> tuple[View, Noise]:
    """Some of the users, with the dropout and noise of an update."""
    users = torch.arange(number * n_users, (number + 1) * n_users) % len(histories(n_items))
    rows, users = histories(n_items).take(users).to(device), users.to(device)
    return view(rows, users, CONFIG, number), Noise(users, 200, False, (number,))


@functools.cache
def model(n_items: int, kind: str, device: torch.device | str = "cpu") -> CFSFL:
    """A model whose loop settles ("trained": a few epochs of Algorithm 1) or does not ("drifting": random feedback)."""
    torch.manual_seed(0)
    tiny = n_items == ITEMS["tiny"]
    made = CFSFL.from_config(n_items, dataclasses.replace(CONFIG, hidden_dim=48) if tiny else CONFIG).to(device)
    optimisers = Optimisers(made, "recommender")
    assert optimisers.main is not None
    for number in range(4 if tiny else 40):
        data, eps = batch(n_items, number, device=device)
        update(optimisers.main, recommender_step(made, data, eps, number))
    if kind == "drifting":
        torch.nn.init.normal_(made.recommender.input.feedback, std=0.5)
        torch.nn.init.normal_(made.lookup.weight)
        return made
    optimisers = Optimisers(made, "joint")
    assert optimisers.main is not None
    for number in range(2 if tiny else 12):
        data, eps = batch(n_items, number, device=device)
        update(optimisers.main, joint_step(made, data, eps, number)[0])
    return made


def ones(x: Interactions) -> torch.Tensor:
    """The entries of binary histories. [E]"""
    return torch.ones(len(x.items), device=x.items.device)


def variants(made: CFSFL) -> dict[str, CFSFL]:
    """Copies of a model for a CUDA device, by what they run with; of a CPU, for a rehearsal, those that it can run."""
    on_cuda = made.device.type == "cuda"
    found = {}
    for name, precision, graphs in (
        ("fp32", "fp32", True),
        ("tf32", "tf32", True),
        ("bf16", "bf16", True),
        ("bf16, no graph", "bf16", False),
    ):
        if on_cuda or precision != "tf32":
            found[name] = copy.deepcopy(made)
            found[name].precision, found[name].graphs = precision, Graphs(graphs)
    return found


def dense(x: Interactions, values: torch.Tensor) -> torch.Tensor:
    """Histories as the eager baseline takes them. [B, M]"""
    rows = torch.zeros(len(x), x.n_items, device=values.device)
    return rows.index_put_((x.rows, x.items), values)
