"""One update of stage 1 and one of stage 3 (forward, backward, Adam) against the eager baseline, interleaved."""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Report, captured, race
from eager import EagerCFSFL, joint_loss
from problems import CONFIG, ITEMS, SHAPES, B, T, batch, dense, histories, model, ones, variants

from cfsfl_fast import backends
from cfsfl_fast.datasets import open_dataset
from cfsfl_fast.graphs import capacity
from cfsfl_fast.interactions import as_interactions
from cfsfl_fast.training import Noise, joint_step, recommender_step, view
from cfsfl_fast.updates import Optimisers, Updates, update


class Twins:
    """The same model, batch and update, by hand and by the library."""

    def __init__(self, made, data, eps, stage: str, implementations: list[str]) -> None:
        self.data, self.eps, self.stage = data, eps, stage
        self.eager = EagerCFSFL(made).to(made.device)
        self.eager.steps = T if stage == "joint" else 0
        self.compiled = torch.compile(joint_loss, **({"mode": "max-autotune"} if made.device.type == "cuda" else {}))
        on_cuda = made.device.type == "cuda"
        self.adam = torch.optim.Adam(self.eager.parameters(), lr=1e-5, fused=on_cuda, capturable=on_cuda)
        self.models = {backend: copy.deepcopy(made).train() for backend in implementations}
        self.optimisers = {backend: Optimisers(m, stage) for backend, m in self.models.items()}

    def by_hand(self, loss_of: Callable[..., torch.Tensor] = joint_loss) -> torch.Tensor:
        """One update of the baseline; its loss."""
        x = self.data.seen
        weight = CONFIG.reward_weight if self.stage == "joint" else 0.0
        rows, shown = dense(x, ones(x)), dense(self.data.encoded, self.data.weights)
        self.adam.zero_grad()
        loss = loss_of(self.eager, rows, shown, self.eps(0), float(CONFIG.kl_cap), weight)
        loss.backward()
        self.adam.step()
        return loss.detach()

    def ours(self, backend: str) -> torch.Tensor:
        """One update of the library's model; its loss."""
        step = joint_step if self.stage == "joint" else recommender_step
        with backends.use_backend(backend), backends.flushed_denormals():
            loss = step(self.models[backend], self.data, self.eps, 1)
            loss = loss[0] if isinstance(loss, tuple) else loss
            update(self.optimisers[backend].main, loss)
        torch.set_flush_denormal(True)  # for the baseline too
        return loss.detach()


@pytest.mark.parametrize("stage", ["recommender", "joint"])
@pytest.mark.parametrize("shape", SHAPES)
def test_update(
    shape: str, stage: str, implementations: list[str], compiles: bool, report: Report, device: torch.device
) -> None:
    if device.type != "cpu":
        pytest.skip("of the CPU; test_update_on_a_gpu is the other")
    twins = Twins(model(SHAPES[shape], "trained"), *batch(SHAPES[shape]), stage, implementations)
    expected = twins.by_hand()
    for backend in implementations:
        assert float(twins.ours(backend)) == pytest.approx(float(expected), rel=1e-4), backend
    rivals = {"eager": twins.by_hand, **{b: lambda b=b: twins.ours(b) for b in implementations}}
    if compiles and (shape, stage) == ("ml-20m", "joint"):  # minutes to compile: once is enough
        rivals["torch.compile"] = lambda: twins.by_hand(twins.compiled)
    times = race(rivals)
    report(f"update of stage {1 if stage == 'recommender' else 3}, M={SHAPES[shape]} B={B} T={T}", times, "eager")


