"""aWAE (Zhong and Zhang 2018): a Wasserstein autoencoder whose codes are sparse."""

from __future__ import annotations

import torch
from torch import Tensor

from cfsfl_fast.recommenders.autoencoders import DAE
from cfsfl_fast.recommenders.base import Code

SCALES = (0.25, 1.0, 4.0)
"""c of the kernel: two draws of N(0, I) are at a squared distance of 2 Z in the mean."""


class AWAE(DAE):
    """aWAE, M-H-Z-H-M with tanh, z linear and not drawn: multinomial cost + lambda MMD^2(codes, N(0, I)) + gamma |z|_1.

    p = tanh(Wx^T x^ + Wv^T v^ + b); z = p C^T + c; u = tanh(z G^T + g). The prior holds for the codes of all users
    together (Tolstikhin et al. 2018), not for each user's: lambda weighs `divergence`, gamma is `loss`'s code_l1.
    """

    label = "aWAE"
    compares = True

    def forward(self, entered: Tensor, noise: Tensor | None = None) -> Code:
        """The code of B users; arguments as `Recommender.forward` has them."""
        z = self.code(entered.tanh())
        return Code(self.hidden(z).tanh(), z)

    def divergence(self, code: Code, prior: Tensor | None = None, share: Tensor | None = None) -> Tensor:
        """What each user adds to MMD^2 (`discrepancy`). [B]"""
        assert code.mu is not None
        share = code.mu.new_full((len(code.mu),), 1 / max(1, len(code.mu))) if share is None else share
        return discrepancy(code.mu, share)


def discrepancy(z: Tensor, share: Tensor) -> Tensor:
    """d_b with sum_b share_b d_b = MMD^2(z, N(0, I)), unbiased over users and exact over the prior:

        d_b = mean_{b' != b} k(z_b, z_b') - 2 E_y k(z_b, y) + E_yy' k(y, y'),    y, y' ~ N(0, I),
        k(z, z') = mean_c exp(-|z - z'|^2 / (2 c Z)),    c in SCALES,

    whose expectations are closed. Without another user the first term is 0.

    Args:
        z: codes. [B, Z]
        share: of each user in a mean over users, as `losses.shares` gives it: 0 leaves one out. [B]

    Returns:
        [B].
    """
    Z = z.shape[1]
    norms = z.square().sum(1)
    far = torch.addmm(norms, z, z.T, alpha=-2).add(norms[:, None]).clamp_min(0)  # |z_b - z_b'|^2
    others = share.to(z.dtype) / (1 - share.square().sum()).clamp_min(torch.finfo(z.dtype).eps)
    found = torch.zeros_like(norms)
    for c in SCALES:
        width = c * Z
        near = (far / (-2 * width)).exp()
        near = near - near.diagonal().diag_embed()
        expected = (1 + 1 / width) ** (-Z / 2) * (norms / (-2 * (width + 1))).exp()
        found = found + near @ others - 2 * expected + (1 + 2 / width) ** (-Z / 2)
    return found / len(SCALES)
