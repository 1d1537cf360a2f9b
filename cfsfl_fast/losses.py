"""The numbered losses of the paper, on what the operations give."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def annealed_beta(step: int, anneal_steps: int, cap: float) -> float:
    """beta = min(cap, step / anneal_steps), the KL weight of the ELBO."""
    return min(cap, step / anneal_steps)


def adversarial(logit: Tensor) -> Tensor:
    """The second term of (7), -log R = softplus(-g), mean over users."""
    return F.softplus(-logit).mean()


def reward_loss(real: Tensor, fake: Tensor, kind: str) -> Tensor:
    """What the reward estimator minimises; real and fake are the logits g of the expert's and the recommender's lists.

    "imitation": mean softplus(-g(real)) + mean softplus(g(fake)) (Ho and Ermon 2016, R the probability of "expert").
    "literal": the negative of (8) as printed, E[log R(fake)] + E[1 - log R(real)], which has no bound.
    """
    if kind == "imitation":
        return F.softplus(-real).mean() + F.softplus(fake).mean()
    return F.logsigmoid(fake).mean() + (1 - F.logsigmoid(real)).mean()


def mean(values: Tensor) -> Tensor:
    """Mean over users; 0 of none."""
    return values.mean() if len(values) else torch.zeros((), device=values.device)