class OnAGpu(Twins):
    """The library's update takes user numbers: it assembles its batch, and stage 3's also moves the reward estimator,
    which the baseline leaves alone.
    """

    def __init__(self, shape: str, n_users: int, stage: str, device: torch.device) -> None:
        self.n_items, self.n_users = ITEMS[shape], n_users
        made = model(self.n_items, "trained", device)
        made.config = dataclasses.replace(made.config, batch_size=n_users)
        super().__init__(made, *batch(self.n_items, 0, n_users, device), stage, [])
        x = histories(self.n_items).to(device)
        self.users = (torch.arange(n_users) % len(x)).to(device)
        self.updates = {}
        for name, variant in variants(made).items():
            updates = self.updates[name] = Updates(variant.train(), x, Optimisers(variant, stage), stage)
            room = int(x.host_counts[self.users.cpu()].sum())
            updates.begin(1, (0,), capacity(room) if updates.fixed else None)

    def race(self, rivals: dict[str, Callable[[], Any]], report: Report, what: str, only: tuple[str, ...] = ()) -> None:
        """Checks, then times the rivals and the library's variants, or only some of them. What is wrong or fails has no
        figure, and does not take the others theirs.
        """
        first, wrong = float(self.by_hand()), {}
        for name, updates in self.updates.items():
            if only and name not in only:
                continue
            try:
                updates(self.users, self.users)
                loss = float(updates.last[0])
            except Exception as error:
                wrong[name] = repr(error)
                continue
            # The baseline's KL weight is at its cap, and dropout has another key: the same loss up to these.
            if loss == pytest.approx(first, rel=0.1):
                rivals[name] = lambda updates=updates: updates(self.users, self.users)
            else:
                wrong[name] = f"a loss of {loss}, not {first}"
        times = race({"eager": self.by_hand, **rivals})
        if self.users.is_cuda:
            graphs = {name: self.updates[name].graphs for name in rivals if name in self.updates}
            wrong |= {name: "not replayed" for name, g in graphs.items() if g.mode and not g.replays}
        passes = (T + 1 if self.stage == "joint" else 1) + 2  # the dense backward is two products
        flops = 2 * passes * self.n_users * self.n_items * self.eager.output.in_features
        case = f"{what} of stage {1 if self.stage == 'recommender' else 3}, M={self.n_items} B={self.n_users} T={T}"
        report(case, times, "eager", flops=flops, users=self.n_users)
        assert not wrong, wrong


@pytest.mark.parametrize("stage", ["recommender", "joint"])
def test_update_on_a_gpu(gpu_users: int, gpu_shape: str, stage: str, report: Report, device: torch.device) -> None:
    twins = OnAGpu(gpu_shape, gpu_users, stage, device)
    twins.race({"eager, one graph": captured(twins.by_hand)}, report, "update")


@pytest.mark.parametrize("stage", ["joint", "recommender"])
def test_update_compiled_on_a_gpu(
    compiles: bool, gpu_users: int, gpu_shape: str, stage: str, report: Report, device: torch.device
) -> None:
    if not compiles:
        pytest.skip("needs --compile")
    twins = OnAGpu(gpu_shape, gpu_users, stage, device)
    compiled = {"max-autotune": lambda: twins.by_hand(twins.compiled)}
    twins.race(compiled, report, "update beside torch.compile", ("fp32", "bf16"))


@pytest.mark.parametrize("stage", ["recommender", "joint"])
def test_epoch_on_ml_1m(stage: str, implementations: list[str], report: Report, device: torch.device) -> None:
    """A whole epoch of real users, B = 500."""
    if device.type != "cpu":
        pytest.skip("of the CPU")
    folder = Path(os.environ.get("CFSFL_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
    if not (folder / "ml-1m.npz").exists():
        pytest.skip("ml-1m.npz is not here; CFSFL_DATA names the folder that has it")
    data = open_dataset(folder / "ml-1m.npz")
    x = as_interactions(data.train, data.n_items)
    batches = []
    for number, users in enumerate(torch.arange(len(x)).split(B)):
        batches.append((view(x.take(users), users, CONFIG, number), Noise(users, 200, False, (number,))))
    twins = Twins(model(data.n_items, "trained"), *batches[0], stage, implementations)

    def epoch(run) -> None:
        for twins.data, twins.eps in batches:
            run()

    times = race(
        {
            "eager": lambda: epoch(twins.by_hand),
            **{b: lambda b=b: epoch(lambda: twins.ours(b)) for b in implementations},
        }
    )
    report(f"epoch of stage {1 if stage == 'recommender' else 3} on ml-1m, B={B} T={T}", times, "eager")
