"""What an update is: a stage's optimisers; a batch, its losses, gradients and steps as one function of user numbers
that a graph can capture; and epochs of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from cfsfl_fast import backends, losses, noise, training
from cfsfl_fast.distributed import ALONE, Group
from cfsfl_fast.folds import Folds
from cfsfl_fast.graphs import Graphs, capacity
from cfsfl_fast.interactions import Interactions
from cfsfl_fast.lookups import gradients_by_rows
from cfsfl_fast.model import CFSFL
from cfsfl_fast.recommenders.likelihoods import multinomial
from cfsfl_fast.row_adam import RowAdam


class Optimisers:
    """Adam over the parts of a model that a stage updates; the l2 penalty is on the recommender's weights alone.

    updates: what the last epoch updated by, for the next.
    """

    def __init__(self, model: CFSFL, stage: str) -> None:
        config = model.config
        named = dict(model.named_parameters())
        theta = [n for n in named if n.startswith("recommender.")]
        decayed = [n for n in theta if named[n].dim() == 2]
        assert isinstance(config.batch_size, int)
        rate = float(config.learning_rate) if stage == "recommender" else config.joint_learning_rate
        # Adam's weight_decay adds decay * W to the gradient: the gradient of decay / 2 ||W||^2.
        groups = [
            (decayed, rate, 2 * float(config.l2) / config.batch_size),
            ([n for n in theta if n not in decayed], rate, 0.0),
        ]
        if stage == "joint":
            psi = [n for n in named if n.startswith(("feedback.", "lookup."))]
            groups.append((psi, config.feedback_learning_rate, 0.0))
        phi = [n for n in named if n.startswith(("reward.", "lookup."))]
        self.named = named
        self.updates: Updates | None = None
        self.main = None if stage == "reward" else _adam(named, groups)
        reward = stage == "reward" or (stage == "joint" and config.uses_reward)
        self.reward = _adam(named, [(phi, config.reward_learning_rate, 0.0)]) if reward else None

    def state(self) -> dict[str, Tensor]:
        """Every moment and counter, by optimiser and parameter name."""
        found = {}
        for which, optimiser in (("main", self.main), ("reward", self.reward)):
            for name, parameter in self.named.items():
                for key, value in (optimiser.state.get(parameter, {}) if optimiser else {}).items():
                    found[f"{which}/{name}/{key}"] = value
        return found

    def restore(self, state: dict[str, Tensor]) -> None:
        """Takes `state` back.

        Raises:
            ValueError: it is of other parameters.
        """
        optimisers = {"main": self.main, "reward": self.reward}
        self.updates = None  # a graph of theirs writes to the tensors that there are now
        for path, value in state.items():
            which, name, key = path.split("/") if path.count("/") == 2 else ("", "", "")
            optimiser, parameter = optimisers.get(which), self.named.get(name)
            shapes = () if parameter is None else (parameter.shape, parameter.shape[:1], torch.Size())
            if optimiser is None or parameter is None or value.shape not in shapes:
                raise ValueError(f"no optimiser of this stage has a state {path!r} of shape {tuple(value.shape)}")
            optimiser.state[parameter][key] = value.to(parameter.device)


def _adam(named: dict[str, torch.nn.Parameter], groups: list[tuple[list[str], float, float]]) -> torch.optim.Adam:
    """On a CUDA device counters and learning rates live there, where a captured update finds them."""
    device = next(iter(named.values())).device
    on_device = device.type != "cpu"
    optimiser = RowAdam(
        [
            {
                "params": [named[n] for n in names],
                "lr": torch.full((), rate, device=device) if on_device else rate,
                "weight_decay": decay,
            }
            for names, rate, decay in groups
        ],
        fused=True,
        capturable=on_device,
    )
    optimiser._warned_capturable_if_run_uncaptured = True  # warm-up runs uncaptured, and means it
    return optimiser


def update(optimiser: torch.optim.Adam, loss: Tensor, group: Group = ALONE) -> None:
    """One step down a loss, which moves this optimiser's parameters and leaves no gradient on any other.

    Where a group shares the batch, down the sum of its processes' losses.
    """
    parameters = [p for part in optimiser.param_groups for p in part["params"] if p.requires_grad]
    found = zip(parameters, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True)
    used = [(parameter, gradient) for parameter, gradient in found if gradient is not None]
    whole = [(parameter, gradient) for parameter, gradient in used if not gradient.is_sparse]
    for (parameter, _), gradient in zip(whole, group.sums([gradient for _, gradient in whole]), strict=True):
        parameter.grad = gradient
    for parameter, gradient in used:
        if gradient.is_sparse:
            wide = gradient if group.size == 1 else gradient.to(torch.promote_types(gradient.dtype, torch.float32))
            parameter.grad = group.row_sums(wide).to(parameter.dtype)
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)


class EpochSums(NamedTuple):
    """Sums over an epoch's users, read from the device when the epoch is over."""

    loss: Tensor
    reward_loss: Tensor
    expert_reward: Tensor
    list_reward: Tensor


