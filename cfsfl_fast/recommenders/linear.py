"""Linear recommenders: one matrix in, one out, feedback at the user's factor. `hidden_dim` has no part in them."""

from __future__ import annotations

from torch import Tensor

from cfsfl_fast.recommenders.base import Code, InputLayer, OutputLayer, Recommender, sampled
from cfsfl_fast.recommenders.likelihoods import rank_weighted, weighted_squares


class LinearVAE(Recommender):
    """VAE-Linear: mu, logvar = split(Wx^T x^ + Wv^T v^ + b); z = mu + eps exp(logvar / 2); s = z O^T + o."""

    label = "VAE-Linear"
    likelihood = staticmethod(weighted_squares)
    samples = True

    def __init__(self, n_items: int, hidden_dim: int, latent_dim: int, feedback_dim: int) -> None:
        super().__init__()
        self.latent_dim = latent_dim
        self.input = InputLayer(n_items, feedback_dim, 2 * latent_dim)
        self.output = OutputLayer(n_items, latent_dim)

    def forward(self, entered: Tensor, noise: Tensor | None = None) -> Code:
        """The code of B users; arguments as `Recommender.forward` has them."""
        mu, logvar = entered.split(self.latent_dim, dim=1)
        return Code(sampled(mu, logvar, noise), mu, logvar)


class MF(Recommender):
    """Matrix factorisation with an amortised user factor, M-Z-M: s = (Wx^T x^ + Wv^T v^ + b) O^T + o."""

    label = "MF"
    likelihood = staticmethod(weighted_squares)

    def __init__(self, n_items: int, hidden_dim: int, latent_dim: int, feedback_dim: int) -> None:
        super().__init__()
        self.input = InputLayer(n_items, feedback_dim, latent_dim)
        self.output = OutputLayer(n_items, latent_dim)

    def forward(self, entered: Tensor, noise: Tensor | None = None) -> Code:
        """The user factor of B users; arguments as `Recommender.forward` has them."""
        return Code(entered)


class WARP(MF):
    """MF's network with the rank-weighted loss (Weston et al. 2011), every negative counted instead of sampled ones."""

    label = "WARP"
    likelihood = staticmethod(rank_weighted)
