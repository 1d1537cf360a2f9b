"""The numbered losses of the paper, on what the operations give."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def annealed_beta(step: int | Tensor, anneal_steps: int, cap: float) -> float | Tensor:
    """beta = min(cap, step / anneal_steps), the KL weight of the ELBO."""
    if isinstance(step, Tensor):
        return (step / anneal_steps).clamp_max(cap)
    return min(cap, step / anneal_steps)


def shares(counted: Tensor, total: Tensor | None = None) -> Tensor:
    """What each user adds to a mean over those that count: 1 / their number, 0 for the others. [B] bool -> [B]

    total: their number where some of them are elsewhere.
    """
    return counted / (counted.sum() if total is None else total).clamp_min(1)


def mean(values: Tensor, share: Tensor) -> Tensor:
    """Mean over users, sum_b share_b values_b; 0 of none. [B], [B] -> []"""
    return (values * share).sum()


def adversarial(logit: Tensor, share: Tensor) -> Tensor:
    """The second term of (7), -log R = softplus(-g), mean over users."""
    return mean(F.softplus(-logit), share)


def reward_loss(real: Tensor, fake: Tensor, kind: str, real_share: Tensor, fake_share: Tensor) -> Tensor:
    """What the reward estimator minimises; real and fake are the logits g of the expert's and the recommender's lists.

    "imitation": mean softplus(-g(real)) + mean softplus(g(fake)) (Ho and Ermon 2016, R the probability of "expert").
    "literal": the negative of (8) as printed, E[log R(fake)] + E[1 - log R(real)], which has no bound.
    """
    if kind == "imitation":
        return mean(F.softplus(-real), real_share) + mean(F.softplus(fake), fake_share)
    return mean(F.logsigmoid(fake), fake_share) + mean(1 - F.logsigmoid(real), real_share)
