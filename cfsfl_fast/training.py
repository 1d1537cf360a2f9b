"""Algorithm 1: pretrain the recommender, pretrain the reward estimator, then alternate; one step function each.

Every random number is a function of (seed, stage, epoch, user, item): an epoch that is run again after a kill gives the
same weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cfsfl_fast import losses, noise, ops
from cfsfl_fast.config import CFSFLConfig
from cfsfl_fast.interactions import Interactions
from cfsfl_fast.model import CFSFL
from cfsfl_fast.recommenders import Code
from cfsfl_fast.virtual_user import weights

DROPOUT, LATENT = 1, 2
"""Streams of random numbers."""


class View(NamedTuple):
    """What an update sees of its users, in one of the two readings, "heldout" or "full"."""

    encoded: Interactions  # what the encoder takes in,
    weights: Tensor  # with these entries of x^ (dropout applied). [E]
    seen: Interactions  # the history of h(x, a)
    targets: Interactions  # what the recommender should find, and the expert's list
    exclude: tuple[Tensor, Tensor] | None  # never listed
    mask: tuple[Tensor, Tensor] | None  # left out of the softmax
    sizes: Tensor  # |x|. [B]


def view(x: Interactions, users: Tensor, config: CFSFLConfig, *keys: int) -> View:
    """The histories of some users with a fresh dropout mask.

    Args:
        x: their rows.
        users: their numbers, which key the mask. [B] int64
        config: dropout and reading.
        *keys: more keys of the mask, as the epoch.
    """
    kept = noise.uniform(DROPOUT, *keys, x.spread(users), x.items, device=users.device) >= config.dropout
    entries = x.unit_weights() / (1 - config.dropout)
    if config.reading == "full":
        return View(x, entries * kept, x, x, None, None, x.counts)
    seen = x.where(kept)
    exclude = seen.csr
    mask = exclude if config.mask_kept else None
    return View(seen, entries[kept], seen, x.where(~kept), exclude, mask, x.counts)


@dataclass(frozen=True)
class Noise:
    """The latent noise of one update: eps [B, Z] of pass t."""

    users: Tensor
    latent_dim: int
    fresh: bool
    keys: tuple[int, ...]

    def __call__(self, t: int) -> Tensor:
        """eps of pass t: the same for every t unless fresh. [B, Z]"""
        z = torch.arange(self.latent_dim, device=self.users.device)
        return noise.normal(LATENT, *self.keys, t if self.fresh else 0, self.users[:, None], z, device=z.device)


def _kl_weight(batch: View, config: CFSFLConfig, step: int) -> Tensor | float:
    if config.kl == "none":
        return 0.0
    assert isinstance(config.anneal_steps, int)
    cap = float(config.kl_cap)
    beta = losses.annealed_beta(step, config.anneal_steps, cap)
    if config.kl == "per_user" and cap:
        return config.kl_gamma * beta / cap * batch.sizes
    return beta


class Lists(NamedTuple):
    """Recommended lists a, out of reach of gradients."""

    ids: Tensor  # [B, K]
    scores: Tensor  # [B, K]


def recommender_step(model: CFSFL, batch: View, eps: Noise, step: int) -> Tensor:
    """L_sup of the recommender alone (T = 0), mean over users."""
    recommender = model.recommender
    hoisted = recommender.hoist(*batch.encoded.csr, batch.weights)
    code = recommender(hoisted, None, eps(0) if recommender.samples else None)
    return _supervised(model, batch, code, model.output_table(), step)[0]


def _supervised(
    model: CFSFL, batch: View, code: Code, output: ops.Table, step: int, k: int = 0, state: Any = None
) -> tuple[Tensor, Tensor, Tensor]:
    """L_sup of one pass, mean over users, and the list of its K best items."""
    kl_weight = _kl_weight(batch, model.config, step)
    loss, ids, scores = model.recommender.loss(
        code, output, *batch.targets.csr, exclude=batch.mask, kl_weight=kl_weight, k=k, state=state
    )
    return losses.mean(loss), ids, scores


def joint_step(model: CFSFL, batch: View, eps: Noise, step: int) -> tuple[Tensor, Lists]:
    """L_C (7) through the T-step loop, and the lists a^T. The reward estimator is frozen; the adversarial term moves
    neither it nor the lookup table.
    """
    config = model.config
    codes, _, state, output, lookup, hx = model.run_loop(
        batch.encoded, batch.weights, batch.seen, steps=config.steps, exclude=batch.exclude, noise=eps
    )
    code = codes[-1]
    if batch.mask is batch.exclude:  # loss and list come from one product
        loss, ids, scores = _supervised(model, batch, code, output, step, config.top_k, state)
    else:
        loss, _, _ = _supervised(model, batch, code, output, step)
        ids, scores = ops.linear_topk(code.u, output, config.top_k, batch.exclude, state)
    if config.loss_steps == "all":
        for earlier in codes[:-1]:
            loss = loss + _supervised(model, batch, earlier, output, step)[0]
        loss = loss / len(codes)
    if config.reward_weight:
        if config.action == "softmax":
            h = ops.fuse_softmax(code.u, output, hx.detach(), lookup.detached(), batch.exclude)
        else:
            h = ops.fuse(hx.detach(), lookup.detached(), ids, scores, config.action)
        frozen = [(w.detach(), b.detach()) for w, b in weights(model.reward)]
        loss = loss + config.reward_weight * losses.adversarial(ops.mlp(h, frozen).squeeze(1))
    return loss, Lists(ids, scores.detach())


@torch.no_grad()
def recommended_lists(model: CFSFL, batch: View, eps: Noise, steps: int) -> Lists:
    """The lists a^T of a batch after some steps, for an update of the reward estimator alone."""
    loop = model.run_loop(batch.encoded, batch.weights, batch.seen, steps=steps, exclude=batch.exclude, noise=eps)
    return Lists(*ops.linear_topk(loop.code.u, loop.output, model.config.top_k, batch.exclude, loop.state))


def reward_step(model: CFSFL, batch: View, lists: Lists) -> tuple[Tensor, Tensor, Tensor]:
    """L_R of the reward estimator and the lookup table, and the mean rewards of the expert's and of the given lists."""
    lookup = ops.Table(model.lookup.weight)
    hx = ops.row_bag(lookup, *batch.seen.csr, batch.seen.mean_weights())
    expert = hx + ops.row_bag(lookup, *batch.targets.csr, batch.targets.mean_weights())
    listed = "topk_softmax" if model.config.action in ("topk_softmax", "softmax") else "hard"
    h = ops.fuse(hx, lookup, *lists, listed)
    has_expert = batch.targets.counts > 0
    real, fake = (ops.mlp(rows, weights(model.reward)).squeeze(1) for rows in (expert[has_expert], h))
    loss = losses.reward_loss(real, fake, model.config.reward_loss) if len(real) else losses.adversarial(-fake)
    return loss, losses.mean(real.detach().sigmoid()), losses.mean(fake.detach().sigmoid())


