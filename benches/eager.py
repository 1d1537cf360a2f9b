"""CF-SFL as one would write it first: dense histories, nn.Linear, torch.topk, autograd through all T steps.

The baseline of every ratio, and a second, independent statement of the model: benches compare outputs before they time.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cfsfl_fast import CFSFL


class EagerCFSFL(nn.Module):
    """The "full" reading with straight-through lists, with the weights of a `CFSFL`."""

    def __init__(self, model: CFSFL) -> None:
        super().__init__()
        config = model.config
        self.steps, self.top_k, self.latent_dim = config.steps, config.top_k, config.latent_dim
        theirs = model.recommender
        n_items, hidden_dim = theirs.input.weight.shape
        self.encode = nn.Linear(n_items + config.feedback_dim, hidden_dim)
        self.code = nn.Linear(hidden_dim, 2 * config.latent_dim)
        self.hidden = nn.Linear(config.latent_dim, hidden_dim)
        self.output = nn.Linear(hidden_dim, n_items)
        self.lookup = nn.Parameter(model.lookup.weight.detach().clone())
        self.reward = nn.ModuleList(nn.Linear(layer.in_features, layer.out_features) for layer in model.reward)
        self.feedback = nn.ModuleList(nn.Linear(layer.in_features, layer.out_features) for layer in model.feedback)
        with torch.no_grad():
            self.encode.weight.copy_(torch.cat([theirs.input.weight, theirs.input.feedback]).T)
            self.encode.bias.copy_(theirs.input.bias)
        for name in ("code", "hidden", "output"):
            getattr(self, name).load_state_dict(getattr(theirs, name).state_dict())
        self.reward.load_state_dict(model.reward.state_dict())
        self.feedback.load_state_dict(model.feedback.state_dict())

    def forward(self, x: Tensor, x_hat: Tensor, eps: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Scores s^T [B, M], mu and logvar [B, Z], and the reward's logit of a^T [B].

        Args:
            x: dense histories [B, M]; x_hat: what the encoder sees of them [B, M]; eps: [B, Z].
        """
        hx = (x / x.sum(1, keepdim=True).clamp_min(1)) @ self.lookup
        v = x.new_zeros(len(x), self.feedback[-1].out_features)
        for t in range(self.steps + 1):
            p = torch.tanh(self.encode(torch.cat([x_hat, F.normalize(v, dim=1)], dim=1)))
            mu, logvar = self.code(p).split(self.latent_dim, dim=1)
            z = mu if eps is None else mu + eps * torch.exp(logvar / 2)
            scores = self.output(torch.tanh(self.hidden(z)))
            h = self.fuse(hx, scores, self.lookup)
            if t < self.steps:
                logit = self.mlp(self.reward, h)
                v = self.mlp(self.feedback, torch.cat([h, torch.sigmoid(logit)], dim=1))
        listed = self.fuse(hx.detach(), scores, self.lookup.detach())
        return scores, mu, logvar, self.mlp(self.reward, listed).squeeze(1)

    def fuse(self, hx: Tensor, scores: Tensor, lookup: Tensor) -> Tensor:
        """h(x, a) with weights 1/K forward and those of a softmax backward. [B, D]"""
        best, ids = scores.topk(self.top_k, dim=1)
        soft = torch.softmax(best, dim=1)
        w = soft + (1 / self.top_k - soft).detach()
        return hx + (w[:, :, None] * lookup[ids]).sum(1)

    @staticmethod
    def mlp(layers: nn.ModuleList, x: Tensor) -> Tensor:
        """Linear layers with ReLU between."""
        for layer in layers[:-1]:
            x = F.relu(layer(x))
        return layers[-1](x)


def joint_loss(
    model: EagerCFSFL, x: Tensor, x_hat: Tensor, eps: Tensor, kl_weight: float, reward_weight: float
) -> Tensor:
    """L_C (7) of a dense batch."""
    scores, mu, logvar, logit = model(x, x_hat, eps)
    nll = -(torch.log_softmax(scores, dim=1) * x).sum(1)
    kl = 0.5 * (mu.square() + logvar.exp() - 1 - logvar).sum(1)
    return (nll + kl_weight * kl).mean() + reward_weight * F.softplus(-logit).mean()
