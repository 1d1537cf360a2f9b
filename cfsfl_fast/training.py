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
from torch.nn import functional as F

from cfsfl_fast import backends, judging, losses, noise, ops
from cfsfl_fast.config import CFSFLConfig
from cfsfl_fast.distributed import ALONE, Group
from cfsfl_fast.folds import Folds
from cfsfl_fast.graphs import Graphs, capacity
from cfsfl_fast.interactions import Interactions
from cfsfl_fast.lookups import gradients_by_rows
from cfsfl_fast.model import CFSFL
from cfsfl_fast.recommenders import Code
from cfsfl_fast.recommenders.likelihoods import multinomial
from cfsfl_fast.row_adam import RowAdam
from cfsfl_fast.virtual_user import weights

DROPOUT, LATENT, SHOWN, NEGATIVE = 1, 2, 3, 4
"""Streams of random numbers."""

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
    *keys: int | Tensor,
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
    keys: tuple[int | Tensor, ...]

    def __call__(self, t: int) -> Tensor:
        """eps of pass t: the same for every t unless fresh. [B, Z]"""
        z = torch.arange(self.latent_dim, device=self.users.device)
        return noise.normal(LATENT, *self.keys, t if self.fresh else 0, self.users[:, None], z, device=z.device)

    def of_passes(self) -> Callable[[int], Tensor]:
        """The same for the passes of one loop: what they share is drawn once."""
        shared: list[Tensor] = []

        def of(t: int) -> Tensor:
            if self.fresh:
                return self(t)
            if not shared:
                shared.append(self(0))
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
    model: CFSFL, folds: Folds, whole: Interactions, users: Tensor, keys: Sequence[int | Tensor], group: Group = ALONE
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


def shown(whole: Interactions, users: Tensor, *keys: int | Tensor) -> tuple[Interactions, Interactions]:
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
        if model.recommender.compares and group.size > 1:
            raise ValueError(
                f"recommender {model.config.recommender!r} compares the users of a batch, which {group.size} processes "
                f"would share; train it in one"
            )
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
        self.keys = torch.zeros(0, dtype=torch.int64, device=device)
        self.sums, self.last = torch.zeros(4, device=device), torch.zeros(4, device=device)
        self.capacity: int | None = None

    def begin(self, step: int, keys: tuple[int, ...], capacity: int | None) -> None:
        """Starts an epoch.

        Args:
            step: updates of the recommender so far.
            keys: of the epoch's random numbers.
            capacity: entries that a batch has room for; None takes as many as there are.
        """
        if len(keys) != len(self.keys):
            self.keys = self.keys.new_zeros(len(keys))
        self.keys.copy_(torch.tensor(keys))
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
                    self.keys,
                    *(self.folds.tensors() if self.folds else ()),
                ],
            )

    @property
    def _shares_batch(self) -> bool:
        return self.stage != "joint" or self.optimisers.reward is None or self.model.config.reward_batch == "shared"

    def _seen(self, everyone: Tensor, *more: int) -> tuple[View, Noise]:
        config = self.model.config
        users, share = self.group.part(everyone, -1), self.group.part(losses.shares(everyone >= 0), 0)
        keys: tuple[int | Tensor, ...] = (*self.keys.unbind(), *more)
        denoises = self.model.recommender.denoises
        batch = view(self._whole(users), users, config, *keys, share=share, denoises=denoises)
        if config.softmax == "sampled":
            number = torch.arange(config.negatives, device=users.device)
            bits = noise.bits(NEGATIVE, *keys, self.step, number, device=users.device)
            batch = batch._replace(drawn=bits.remainder(self.model.n_items))
        return batch, Noise(users, config.latent_dim, config.noise == "fresh", keys)

    def _whole(self, users: Tensor) -> Interactions:
        return self.histories.take(users.where(users >= 0, len(self.histories) - 1), self.capacity)

    def _update(self, *batches: Tensor) -> tuple[Tensor, ...]:
        model, config, optimisers = self.model, self.model.config, self.optimisers
        batch, eps = self._seen(batches[0])
        found = torch.zeros_like(self.last)
        lists = None
        if optimisers.main is not None:
            if self.stage == "joint":
                loss, lists = joint_step(model, batch, eps, self.step)
            else:
                loss = recommender_step(model, batch, eps, self.step)
            update(optimisers.main, loss, self.group)
            found[0] = loss.detach()
            self.step += 1
        if optimisers.reward is not None and config.judges_items:
            assert self.folds is not None
            users = self.group.part(batches[0], -1)
            whole, keys = self._whole(users), self.keys.unbind()
            loss, real, fake = item_reward_step(model, self.folds, whole, users, keys, self.group)
            update(optimisers.reward, loss, self.group)
            found[1:] = torch.stack([loss.detach(), real, fake])
        elif optimisers.reward is not None:
            if lists is None or len(batches) > 1:
                batch, eps = self._seen(batches[-1], 1)
                lists = recommended_lists(model, batch, eps, config.steps if self.stage == "joint" else 0)
            loss, real, fake = reward_step(model, batch, lists, self.group)
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
