"""Algorithm 1: pretrain the recommender, pretrain the reward estimator, then alternate; one step function each.

Every random number is a function of (seed, stage, epoch, user, item): an epoch that is run again after a kill gives the
same weights.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cfsfl_fast import judging, losses, noise, ops
from cfsfl_fast.config import CFSFLConfig
from cfsfl_fast.distributed import ALONE, Group
from cfsfl_fast.folds import Folds
from cfsfl_fast.interactions import Interactions
from cfsfl_fast.model import CFSFL
from cfsfl_fast.recommenders import Code
from cfsfl_fast.virtual_user import weights

STREAMS = DROPOUT, LATENT, SHOWN, NEGATIVE = 1, 2, 3, 4
"""Of random numbers."""

SHARE_SHOWN = 0.8
"""Of a history, when an item reward learns: as much as held-out users show of theirs."""


class View(NamedTuple):
    """What an update sees of its users, in one of the two readings, "heldout" or "full"."""

    encoded: Interactions  # what the encoder takes in,
    weights: Tensor  # with these entries of x^ (dropout applied). [E]
    seen: Interactions  # the history of h(x, a)
    targets: Interactions  # what the recommender should find, and the expert's list
    exclude: tuple[Tensor, Tensor] | None  # never listed
    mask: tuple[Tensor, Tensor] | None  # left out of the softmax
    sizes: Tensor  # |x|. [B]
    share: Tensor  # what each user adds to a mean over users: 1 / B, or 0 for nobody. [B]
    whole: Interactions  # x
    drawn: Tensor | None = None  # items that the softmax is estimated from, the same for all users. [n]


def view(
    x: Interactions,
    users: Tensor,
    config: CFSFLConfig,
    *keys: noise.Key,
    share: Tensor | None = None,
    denoises: bool = True,
) -> View:
    """The histories of some users with a fresh dropout mask.

    Args:
        x: their rows.
        users: their numbers, which key the mask; -1 is nobody, whose row is empty. [B] int64
        config: dropout and reading.
        *keys: more keys of the mask, as the epoch.
        share: what each adds to a mean, where these are not all the users of a batch. [B]
        denoises: hide a share of the history also in the "full" reading.
    """
    if config.reading == "full" and not denoises:
        config = dataclasses.replace(config, dropout=0.0)
    kept = noise.uniform(DROPOUT, *keys, x.spread(users), x.items, device=users.device) >= config.dropout
    entries = x.unit_weights() / (1 - config.dropout)
    share = losses.shares(users >= 0) if share is None else share
    if config.reading == "full":
        return View(x, entries * kept, x, x, None, None, x.counts, share, x)
    seen = x.where(kept)
    exclude = seen.csr
    mask = exclude if config.mask_kept else None
    return View(seen, x.pick(kept, entries), seen, x.where(~kept), exclude, mask, x.counts, share, x)


@dataclass(frozen=True)
class Noise:
    """The latent noise of one update: eps [B, Z] of pass t."""

    users: Tensor
    latent_dim: int
    fresh: bool
    keys: tuple[noise.Key, ...]

    def __call__(self, t: int) -> Tensor:
        """eps of pass t: the same for every t unless fresh. [B, Z]"""
        z = torch.arange(self.latent_dim, device=self.users.device)
        return noise.normal(LATENT, *self.keys, t if self.fresh else 0, self.users[:, None], z, device=z.device)

    def of_passes(self) -> Callable[[int], Tensor]:
        """The same for the passes of one loop: what they share is drawn once."""
        if self.fresh:
            return self
        shared: list[Tensor] = []

        def of(t: int) -> Tensor:
            if not shared:
                shared.append(self(t))
            return shared[0]

        return of


def _kl_weight(model: CFSFL, batch: View, step: int | Tensor) -> Tensor | float:
    config = model.config
    if config.kl == "none":
        return 0.0
    if model.recommender.compares:
        return config.mmd_weight
    assert isinstance(config.anneal_steps, int)
    cap = float(config.kl_cap)
    beta = losses.annealed_beta(step, config.anneal_steps, cap)
    if config.kl == "per_user" and cap:
        return float(config.kl_gamma) * beta / cap * batch.sizes
    return beta


class Lists(NamedTuple):
    """Recommended lists a, out of reach of gradients."""

    ids: Tensor  # [B, K]
    scores: Tensor  # [B, K]


def recommender_step(model: CFSFL, batch: View, eps: Noise, step: int | Tensor) -> Tensor:
    """L_sup of the recommender alone (T = 0), mean over users."""
    recommender = model.recommender
    hoisted = recommender.hoist(*batch.encoded.csr, batch.weights)
    code = recommender(hoisted, eps(0) if recommender.samples else None)
    return _supervised(model, batch, code, model.output_table(), step)[0]


def _supervised(
    model: CFSFL, batch: View, code: Code, output: ops.Table, step: int | Tensor, k: int = 0, state: Any = None
) -> tuple[Tensor, Tensor, Tensor]:
    """L_sup of one pass, mean over users, and the list of its K best items."""
    drawn = batch.drawn

    def sample(u: Tensor, output: ops.Table, items: Tensor, offsets: Tensor, exclude: ops.CSR | None) -> Tensor:
        assert drawn is not None
        return ops.sampled_nll(u, output, items, offsets, exclude, drawn, model.n_items)

    loss, ids, scores = model.recommender.loss(
        code,
        output,
        *batch.targets.csr,
        exclude=batch.mask,
        kl_weight=_kl_weight(model, batch, step),
        prior=model.recommender.prior(*batch.whole.csr, batch.whole.unit_weights()),
        share=batch.share,
        code_l1=float(model.config.code_l1),
        k=k,
        state=state,
        sample=None if drawn is None else sample,
    )
    return losses.mean(loss, batch.share), ids, scores


def joint_step(model: CFSFL, batch: View, eps: Noise, step: int | Tensor) -> tuple[Tensor, Lists]:
    """L_C (7) through the T-step loop, and the lists a^T. The reward estimator is frozen; the adversarial term moves
    neither it nor the lookup table.
    """
    config = model.config
    codes, _, state, output, lookup, hx = model.run_loop(
        batch.encoded, batch.weights, batch.seen, steps=config.steps, exclude=batch.exclude, noise=eps.of_passes()
    )
    code = codes[-1]
    if (batch.mask is None) == (batch.exclude is None):  # the same rows: loss and list come from one product
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
        loss = loss + config.reward_weight * losses.adversarial(ops.mlp(h, frozen).squeeze(1), batch.share)
    return loss, Lists(ids, scores.detach())


@torch.no_grad()
def recommended_lists(model: CFSFL, batch: View, eps: Noise, steps: int) -> Lists:
    """The lists a^T of a batch after some steps, for an update of the reward estimator alone."""
    loop = model.run_loop(
        batch.encoded, batch.weights, batch.seen, steps=steps, exclude=batch.exclude, noise=eps.of_passes()
    )
    return Lists(*ops.linear_topk(loop.code.u, loop.output, model.config.top_k, batch.exclude, loop.state))


def reward_step(model: CFSFL, batch: View, lists: Lists, group: Group = ALONE) -> tuple[Tensor, Tensor, Tensor]:
    """L_R of the reward estimator and the lookup table, and the mean rewards of the expert's and of the given lists.

    Of each, the part of this process where a group shares the batch.
    """
    lookup = ops.Table(model.lookup.weight)
    hx = ops.row_bag(lookup, *batch.seen.csr, batch.seen.mean_weights())
    expert = hx + ops.row_bag(lookup, *batch.targets.csr, batch.targets.mean_weights())
    listed = "topk_softmax" if model.config.action in ("topk_softmax", "softmax") else "hard"
    h = ops.fuse(hx, lookup, *lists, listed)
    real, fake = (ops.mlp(rows, weights(model.reward)).squeeze(1) for rows in (expert, h))
    has_expert = batch.targets.counts > 0
    (n_experts,) = group.sums([has_expert.sum()])
    share = losses.shares(has_expert, n_experts)
    loss = losses.reward_loss(real, fake, model.config.reward_loss, share, batch.share)
    return loss, losses.mean(real.detach().sigmoid(), share), losses.mean(fake.detach().sigmoid(), batch.share)


def item_reward_step(
    model: CFSFL, folds: Folds, whole: Interactions, users: Tensor, keys: Sequence[noise.Key], group: Group = ALONE
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of the item reward on lists from a part of each history, real being what is listed of the rest.

    Args:
        folds: what recommends to each user here.
        whole: the users' histories.
        users, keys: of the random numbers that choose the part.

    Returns:
        the loss, and the mean rewards of real and other listed items; of each, the part of this process where a group
        shares the batch.
    """
    assert model.memory is not None
    with torch.no_grad():
        kept, targets = shown(whole, users, *keys)
        scores = folds.scores(kept, users)
        ids, evidence = judging.lists(model.memory, scores, kept, whole, model.config.steps, model.config.top_k)
    return judging.reward_loss(model.memory, weights(model.reward), ids, evidence, targets, group)


