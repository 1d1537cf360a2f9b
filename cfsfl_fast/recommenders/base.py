"""The interface of a recommender, and the layers that several have."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cfsfl_fast import item_rows, ops
from cfsfl_fast.recommenders.likelihoods import multinomial


class Code(NamedTuple):
    """What a recommender knows of B users."""

    u: Tensor  # [B, H'], the width of the output layer
    mu: Tensor | None = None  # [B, Z]
    logvar: Tensor | None = None  # [B, Z]


class InputLayer(nn.Module):
    """Wx [M, H'] over the history, Wv [V, H'] over the feedback, and a bias [H']; Wv starts at zero."""

    def __init__(self, n_items: int, feedback_dim: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(item_rows.glorot(n_items, width))
        self.feedback = nn.Parameter(torch.zeros(feedback_dim, width))
        self.bias = nn.Parameter(_small(width))


class OutputLayer(nn.Module):
    """O [M, H'], a row per item, and its bias [M]."""

    def __init__(self, n_items: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(item_rows.glorot(n_items, width))
        self.bias = nn.Parameter(item_rows.own(_small(n_items)))


def _small(size: int) -> Tensor:
    return nn.init.trunc_normal_(torch.empty(size), std=0.001, a=-0.002, b=0.002)


def linear(in_dim: int, out_dim: int) -> nn.Linear:
    """A linear layer as Mult-VAE's start: Glorot weights, a small bias."""
    layer = nn.Linear(in_dim, out_dim)
    nn.init.xavier_uniform_(layer.weight)
    with torch.no_grad():
        layer.bias.copy_(_small(out_dim))
    return layer


class Recommender(nn.Module):
    """What CF-SFL wraps: a code of the user from history and feedback, and a linear layer over the items.

    A subclass sets `input` and `output`, defines `forward`, and `divergence` where that is no KL term with N(0, I).
    """

    label = ""
    """Its name in tables."""

    likelihood: Callable[..., tuple[Tensor, Tensor, Tensor]] = staticmethod(multinomial)
    """How scores are compared with targets: one of `likelihoods`."""

    samples = False
    """Whether `forward` takes noise."""

    compares = False
    """Whether `divergence` compares the users of a batch with each other, who then have to be in one process."""

    phase = ""
    """Which part of the recommender the epoch trains, where there are several."""

    denoises = True
    """Whether the epoch hides a share of the history from the encoder also where targets are all of x."""

    input: InputLayer
    output: OutputLayer

    def hoist(self, items: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
        """Wx^T x^ + b for CSR rows with the entries `weights` of x^: what does not depend on v. [B, H']"""
        return ops.row_bag(ops.Table(self.input.weight), items, offsets, weights) + self.input.bias

    def forward(self, entered: Tensor, noise: Tensor | None = None) -> Code:
        """The code of B users.

        Args:
            entered: of `hoist`, with v^ Wv added where there is feedback (`ops.FeedbackStep.following`). [B, H']
            noise: eps [B, Z], where the recommender samples; None takes the mean.
        """
        raise NotImplementedError

    def check_processes(self, n: int) -> None:
        """Whether so many processes can share its training.

        Raises:
            ValueError: they cannot.
        """
        if self.compares and n > 1:
            raise ValueError(
                f"recommender {self.label} compares the users of a batch, which {n} processes would share; train it in "
                "one"
            )

    def prior(self, items: Tensor, offsets: Tensor, weights: Tensor) -> Tensor | None:
        """What `divergence` has to know of whole histories, CSR rows with the entries of x^ without dropout."""
        return None

    def divergence(self, code: Code, prior: Tensor | None = None, share: Tensor | None = None) -> Tensor | None:
        """How far q(z | x, v) is from its prior, per user [B]; None of a recommender without either.

        Here KL(q || N(0, I)), where the code has a mu and a logvar.

        Args:
            code: of `forward`.
            prior: of `prior`.
            share: what each user adds to a mean over users, 0 of nobody; None for all the same. [B]
        """
        if code.mu is None or code.logvar is None:
            return None
        return 0.5 * (code.mu.square() + code.logvar.exp() - 1 - code.logvar).sum(1)

    @contextlib.contextmanager
    def epoch(self, number: int) -> Iterator[None]:
        """Surrounds an epoch of training, which may have its own `phase`; number: of the stage, from 1."""
        yield

    def loss(
        self,
        code: Code,
        output: ops.Table,
        items: Tensor,
        offsets: Tensor,
        *,
        exclude: ops.CSR | None = None,
        kl_weight: Tensor | float = 0.0,
        prior: Tensor | None = None,
        share: Tensor | None = None,
        code_l1: float = 0.0,
        k: int = 0,
        state: Any = None,
        sample: Callable[..., Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The supervised loss of each user, and the list of the same scores.

        Args:
            code: of `forward`.
            output: the output layer, one table per pass.
            items, offsets: the targets as CSR rows.
            exclude: CSR rows of items that count neither as found nor as missed; none may be a target of its row.
            kl_weight: of the divergence, [B] or one number.
            prior, share: as `divergence` takes them.
            code_l1: of sum |mu|, where the code has a mu.
            k: length of the list; 0 for none.
            state: of `ops.loop_state`, where the loop had the same `exclude`.
            sample: (u, output, items, offsets, exclude) -> the likelihood's estimate from drawn items [B]; None takes
                the likelihood itself.

        Returns:
            loss [B], ids [B, K], scores [B, K].
        """
        if sample is None:
            loss, ids, scores = self.likelihood(code.u, output, items, offsets, exclude, k, state)
        else:
            loss = sample(code.u, output, items, offsets, exclude)
            ids, scores = ops.linear_topk(code.u, output, k, exclude, state)
        divergence = self.divergence(code, prior, share)
        if divergence is not None:
            loss = loss + kl_weight * divergence
        if code_l1 and code.mu is not None:
            loss = loss + code_l1 * code.mu.abs().sum(1)
        return loss, ids, scores


def sampled(mu: Tensor, logvar: Tensor, noise: Tensor | None) -> Tensor:
    """z = mu + eps exp(logvar / 2); mu without noise. [B, Z]"""
    return mu if noise is None else torch.addcmul(mu, noise, (logvar / 2).exp())
