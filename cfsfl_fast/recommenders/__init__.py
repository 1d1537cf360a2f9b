"""Recommenders behind one small interface: what CF-SFL wraps.

Every one ends in a linear layer over the items, so that every kernel serves every recommender:

    hoisted = recommender.hoist(items, offsets, weights)    what does not depend on v, once per batch
    entered = hoisted + v^ Wv, Wv = recommender.input.feedback: the one way that v enters; `ops.feedback_step` gives it
    code    = recommender(entered, noise)                   u [B, H'], and mu, logvar where it has them
    recommender.output                                      weight [M, H'] (a row per item), bias [M]
    recommender.loss(code, output, items, offsets, ...)     its own supervised loss [B]
"""

from __future__ import annotations

from collections.abc import Callable

from cfsfl_fast.recommenders.autoencoders import CDAE, DAE, GaussianVAE, MultVAE
from cfsfl_fast.recommenders.awae import AWAE
from cfsfl_fast.recommenders.base import Code, Recommender
from cfsfl_fast.recommenders.linear import MF, WARP, LinearVAE
from cfsfl_fast.recommenders.recvae import RecVAE

__all__ = ["RECOMMENDERS", "Code", "Recommender"]

RECOMMENDERS: dict[str, Callable[[int, int, int, int], Recommender]] = {
    "vae": MultVAE,
    "dae": DAE,
    "vae-gaussian": GaussianVAE,
    "vae-linear": LinearVAE,
    "mf": MF,
    "warp": WARP,
    "recvae": RecVAE,
    "cdae": CDAE,
    "awae": AWAE,
}
"""By the config's name; each takes n_items, hidden_dim, latent_dim, feedback_dim."""