class Optimisers:
    """Adam over the parts of a model that a stage updates; the l2 penalty is on the recommender's weights alone."""

    def __init__(self, model: CFSFL, stage: str) -> None:
        config = model.config
        named = dict(model.named_parameters())
        theta = [n for n in named if n.startswith("recommender.")]
        decayed = [n for n in theta if named[n].dim() == 2]
        assert isinstance(config.batch_size, int)
        rate = config.learning_rate if stage == "recommender" else config.joint_learning_rate
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
        """Takes `state` back."""
        for path, value in state.items():
            which, name, key = path.split("/")
            optimiser = self.main if which == "main" else self.reward
            assert optimiser is not None
            parameter = self.named[name]
            optimiser.state[parameter][key] = value.to(parameter.device)


def _adam(named: dict[str, torch.nn.Parameter], groups: list[tuple[list[str], float, float]]) -> torch.optim.Adam:
    return torch.optim.Adam(
        [{"params": [named[n] for n in names], "lr": rate, "weight_decay": decay} for names, rate, decay in groups],
        fused=True,
    )


def update(optimiser: torch.optim.Adam, loss: Tensor) -> None:
    """One step down a loss, which moves this optimiser's parameters and leaves no gradient on any other."""
    parameters = [p for group in optimiser.param_groups for p in group["params"]]
    for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True):
        parameter.grad = gradient
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)


class EpochSums(NamedTuple):
    """Sums over an epoch's users, read from the device when the epoch is over."""

    loss: Tensor
    reward_loss: Tensor
    expert_reward: Tensor
    list_reward: Tensor


def run_epoch(
    model: CFSFL,
    histories: Interactions,
    optimisers: Optimisers,
    stage: str,
    order: Tensor,
    keys: tuple[int, ...],
    step: int,
    tick: Callable[[int, Callable[[], float]], None],
) -> tuple[EpochSums, int]:
    """One epoch of a stage.

    Args:
        histories: of all training users.
        stage: "recommender", "control" (the recommender alone at stage 3's rate), "reward" or "joint".
        order: the users in the order of the epoch. [U] int64
        keys: of the epoch's random numbers.
        step: updates of the recommender so far.
        tick: called after each batch with its number of users and a function that reads the last loss.

    Returns:
        Sums over users, and the updates so far.
    """
    config = model.config
    assert isinstance(config.batch_size, int)
    sums = torch.zeros(4, device=order.device)

    def seen(users: Tensor, *more: int) -> tuple[View, Noise]:
        eps = Noise(users, config.latent_dim, config.noise == "fresh", (*keys, *more))
        return view(histories.take(users), users, config, *keys, *more), eps

    for users in order.split(config.batch_size):
        batch, eps = seen(users)
        found = sums.new_zeros(4)
        lists = None
        if stage in ("recommender", "control"):
            loss = recommender_step(model, batch, eps, step)
        elif stage == "joint":
            loss, lists = joint_step(model, batch, eps, step)
        if optimisers.main is not None:
            update(optimisers.main, loss)
            found[0] = loss.detach()
            step += 1
        if optimisers.reward is not None:
            if lists is None or config.reward_batch == "fresh":
                users = _others(users, order) if lists is not None else users
                batch, eps = seen(users, 1)
                lists = recommended_lists(model, batch, eps, config.steps if stage == "joint" else 0)
            loss, real, fake = reward_step(model, batch, lists)
            update(optimisers.reward, loss)
            found[1:] = torch.stack([loss.detach(), real, fake])
        sums += found * len(users)
        last = found[0] if optimisers.main is not None else found[1]
        tick(len(users), last.item)
    return EpochSums(*sums.cpu()), step


def _others(users: Tensor, order: Tensor) -> Tensor:
    """Another batch of the epoch: the one half an epoch on, as many users."""
    start = int((order == users[0]).nonzero()) + len(order) // 2
    return order[torch.arange(start, start + len(users), device=order.device) % len(order)]