class Updates:
    """A stage's updates as functions of user numbers: batches, losses, gradients and optimisers stay on the device.

    Whatever changes from one update to the next is a tensor that stays where it is, so that an update can be captured
    as a graph: the step, the epoch's keys, learning rates, and what an epoch sums up.

    Where a group shares every batch, each process computes its users' part of the losses; noise is keyed by user, and
    gradients are summed, so an update is that of one process up to rounding.
    """

    def __init__(
        self,
        model: CFSFL,
        histories: Interactions,
        optimisers: Optimisers,
        stage: str,
        group: Group = ALONE,
        folds: Folds | None = None,
    ) -> None:
        if model.precision == "bf16" and model.recommender.likelihood is not multinomial:
            raise ValueError(
                f'precision="bf16" trains by the multinomial loss alone; recommender {model.config.recommender!r} has '
                f"another, which needs float32 products"
            )
        model.recommender.check_processes(group.size)
        self.model, self.optimisers, self.stage, self.group = model, optimisers, stage, group
        self.folds = folds
        self.given = histories
        self.histories = histories.padded(len(histories) + 1)  # nobody's row is the last
        device = histories.items.device
        # Between processes nothing is captured: one that falls back alone would leave the others waiting.
        # Which rows an update touches is data, and so are the shapes of sparse gradients.
        has_shapes = group.size == 1 and (model.config.softmax, model.config.table_updates) == ("full", "dense")
        self.graphs = Graphs(model.graphs.mode if has_shapes else False)
        self.fixed = self.graphs.wanted(device)
        self.step = torch.zeros((), dtype=torch.int64, device=device)
        self.keys = noise.Begun(training.STREAMS, device)
        self.sums, self.last = torch.zeros(4, device=device), torch.zeros(4, device=device)
        self.capacity: int | None = None

    def begin(self, step: int, keys: tuple[int, ...], capacity: int | None) -> None:
        """Starts an epoch.

        Args:
            step: updates of the recommender so far.
            keys: of the epoch's random numbers.
            capacity: entries that a batch has room for; None takes as many as there are.
        """
        self.keys.set(*keys)
        self.step.fill_(step)
        self.sums.zero_()
        self.capacity = capacity

    def __call__(self, users: Tensor, others: Tensor) -> None:
        """One update.

        Args:
            users: numbers of the batch's users, of all processes; -1 is nobody. [B] int64
            others: of the batch that the reward estimator alone learns from, where the config wants one.
        """
        with self.model.running(), gradients_by_rows(self.model.config.table_updates == "rows"):
            self.graphs.run(
                self._update,
                *([users] if self._shares_batch else [users, others]),
                key=(
                    self.capacity,
                    self.model.config,
                    self.model.precision,
                    backends.resolve(users.device),
                    self.model.recommender.phase,
                ),
                reads=[
                    *self.model.tensors(),
                    self.histories.items,
                    self.keys.states,
                    *(self.folds.tensors() if self.folds else ()),
                ],
            )

    @property
    def _shares_batch(self) -> bool:
        return self.stage != "joint" or self.optimisers.reward is None or self.model.config.reward_batch == "shared"

    def _seen(self, everyone: Tensor, *more: int) -> tuple[training.View, training.Noise]:
        config = self.model.config
        users, share = self.group.part(everyone, -1), self.group.part(losses.shares(everyone >= 0), 0)
        keys: tuple[noise.Key, ...] = (self.keys, *more)
        denoises = self.model.recommender.denoises
        batch = training.view(self._whole(users), users, config, *keys, share=share, denoises=denoises)
        if config.softmax == "sampled":
            number = torch.arange(config.negatives, device=users.device)
            bits = noise.bits(training.NEGATIVE, *keys, self.step, number, device=users.device)
            batch = batch._replace(drawn=bits.remainder(self.model.n_items))
        return batch, training.Noise(users, config.latent_dim, config.noise == "fresh", keys)

    def _whole(self, users: Tensor) -> Interactions:
        return self.histories.take(users.where(users >= 0, len(self.histories) - 1), self.capacity)

    def _update(self, *batches: Tensor) -> tuple[Tensor, ...]:
        model, config, optimisers = self.model, self.model.config, self.optimisers
        batch, eps = self._seen(batches[0])
        found = torch.zeros_like(self.last)
        lists = None
        if optimisers.main is not None:
            if self.stage == "joint":
                loss, lists = training.joint_step(model, batch, eps, self.step)
            else:
                loss = training.recommender_step(model, batch, eps, self.step)
            update(optimisers.main, loss, self.group)
            found[0] = loss.detach()
            self.step += 1
        if optimisers.reward is not None and config.judges_items:
            assert self.folds is not None
            users = self.group.part(batches[0], -1)
            whole = self._whole(users)
            loss, real, fake = training.item_reward_step(model, self.folds, whole, users, (self.keys,), self.group)
            update(optimisers.reward, loss, self.group)
            found[1:] = torch.stack([loss.detach(), real, fake])
        elif optimisers.reward is not None:
            if lists is None or len(batches) > 1:
                batch, eps = self._seen(batches[-1], 1)
                lists = training.recommended_lists(model, batch, eps, config.steps if self.stage == "joint" else 0)
            loss, real, fake = training.reward_step(model, batch, lists, self.group)
            update(optimisers.reward, loss, self.group)
            found[1:] = torch.stack([loss.detach(), real, fake])
        self.last.copy_(found)
        self.sums += found * (batches[0] >= 0).sum()
        return ()