def shown(whole: Interactions, users: Tensor, *keys: noise.Key) -> tuple[Interactions, Interactions]:
    """Histories in two random parts: what is shown, SHARE_SHOWN of the items, and the rest."""
    drawn = noise.uniform(SHOWN, *keys, whole.spread(users), whole.items, device=users.device)
    return whole.where(drawn < SHARE_SHOWN), whole.where(drawn >= SHARE_SHOWN)


@torch.no_grad()
def prepare_item_reward(model: CFSFL, folds: Folds, histories: Interactions) -> None:
    """Measures each column of the evidence on 1,000 users.

    Args:
        model: its item memory is filled and weighted.
        folds: what recommends to each user.
        histories: of the training users.
    """
    memory, config = model.memory, model.config
    assert memory is not None
    chosen = noise.uniform(SHOWN, config.seed, torch.arange(len(histories))).argsort()[:1000]
    total = memory.centre.new_zeros(3, len(memory.centre), dtype=torch.float64)
    for users in chosen.split(100):
        whole = histories.take(users)
        users = users.to(histories.items.device)
        kept, _ = shown(whole, users, config.seed)
        ids, evidence = judging.lists(memory, folds.scores(kept, users), kept, whole, config.steps, config.top_k)
        rows = evidence[ids >= 0].double()
        total += torch.stack([torch.ones_like(rows), rows, rows.square()]).sum(1)
    n, first, second = total[0].clamp_min(1), total[1], total[2]
    memory.centre.copy_(first / n)
    memory.spread.copy_((second / n - (first / n).square()).clamp_min(0).sqrt().clamp_min(1e-6))
