"""RecVAE (Shenbin et al. 2020): a denser encoder, a composite prior, encoder and decoder trained in turns."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cfsfl_fast import ops
from cfsfl_fast.recommenders.base import Code, InputLayer, OutputLayer, Recommender, linear, sampled

LAYERS = 5
ENCODER_EPOCHS = 3
"""Of the encoder, before each of the decoder."""

SHARES = (3 / 20, 3 / 4, 1 / 10)
"""Of the prior's parts: N(0, I), the encoder as it was, and N(0, exp(10) I)."""

WIDE = 10.0


class Encoder(nn.Module):
    """h_1 = norm(swish(p)), h_i = norm(swish(W_i h_(i-1) + h_1 + ... + h_(i-1))); mu, logvar are linear in the last."""

    def __init__(self, hidden_dim: int, latent_dim: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(linear(hidden_dim, hidden_dim) for _ in range(LAYERS - 1))
        self.norms = nn.ModuleList(nn.LayerNorm(hidden_dim, eps=0.1) for _ in range(LAYERS))
        self.code = linear(hidden_dim, 2 * latent_dim)

    def forward(self, p: Tensor) -> Tensor:
        """[mu, logvar] of pre-activations p. [B, H] -> [B, 2Z]"""
        norms = list(self.norms)
        h = total = norms[0](F.silu(p))
        for layer, norm in zip(self.layers, norms[1:], strict=True):
            h = norm(F.silu(layer(h) + total))
            total = total + h
        found: Tensor = self.code(h)
        return found


class RecVAE(Recommender):
    """RecVAE: z = mu + eps exp(logvar / 2) of the denser encoder, s = z O^T + o, multinomial likelihood.

    The prior of z is a mixture of N(0, I), a wide normal, and the encoder as it was when the decoder's last turn began,
    asked about the whole history. ENCODER_EPOCHS epochs train the encoder alone, the next the decoder alone, from
    histories without dropout where targets are all of x.
    """

    label = "RecVAE"
    samples = True

    def __init__(self, n_items: int, hidden_dim: int, latent_dim: int, feedback_dim: int) -> None:
        super().__init__()
        self.latent_dim = latent_dim
        self.input = InputLayer(n_items, feedback_dim, hidden_dim)
        self.encoder = Encoder(hidden_dim, latent_dim)
        self.output = OutputLayer(n_items, latent_dim)
        self.old_input = _out_of_training(self.input)
        self.old_encoder = _out_of_training(self.encoder)

    def forward(self, entered: Tensor, noise: Tensor | None = None) -> Code:
        """The code of B users; arguments as `Recommender.forward` has them."""
        mu, logvar = self.encoder(entered).split(self.latent_dim, dim=1)
        return Code(sampled(mu, logvar, noise), mu, logvar)

    @torch.no_grad()
    def prior(self, items: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
        """[mu, logvar] of the old encoder for whole histories, without feedback. [B, 2Z]"""
        table, bias = (self.old_input.get_buffer(name) for name in ("weight", "bias"))
        p = ops.row_bag(ops.Table(table), items, offsets, weights) + bias
        found: Tensor = self.old_encoder(p)
        return found

    def divergence(self, code: Code, prior: Tensor | None = None, share: Tensor | None = None) -> Tensor:
        """log q(z | x, v) - log p(z) of the drawn z, an estimate of the KL term, of each user. [B]"""
        assert code.mu is not None
        assert code.logvar is not None
        z, nothing = code.u, torch.zeros_like(code.u)
        mu, logvar = (nothing, nothing) if prior is None else prior.split(self.latent_dim, dim=1)
        parts = ((nothing, nothing), (mu, logvar), (nothing, nothing + WIDE))
        mixture = torch.stack(
            [_log_normal(z, *part) + math.log(w) for part, w in zip(parts, SHARES, strict=True)]
        ).logsumexp(0)
        return (_log_normal(z, code.mu, code.logvar) - mixture).sum(1)

    @contextlib.contextmanager
    def epoch(self, number: int) -> Iterator[None]:
        """The turn of the encoder or of the decoder."""
        decodes = number % (ENCODER_EPOCHS + 1) == 0
        self.phase, self.denoises = "decoder" if decodes else "encoder", not decodes
        if decodes:
            for old, new in ((self.old_input, self.input), (self.old_encoder, self.encoder)):
                for name, value in new.state_dict().items():
                    old.get_buffer(name).copy_(value)
        self.input.requires_grad_(not decodes)
        self.encoder.requires_grad_(not decodes)
        self.output.requires_grad_(decodes)
        try:
            yield
        finally:
            self.requires_grad_(True)
            self.phase, self.denoises = "", True


def _log_normal(z: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    return -0.5 * (math.log(2 * math.pi) + logvar + (z - mu).square() * (-logvar).exp())


def _out_of_training(module: nn.Module) -> nn.Module:
    """A copy whose parameters are buffers: kept in checkpoints, out of reach of optimisers."""
    copied = copy.deepcopy(module)
    for part in copied.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            delattr(part, name)
            part.register_buffer(name, parameter.detach().clone())
    return copied
