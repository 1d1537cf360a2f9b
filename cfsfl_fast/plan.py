"""What training will take, before anything is allocated: memory by part, messages and time of an update.

Tables and layers are those of a model on the meta device, so their sizes are exact for every recommender; the rest are
formulas of SPEC's letters, which tests/test_plan.py holds against measured memory. G devices, of which each S share the
rows of every item table (`item_shards`) and G / S share a batch: B = batch_size S / G users a device.

Memory    of the stage that takes most, the joint one where there is one.
          tables + layers       4 bytes an entry, 2 of input and output tables with `table_dtype="bf16"`; tables / S
          moments               Adam's two, of everything that is trained; of the lookup table, two optimisers'. With
                                `table_updates="rows"` a CPU only has those of rows that were ever touched
          gradients             one of everything, and a second of the output layer: of listed rows, and of the softmax;
                                by rows, of the rows that an update looks up
          scores                B M / S, but not more than `library.CHUNK_SCORES`; of drawn items, B n thrice
          codes                 (T + 1) passes of B rows: what the backward pass of the small layers needs
          lists                 T B K ids, scores and weights, and their gradients sorted by item
          histories             40 bytes a user and 4 an event, none where training reads them in a mapped file
          process               PyTorch itself
          with feedback="scores": item memory, 4 M^2 bytes, 12 M^2 while it is inverted in float64; folds, a
                                recommender for each; evidence, a list of T K items against every item of B histories
Messages  an all-reduce of n bytes among P devices sends and receives 2 n (P - 1) / P on each; an all-gather n (P - 1).
Time      products at the device's rate, Adam and the tables at its memory's, messages at the link's, one after another.
Scaling   efficiency of G devices = n t(1) / (G t(G)), t(1) an update of `batch_size` users on one device, whether it
          could hold the model or not, and t(G) one of n times as many; n = 1 for a batch that devices share.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from cfsfl_fast import library
from cfsfl_fast.config import CFSFLConfig
from cfsfl_fast.item_item import ridge_inverse_bytes
from cfsfl_fast.model import CFSFL, ITEM_TABLES

PROCESS = 400e6
"""Bytes that Python and PyTorch take on a CPU; a CUDA context takes about twice that on its device."""

_CERTAIN = ("tables", "layers", "moments", "gradients", "histories", "item memory", "folds")

MOST_DEVICES = 64
"""Of `scaling`."""

ADAM_BYTES = 28
"""Adam reads a weight, its gradient and two moments, and writes all but the gradient: float32."""


@dataclass(frozen=True)
class Plan:
    """What each device needs.

    Attributes:
        memory: bytes by part.
        messages: bytes that a device sends in an update, by purpose.
        flops: floating-point operations of an update's products over the catalogue, each list a full product.
        traffic: bytes that an update of the optimiser moves in the device's memory.
    """

    n_items: int
    n_users: int
    config: CFSFLConfig
    devices: int
    item_shards: int
    memory: dict[str, float]
    messages: dict[str, float]
    flops: float
    traffic: float

    @property
    def total(self) -> float:
        """Bytes in all."""
        return sum(self.memory.values())

    def seconds(self, rate: float, bandwidth: float, link: float | None = None) -> dict[str, float]:
        """Time of an update by what bounds it.

        Args:
            rate: of products, flop/s. bandwidth: of memory, bytes/s. link: between devices, bytes/s; None leaves the
                messages out.
        """
        found = {"products": self.flops / rate, "optimiser": self.traffic / bandwidth}
        if link is not None:
            found["messages"] = sum(self.messages.values()) / link
        return found

    def check(self, free: float) -> None:
        """Refuses what cannot fit: weights, moments, gradients and histories of more than `free` bytes.

        Raises:
            ValueError: naming the parts.
        """
        needed = {name: size for name, size in self.memory.items() if name in _CERTAIN}
        if sum(needed.values()) <= free:
            return
        parts = ", ".join(f"{name} {size_text(size)}" for name, size in needed.items())
        raise ValueError(
            f"training on {self.n_items:,} items needs {size_text(sum(needed.values()))} on each of {self.devices} "
            f"device(s), which has {size_text(free)} free: {parts}. `cfsfl plan` shows what other choices take"
        )

    def __str__(self) -> str:
        config = self.config
        shared = f", tables in {self.item_shards} parts" if self.item_shards > 1 else ""
        lines = [
            f"{self.n_items:,} items, {self.n_users:,} users, {self.devices} device(s){shared}; {config.recommender}, "
            f"T = {config.steps}, K = {config.top_k}, batch {config.batch_size}",
            "",
            "memory of a device",
            *(f"  {name:<12}{size_text(size):>12}" for name, size in self.memory.items()),
            f"  {'in all':<12}{size_text(self.total):>12}",
            "",
            "an update of the joint stage" if config.has_joint_stage else "an update",
            f"  {'products':<12}{self.flops / 1e9:>9,.1f} GFLOP",
            f"  {'optimiser':<12}{size_text(self.traffic):>12}",
            *(f"  {name:<12}{size_text(size):>12} sent" for name, size in self.messages.items()),
        ]
        return "\n".join(lines)


def plan(
    n_items: int,
    n_users: int,
    config: CFSFLConfig,
    *,
    events_per_user: float = 100.0,
    devices: int = 1,
    item_shards: int = 1,
    mapped: bool = False,
) -> Plan:
    """What training takes on each of some devices. Nothing of the model's size is allocated.

    Args:
        n_items, n_users: M, and the training users.
        config: every choice.
        events_per_user: items of a user on average.
        devices: G.
        item_shards: S, devices that share the rows of every item table; divides G.
        mapped: training reads the events where they lie, in a file.

    Raises:
        ValueError: a size is below 1, item_shards does not divide devices, or the recommender cannot be shared.
    """
    for name, size in (("items", n_items), ("users", n_users), ("devices", devices), ("item_shards", item_shards)):
        if size < 1:
            raise ValueError(f"{name} must be at least 1; got {size}")
    if devices % item_shards:
        raise ValueError(f"item_shards must divide the devices; got {item_shards} and {devices}")
    if not events_per_user >= 0:
        raise ValueError(f"events_per_user must be at least 0; got {events_per_user}")
    config = config.resolved(n_users)
    assert isinstance(config.batch_size, int)
    with torch.device("meta"):
        model = CFSFL.from_config(n_items, config)
    model.recommender.check_processes(devices)
    weights = dict(model.named_parameters())
    replicas = devices // item_shards
    B, rows = -(-config.batch_size // replicas), -(-n_items // item_shards)
    joint, by_rows, sampled = config.has_joint_stage, config.table_updates == "rows", config.softmax == "sampled"
    T, K, D = config.steps if joint else 0, min(config.top_k, n_items), config.lookup_dim

    def entries(prefix: str) -> float:
        """Entries of the weights of a name, on one device."""
        return sum(
            w.numel() / (item_shards if name in ITEM_TABLES else 1)
            for name, w in weights.items()
            if name.startswith(prefix)
        )

    # How many entries of each table an update moves, on one device.
    seen, listed = B * events_per_user / item_shards, T * B * K / item_shards
    drawn = (config.negatives / item_shards + seen) if sampled else rows
    looked_up = {"recommender.input.weight": seen, "lookup.weight": seen + listed}
    looked_up["recommender.output.weight"] = listed + drawn
    tables = {name: entries(name) for name in ITEM_TABLES}
    moved = dict(tables)
    for name, n in looked_up.items():
        if by_rows and (sampled or name != "recommender.output.weight"):
            moved[name] = min(rows, n) * weights[name].shape[1]

    theta, lookup = entries("recommender."), tables["lookup.weight"]
    psi = entries("feedback.") + lookup if joint else 0.0
    phi = entries("reward.") + lookup if joint and config.uses_reward else 0.0
    unmoved = sum(tables.values()) - sum(moved.values())
    idle = tables["lookup.weight"] - moved["lookup.weight"]
    gradients = theta + psi - unmoved + (0 if joint else idle)
    of_reward = phi - idle if phi else 0.0
    whole_output = joint and moved["recommender.output.weight"] == tables["recommender.output.weight"]
    width = weights["recommender.output.weight"].shape[1]
    layers = sum(sum(w.shape) for name, w in weights.items() if w.dim() == 2 and name not in ITEM_TABLES)
    scores = 0 if sampled and not joint else min(B * rows, max(library.CHUNK_SCORES, B))
    memory = {
        "tables": sum(n * weights[name].element_size() for name, n in tables.items()),
        "layers": 4 * (entries("") - sum(tables.values())),
        "moments": 8 * (theta + psi + phi),
        "gradients": 4 * (gradients + (tables["recommender.output.weight"] if whole_output else 0)),
        "scores": 4 * scores + (24 * B * config.negatives if sampled else 0),
        "codes": 4 * B * (T + 1) * layers,
        "lists": T * B * K * (8 + 4 + 4 + 8 + 8 + 4),
        "histories": n_users * (40 + (0 if mapped else 4 * events_per_user)),
        "process": PROCESS,
    }
    if config.judges_items:
        memory["item memory"] = ridge_inverse_bytes(n_users, n_items, n_users * events_per_user)
        memory["folds"] = 4 * config.folds * theta
        memory["evidence"] = 20 * B * events_per_user * min(max(config.steps, 1) * config.top_k, n_items)
    history = B * (width + D)
    turns = T * (3 * B * K + B * D + B * (width + K))  # candidates gathered; h summed; back: the code's part, and dw
    last = B * (3 + width) + (3 * B * K if joint else 0)
    whole = {name: n for name, n in moved.items() if n == tables[name]}
    sparse = sum(moved.values()) - sum(whole.values())
    messages = {
        "gradients": _reduced(4 * (gradients + of_reward - sparse), replicas) + 4 * sparse * (replicas - 1),
        "lists, codes": 4 * (_reduced(history + last, item_shards) + _reduced(turns, item_shards)),
    }
    product = 2 * B * rows * width
    if sampled:
        flops = product * ((T + 1) if joint else 0) + 6 * B * config.negatives * width
    else:
        flops = product * (T + 3) + (product if B * rows > library.CHUNK_SCORES else 0)
    traffic = (ADAM_BYTES + 8) * (gradients + of_reward)
    return Plan(n_items, n_users, config, devices, item_shards, memory, messages, flops, traffic)


class Scaled(NamedTuple):
    """What a number of devices comes to.

    Attributes:
        devices, item_shards: G and S.
        shared: the plan for a batch that they share.
        same_batch, grown_batch: efficiencies, of that batch and of one that is G / S times as large.
    """

    devices: int
    item_shards: int
    shared: Plan
    same_batch: float
    grown_batch: float


def scaling(
    n_items: int, n_users: int, config: CFSFLConfig, rate: float, bandwidth: float, link: float, **more: Any
) -> list[Scaled]:
    """Plans for 1, 2, 4 to MOST_DEVICES devices, which share users alone, or item tables alone.

    Args:
        n_items, n_users, config: as in `plan`.
        rate, bandwidth, link: as in `Plan.seconds`.
        **more: events_per_user.
    """
    config = config.resolved(n_users)
    assert isinstance(config.batch_size, int)

    def time_of(planned: Plan) -> float:
        return sum(planned.seconds(rate, bandwidth, link).values())

    alone = time_of(plan(n_items, n_users, config, **more))
    found = []
    devices = 1
    while devices <= MOST_DEVICES:
        for shards in dict.fromkeys((1, devices)):
            replicas, layout = devices // shards, {"devices": devices, "item_shards": shards, **more}
            grown = dataclasses.replace(config, batch_size=config.batch_size * replicas)
            shared = plan(n_items, n_users, config, **layout)
            same = alone / (devices * time_of(shared))
            larger = alone * replicas / (devices * time_of(plan(n_items, n_users, grown, **layout)))
            found.append(Scaled(devices, shards, shared, same, larger))
        devices *= 2
    return found


def _reduced(size: float, n: int) -> float:
    return 2 * size * (n - 1) / n


def size_text(n: float) -> str:
    """A number of bytes with its unit."""
    for unit in ("B", "kB", "MB", "GB"):
        if n < 1000:
            return f"{n:,.3g} {unit}" if n < 100 else f"{n:,.0f} {unit}"
        n /= 1000
    return f"{n:,.1f} TB"


def measured_rates(device: torch.device) -> tuple[float, float]:
    """This device's rate of float32 products in flop/s, and of copying in bytes/s, read and written."""
    n = 1024
    x, y = torch.rand(n, n, device=device), torch.rand(n, n, device=device)
    source = torch.rand(1 << 24, device=device)
    target = torch.empty_like(source)
    product = _fastest(lambda: torch.mm(x, y), device)
    copy = _fastest(lambda: target.copy_(source), device)
    return 2 * n**3 / product, 8 * source.numel() / copy


def _fastest(act: Callable[[], object], device: torch.device) -> float:
    best = float("inf")
    for _ in range(8):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        act()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - began)
    return best