def run_epoch(
    model: CFSFL,
    histories: Interactions,
    optimisers: Optimisers,
    stage: str,
    order: Tensor,
    keys: tuple[int, ...],
    step: int,
    tick: Callable[[int, Callable[[], float]], None],
    group: Group = ALONE,
    folds: Folds | None = None,
) -> tuple[EpochSums, int]:
    """One epoch of a stage. Nothing waits for the device before its end, but where `tick` reads a loss.

    Args:
        histories: of all training users, on the model's device.
        stage: "recommender", "control" (the recommender alone at stage 3's rate), "reward" or "joint".
        order: the users in the order of the epoch. [U] int64
        keys: of the epoch's random numbers.
        step: updates of the recommender so far.
        tick: called after each batch with its number of users and a function that reads the last loss.
        group: processes that share every batch.
        folds: what recommends to users while an item reward learns.

    Returns:
        Sums over users, and the updates so far.
    """
    B = model.config.batch_size
    assert isinstance(B, int)
    updates = optimisers.updates
    if updates is None or (updates.model, updates.given, updates.stage) != (model, histories, stage):
        updates = optimisers.updates = Updates(model, histories, optimisers, stage, group, folds)
    # The reward estimator's own batch is the one half an epoch on.
    orders, room = [order, order.roll(-(len(order) // 2))], None
    if updates.fixed:
        counts = histories.host_counts
        room = capacity(max(int(counts[some].sum()) for users in orders for some in users.cpu().split(B)))
        orders = [F.pad(users, (0, -len(users) % B), value=-1) for users in orders]
    updates.begin(step, keys, room)
    which = 0 if optimisers.main is not None else 1
    batches = zip(*(users.split(B) for users in orders), strict=True)
    for number, (users, others) in enumerate(batches):
        updates(users, others)
        tick(min(B, len(order) - number * B), lambda: float(updates.last[which]) * group.size)
    n_updates = -(-len(order) // B) if optimisers.main is not None else 0
    (sums,) = group.sums([updates.sums.clone()])
    return EpochSums(*sums.cpu()), step + n_updates
