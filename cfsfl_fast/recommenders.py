"""Recommenders behind one small interface: what CF-SFL wraps.

Every one ends in a linear layer over the items, so that every kernel serves every recommender:

    hoisted = recommender.hoist(items, offsets, weights)    what does not depend on v, once per batch
    code    = recommender(hoisted, v, noise)                u [B, H], and mu, logvar where it has them
    recommender.output                                      weight [M, H] (a row per item), bias [M]
    recommender.loss(code, ...)                             its own supervised loss
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cfsfl_fast import ops


class Code(NamedTuple):
    """What a recommender knows of B users."""

    u: Tensor  # [B, H]
    mu: Tensor | None = None  # [B, Z]
    logvar: Tensor | None = None  # [B, Z]


class InputLayer(nn.Module):
    """Wx [M, H] over the history, Wv [V, H] over the feedback, and a bias [H]; Wv starts at zero."""

    def __init__(self, n_items: int, feedback_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(nn.init.xavier_uniform_(torch.empty(n_items, hidden_dim)))
        self.feedback = nn.Parameter(torch.zeros(feedback_dim, hidden_dim))
        self.bias = nn.Parameter(_small(hidden_dim))


class OutputLayer(nn.Module):
    """O [M, H], a row per item, and its bias [M]."""

    def __init__(self, n_items: int, hidden_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(nn.init.xavier_uniform_(torch.empty(n_items, hidden_dim)))
        self.bias = nn.Parameter(_small(n_items))


def _small(size: int) -> Tensor:
    return nn.init.trunc_normal_(torch.empty(size), std=0.001, a=-0.002, b=0.002)


def _linear(in_dim: int, out_dim: int) -> nn.Linear:
    layer = nn.Linear(in_dim, out_dim)
    nn.init.xavier_uniform_(layer.weight)
    with torch.no_grad():
        layer.bias.copy_(_small(out_dim))
    return layer


class MultVAE(nn.Module):
    """Mult-VAE (Liang et al. 2018), M-H-Z-H-M with tanh, taking in the feedback v at its first layer.

    p = tanh(Wx^T x^ + Wv^T v^ + b); mu, logvar = split(p C^T + c); z = mu + eps exp(logvar / 2); u = tanh(z G^T + g).
    """

    def __init__(self, n_items: int, hidden_dim: int, latent_dim: int, feedback_dim: int) -> None:
        super().__init__()
        self.latent_dim = latent_dim
        self.input = InputLayer(n_items, feedback_dim, hidden_dim)
        self.code = _linear(hidden_dim, 2 * latent_dim)
        self.hidden = _linear(latent_dim, hidden_dim)
        self.output = OutputLayer(n_items, hidden_dim)

    def hoist(self, items: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
        """Wx^T x^ + b for CSR rows with the entries `weights` of x^. [B, H]"""
        return ops.row_bag(ops.Table(self.input.weight), items, offsets, weights) + self.input.bias

    def forward(self, hoisted: Tensor, v: Tensor | None = None, noise: Tensor | None = None) -> Code:
        """The code of B users.

        Args:
            hoisted: of `hoist`. [B, H]
            v: feedback [B, V]; None is v = 0.
            noise: eps [B, Z]; None takes z = mu.
        """
        if v is not None:
            hoisted = torch.addmm(hoisted, F.normalize(v, dim=1, eps=1e-12), self.input.feedback)
        mu, logvar = self.code(hoisted.tanh()).split(self.latent_dim, dim=1)
        z = mu if noise is None else torch.addcmul(mu, noise, (logvar / 2).exp())
        return Code(self.hidden(z).tanh(), mu, logvar)

    def divergence(self, code: Code) -> Tensor:
        """KL(q(z | x, v) || N(0, I)) of each user. [B]"""
        assert code.mu is not None
        assert code.logvar is not None
        return 0.5 * (code.mu.square() + code.logvar.exp() - 1 - code.logvar).sum(1)


RECOMMENDERS = {"vae": MultVAE}
