"""Autoencoders with hidden layers: Mult-VAE, its Gaussian twin, and two denoising autoencoders."""

from __future__ import annotations

from torch import Tensor

from cfsfl_fast.recommenders.base import Code, InputLayer, OutputLayer, Recommender, linear, sampled
from cfsfl_fast.recommenders.likelihoods import logistic, weighted_squares
from cfsfl_fast.recommenders.linear import MF


class MultVAE(Recommender):
    """Mult-VAE (Liang et al. 2018), M-H-Z-H-M with tanh, taking in the feedback v at its first layer.

    p = tanh(Wx^T x^ + Wv^T v^ + b); mu, logvar = split(p C^T + c); z = mu + eps exp(logvar / 2); u = tanh(z G^T + g).
    """

    label = "VAE"
    samples = True

    def __init__(self, n_items: int, hidden_dim: int, latent_dim: int, feedback_dim: int) -> None:
        super().__init__()
        self.latent_dim = latent_dim
        self.input = InputLayer(n_items, feedback_dim, hidden_dim)
        self.code = linear(hidden_dim, 2 * latent_dim)
        self.hidden = linear(latent_dim, hidden_dim)
        self.output = OutputLayer(n_items, hidden_dim)

    def forward(self, entered: Tensor, noise: Tensor | None = None) -> Code:
        """The code of B users; arguments as `Recommender.forward` has them."""
        mu, logvar = self.code(entered.tanh()).split(self.latent_dim, dim=1)
        return Code(self.hidden(sampled(mu, logvar, noise)).tanh(), mu, logvar)


class GaussianVAE(MultVAE):
    """Mult-VAE's network with the weighted squared loss."""

    label = "VAE-Gaussian"
    likelihood = staticmethod(weighted_squares)


class DAE(Recommender):
    """The denoising autoencoder (Mult-DAE of Liang et al. 2018), M-H-Z-H-M with tanh: no sampling, no KL term."""

    label = "DAE"

    def __init__(self, n_items: int, hidden_dim: int, latent_dim: int, feedback_dim: int) -> None:
        super().__init__()
        self.input = InputLayer(n_items, feedback_dim, hidden_dim)
        self.code = linear(hidden_dim, latent_dim)
        self.hidden = linear(latent_dim, hidden_dim)
        self.output = OutputLayer(n_items, hidden_dim)

    def forward(self, entered: Tensor, noise: Tensor | None = None) -> Code:
        """The code of B users; arguments as `Recommender.forward` has them."""
        code = self.code(entered.tanh()).tanh()
        return Code(self.hidden(code).tanh())


class CDAE(MF):
    """The collaborative denoising autoencoder (Wu et al. 2016), M-Z-M: s = sigmoid(Wx^T x^ + Wv^T v^ + b) O^T + o.

    Its node for each training user has no value for anybody else. Here all users share one, which is the bias b: what
    is trained is what answers for held-out users, of whom nothing but the history is known. The loss is the logistic
    one of every item, where Wu et al. draw some of those that the user does not have. Its layers are MF's.
    """

    label = "CDAE"
    likelihood = staticmethod(logistic)

    def forward(self, entered: Tensor, noise: Tensor | None = None) -> Code:
        """The code of B users; arguments as `Recommender.forward` has them."""
        return Code(entered.sigmoid())
