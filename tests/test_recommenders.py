"""Every recommender behind the one interface: its loss stated densely, its place in the loop, a known answer."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from click.testing import CliRunner
from torch import Tensor
from torch.nn import functional as F

from cfsfl_fast import CFSFL, CFSFLConfig, backends, cli
from cfsfl_fast.config import RECOMMENDER_NAMES
from cfsfl_fast.datasets import Protocol, split_events
from cfsfl_fast.datasets.matrices import matrix_events
from cfsfl_fast.distributed import Group
from cfsfl_fast.interactions import as_interactions
from cfsfl_fast.recommenders import RECOMMENDERS, awae
from cfsfl_fast.runs import Run
from cfsfl_fast.training import Noise, joint_step, recommender_step, view
from cfsfl_fast.updates import Optimisers, Updates, run_epoch
from tests.conftest import clusters

SIZES = {"steps": 2, "top_k": 6, "hidden_dim": 24, "latent_dim": 8, "lookup_dim": 8, "feedback_dim": 8}
NAMES = sorted(RECOMMENDERS)
M = 40


def build(name: str, **choices: Any) -> CFSFL:
    """A small model whose feedback matters (Wv is zero at birth)."""
    config = CFSFLConfig(**{**SIZES, "recommender": name, "batch_size": 30, "anneal_steps": 100, **choices})
    torch.manual_seed(0)
    model = CFSFL.from_config(M, config)
    torch.nn.init.normal_(model.recommender.input.feedback)
    torch.nn.init.normal_(model.recommender.output.bias, std=0.3)
    for old in model.recommender.buffers():  # an encoder that has moved on since
        old.add_(torch.randn_like(old), alpha=0.1)
    return model


def dense(x: Any) -> Tensor:
    rows = torch.zeros(len(x), x.n_items, dtype=torch.float64)
    rows[x.rows, x.items] = 1
    return rows


def test_the_config_knows_every_recommender() -> None:
    assert set(RECOMMENDER_NAMES) == set(RECOMMENDERS)
    shown = CliRunner().invoke(cli.main, ["train", "--help"], terminal_width=400).output
    assert f"{', '.join(RECOMMENDER_NAMES)}  [default: vae]" in shown
    assert all(build(name).recommender.label for name in NAMES)


# The losses, written down a second time


def code_of(
    name: str, p: dict[str, Tensor], inner: Tensor, eps: Tensor, x_hat: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """u, the divergence and the latent mean of dense pre-activations, [B, H'], [B], [B, Z], zeros where there is none;
    x_hat: whole histories, for RecVAE's prior.
    """

    def layer(x: Tensor, which: str) -> Tensor:
        return x @ p[f"{which}.weight"].T + p[f"{which}.bias"]

    none = torch.zeros(len(inner), dtype=torch.float64)
    if name in ("mf", "warp"):
        return inner, none, none[:, None]
    if name == "cdae":
        return 1 / (1 + torch.exp(-inner)), none, none[:, None]
    if name == "dae":
        return torch.tanh(layer(torch.tanh(layer(torch.tanh(inner), "code")), "hidden")), none, none[:, None]
    if name == "awae":
        z = layer(torch.tanh(inner), "code")
        return torch.tanh(layer(z, "hidden")), none + discrepancy_of(z.numpy()), z
    if name == "recvae":
        normal, mixture = torch.distributions.Normal, torch.distributions.MixtureSameFamily
        mu, logvar = rec_encoder(p, "encoder", inner)
        old = rec_encoder(p, "old_encoder", x_hat @ p["old_input.weight"] + p["old_input.bias"])
        z, zero = mu + eps * torch.exp(logvar / 2), torch.zeros_like(mu)
        means, deviations = (
            torch.stack([zero, old[0], zero], -1),
            torch.stack([zero, old[1], zero + 10], -1).div(2).exp(),
        )
        prior = mixture(
            torch.distributions.Categorical(torch.tensor([0.15, 0.75, 0.1]).double()), normal(means, deviations)
        )
        return z, (normal(mu, torch.exp(logvar / 2)).log_prob(z) - prior.log_prob(z)).sum(1), mu
    mu, logvar = (inner if name == "vae-linear" else layer(torch.tanh(inner), "code")).chunk(2, 1)
    std = torch.exp(logvar / 2)
    normal = torch.distributions.Normal
    kl = torch.distributions.kl_divergence(normal(mu, std), normal(torch.zeros_like(mu), torch.ones_like(mu))).sum(1)
    z = mu + eps * std
    return (z if name == "vae-linear" else torch.tanh(layer(z, "hidden"))), kl, mu


def discrepancy_of(z: np.ndarray) -> float:
    """MMD^2 between codes [B, Z] and N(0, I), pair by pair, the prior by quadrature: the kernel is a product over Z."""
    n, size = z.shape
    points, weights = np.polynomial.hermite_e.hermegauss(60)
    weights = weights / weights.sum()
    total = 0.0
    for c in (0.25, 1.0, 4.0):
        spread = 2 * c * size
        pairs = [np.exp(-((z[i] - z[j]) ** 2).sum() / spread) for i in range(n) for j in range(n) if i != j]
        crossed = [np.prod([weights @ np.exp(-((v - points) ** 2) / spread) for v in row]) for row in z]
        apart = weights @ np.exp(-((2**0.5 * points) ** 2) / spread)  # y - y' ~ N(0, 2)
        total += np.mean(pairs) - 2 * np.mean(crossed) + apart**size
    return total / 3


def rec_encoder(p: dict[str, Tensor], which: str, inner: Tensor) -> tuple[Tensor, Tensor]:
    """The five layers of RecVAE's encoder, one by one."""

    def norm(i: int, x: Tensor) -> Tensor:
        centred = x - x.mean(1, keepdim=True)
        scaled = centred / (x.var(1, correction=0, keepdim=True) + 0.1).sqrt()
        return scaled * p[f"{which}.norms.{i}.weight"] + p[f"{which}.norms.{i}.bias"]

    def swish(x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)

    def layer(i: int, x: Tensor) -> Tensor:
        return x @ p[f"{which}.layers.{i}.weight"].T + p[f"{which}.layers.{i}.bias"]

    h1 = norm(0, swish(inner))
    h2 = norm(1, swish(layer(0, h1) + h1))
    h3 = norm(2, swish(layer(1, h2) + h1 + h2))
    h4 = norm(3, swish(layer(2, h3) + h1 + h2 + h3))
    h5 = norm(4, swish(layer(3, h4) + h1 + h2 + h3 + h4))
    mu, logvar = (h5 @ p[f"{which}.code.weight"].T + p[f"{which}.code.bias"]).chunk(2, 1)
    return mu, logvar


def likelihood_of(name: str, s: Tensor, x: Tensor, left_out: Tensor) -> Tensor:
    """The reconstruction term of each user. [B]"""
    if name in ("vae", "dae", "recvae", "awae"):
        return -(F.log_softmax(s.masked_fill(left_out > 0, -1e300), 1) * x).sum(1)
    if name == "cdae":
        chosen = torch.where(x > 0, torch.sigmoid(s), 1 - torch.sigmoid(s))  # the probability of what is seen
        return -(torch.log(chosen) * (1 - left_out)).sum(1)
    if name != "warp":
        return (torch.where(x > 0, 5.0, 1.0) * (1 - left_out) * (x - s) ** 2).sum(1)
    losses = []
    for scores, own, gone in zip(s.tolist(), x.tolist(), left_out.tolist(), strict=True):
        loss = 0.0
        for i in (i for i in range(M) if own[i]):
            above = [j for j in range(M) if not own[j] and not gone[j] and scores[j] > scores[i]]
            loss += sum(1 / k for k in range(1, len(above) + 1)) * sum(scores[j] - scores[i] for j in above)
        losses.append(loss)
    return torch.tensor(losses, dtype=torch.float64)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "choices", [{}, {"reading": "full", "kl": "annealed", "code_l1": 0.3}, {"mask_kept": False, "kl": "none"}]
)
def test_supervised_loss_is_that_of_the_specification(name: str, choices: dict[str, Any]) -> None:
    model = build(name, **choices)
    users = torch.arange(7, 37)
    x = as_interactions(clusters(37), M).take(users)
    batch, eps = view(x, users, model.config, 5), Noise(users, 8, False, (5,))
    found = recommender_step(model, batch, eps, step=7)

    p = {n: value.double() for n, value in model.recommender.state_dict().items()}
    encoder = torch.zeros(30, M, dtype=torch.float64)
    encoder[batch.encoded.rows, batch.encoded.items] = batch.weights.double()
    x_hat = F.normalize(dense(x))
    u, kl, mu = code_of(name, p, encoder @ p["input.weight"] + p["input.bias"], eps(0).double(), x_hat)
    scores = u @ p["output.weight"].T + p["output.bias"]
    masked = model.config.reading == "heldout" and model.config.mask_kept
    left_out = dense(batch.seen) if masked else torch.zeros_like(encoder)
    cap = 0.05 if name in ("vae-gaussian", "vae-linear") else 0.2
    ramp = min(cap, 0.07)
    gamma = 0.005 if name == "recvae" else 0.0025
    weight = {"per_user": gamma * ramp / cap * dense(x).sum(1), "annealed": ramp, "none": 0.0}[model.config.kl]
    if name == "awae":
        weight = 0.0 if model.config.kl == "none" else model.config.mmd_weight
    l1 = float(model.config.code_l1) * mu.abs().sum(1)
    expected = (likelihood_of(name, scores, dense(batch.targets), left_out) + weight * kl + l1).mean()
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_nobody_in_a_batch_changes_no_loss(name: str) -> None:
    model, users = build(name), torch.arange(20)
    padded = torch.cat([users, users.new_full((10,), -1)])
    found = []
    for some in (users, padded):
        x = as_interactions(sp.vstack([clusters(20), sp.csr_matrix((len(some) - 20, M))]).tocsr(), M)
        found.append(recommender_step(model, view(x, some, model.config, 5), Noise(some, 8, False, (5,)), 7))
    assert torch.isclose(*found, rtol=1e-6)


# In the loop


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("reading", ["heldout", "full"])
def test_every_gradient_of_an_update_is_the_specifications(name: str, reading: str) -> None:
    model = build(name, reading=reading).double()
    users = torch.arange(30)
    batch = view(as_interactions(clusters(30), M), users, model.config, 5)
    gradients = {}
    for backend in ("torch", "reference"):
        with backends.use_backend(backend):
            loss, _ = joint_step(model, batch._replace(weights=batch.weights.double()), _Double(users), 7)
            named = {n: q for n, q in model.named_parameters() if not n.startswith("reward.")}
            gradients[backend] = torch.autograd.grad(loss, list(named.values()))
    for which, found, expected in zip(named, *gradients.values(), strict=True):
        assert torch.allclose(found, expected, atol=1e-9), which
        assert bool(expected.any()), which


class _Double(Noise):
    def __init__(self, users: Tensor) -> None:
        super().__init__(users, 8, False, (5,))

    def __call__(self, t: int) -> Tensor:
        return super().__call__(t).double()


@pytest.mark.parametrize("name", NAMES)
def test_feedback_enters_and_starts_at_nothing(name: str) -> None:
    x = clusters(23)
    model = build(name).eval()
    assert not torch.allclose(model(x), model(x, steps=0), atol=1e-3)
    torch.manual_seed(0)
    born = CFSFL(M, recommender=name, steps=3, hidden_dim=16, latent_dim=4).eval()
    assert torch.equal(born(x), born(x, steps=0))


@pytest.mark.parametrize("name", NAMES)
def test_one_user_or_a_batch(name: str) -> None:
    model, x = build(name).eval(), clusters(23)
    ids, scores = model.recommend(x, 10)
    for user in (0, 11, 22):
        alone = model.recommend(x[user], 10)
        assert torch.equal(alone[0][0], ids[user])
        assert torch.equal(alone[1][0], scores[user])


@pytest.mark.parametrize("name", NAMES)
def test_training_finds_the_clusters(name: str, tmp_path: Path) -> None:
    data = split_events(matrix_events(clusters(400), "clusters"), Protocol(held_out=40))
    config = CFSFLConfig(
        **{**SIZES, "recommender": name, "batch_size": 32, "epochs": (20, 1, 2)},
        learning_rate=1e-2,
        joint_learning_rate=1e-3,
    )
    report = Run(data, tmp_path / "run", config, show_progress=False).train()
    label = RECOMMENDERS[name](M, 4, 4, 4).label
    assert list(report["test"]) == ["most popular", label, f"{label}, trained on", "CF-SFL"]
    popular, *found = (figures["Recall@20"][0] for figures in report["test"].values())
    assert popular < 0.7
    assert min(found) > 0.98
    loaded = CFSFL.from_pretrained(tmp_path / "run")
    assert loaded.config.recommender == name
    ids, _ = loaded.recommend(data.test.fold_in, 20)
    again = Run(data, tmp_path / "run", loaded.config, resume=True, show_progress=False)
    again.load("joint")
    assert torch.equal(again.model.recommend(data.test.fold_in, 20)[0], ids)


def test_defaults_of_a_recommender_give_way_to_a_choice() -> None:
    assert CFSFLConfig(recommender="vae-gaussian").kl_cap == 0.05
    assert CFSFLConfig(recommender="vae-gaussian", kl_cap=0.3).kl_cap == 0.3
    assert (CFSFLConfig().kl_cap, CFSFLConfig().l2) == (0.2, 0.01)
    assert CFSFLConfig(recommender="mf").l2 == 0.05
    mf = CFSFLConfig(recommender="mf", l2=0.0)
    assert dataclasses.replace(mf, steps=1).l2 == 0.0
    assert (CFSFLConfig(recommender="cdae").learning_rate, CFSFLConfig(recommender="dae").learning_rate) == (1e-2, 1e-3)
    with pytest.raises(ValueError, match="kl_cap must be at least 0; got -1"):
        CFSFLConfig(kl_cap=-1)
    with pytest.raises(ValueError, match="learning_rate must be \"auto\" or a number; got 'fast'"):
        CFSFLConfig(learning_rate="fast")


def test_a_loss_of_users_without_targets_is_zero_or_what_they_miss() -> None:
    """An empty row: no multinomial or ranked loss; of the others, what every score costs."""
    x = as_interactions(np.zeros((2, M)), M)
    for name in NAMES:
        model = build(name)
        recommender = model.recommender
        code = recommender(recommender.hoist(*x.csr, x.unit_weights()))
        loss, _, _ = recommender.loss(code, model.output_table(), *x.csr)
        costs = {"weighted_squares": torch.square, "logistic": F.softplus}
        if cost := costs.get(recommender.likelihood.__name__):
            scores = F.linear(code.u, recommender.output.weight, recommender.output.bias)
            assert torch.allclose(loss, cost(scores).sum(1), rtol=1e-5)
        else:
            assert loss.tolist() == [0, 0]


# aWAE's codes


def test_awaes_codes_are_as_far_from_the_prior_as_their_distribution() -> None:
    """0 in the mean over samples of the prior, and more for other distributions."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(200, 60, 8, generator=generator, dtype=torch.float64)
    share = torch.full((60,), 1 / 60, dtype=torch.float64)

    def mean(samples: Tensor) -> tuple[float, float]:
        values = torch.stack([(awae.discrepancy(z, share) * share).sum() for z in samples])
        return values.mean().item(), values.std().item() / len(values) ** 0.5

    found, error = mean(drawn)
    assert abs(found) < 3 * error < 1e-3
    for other in (drawn * 0.5, drawn * 2, drawn + 0.5, drawn.abs(), torch.zeros_like(drawn[:2])):
        assert mean(other)[0] > 0.01


def test_awae_leaves_nobody_out_of_its_comparison() -> None:
    z = torch.randn(9, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    share = torch.tensor([1, 0, 1, 1, 0, 1, 0, 1, 1], dtype=torch.float64) / 6
    alone = z[share > 0]
    expected = awae.discrepancy(alone, torch.full((6,), 1 / 6, dtype=torch.float64)).mean()
    assert torch.isclose((awae.discrepancy(z, share) * share).sum(), expected, rtol=1e-12)
    one = torch.nn.functional.one_hot(torch.tensor(3), 9).double()
    last = (awae.discrepancy(z, one) * one).sum()
    width = 8 * torch.tensor(awae.SCALES, dtype=torch.float64)
    crossed = (1 + 1 / width) ** -4 * (z[3].square().sum() / (-2 * (width + 1))).exp()
    assert torch.isclose(last, ((1 + 2 / width) ** -4 - 2 * crossed).mean(), rtol=1e-12)


def test_awae_trains_in_one_process() -> None:
    model = build("awae")
    histories = as_interactions(clusters(30), M)
    group = Group()
    Updates(model, histories, Optimisers(model, "recommender"), "recommender", group)
    group.size = 2
    with pytest.raises(ValueError, match="aWAE compares the users of a batch, which 2 processes would share"):
        Updates(model, histories, Optimisers(model, "recommender"), "recommender", group)


# RecVAE's turns


def test_recvae_trains_encoder_and_decoder_in_turns() -> None:
    model = build("recvae")
    users = torch.arange(160)
    histories = as_interactions(clusters(160), M)
    optimisers = Optimisers(model, "recommender")
    step = 0
    for number in range(1, 9):
        before = {name: value.clone() for name, value in model.state_dict().items()}
        with model.recommender.epoch(number):
            _, step = run_epoch(
                model, histories, optimisers, "recommender", users, (0, 0, number), step, lambda *_: None
            )
        moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
        encoder = {n for n in before if n.startswith(("recommender.input.", "recommender.encoder."))}
        prior = {n for n in before if n.startswith("recommender.old_")}
        decoder = {"recommender.output.weight", "recommender.output.bias"}
        if number % 4:
            assert moved == encoder - {"recommender.input.feedback"}
        else:
            assert moved - prior == decoder
            assert all(torch.equal(before[n.replace("old_", "")], model.state_dict()[n]) for n in prior)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not prior & {name for name, _ in model.named_parameters()}


def test_recvaes_decoder_sees_whole_histories() -> None:
    """In the "full" reading; in the other it has to find what is hidden."""
    x, users = as_interactions(clusters(30), M), torch.arange(30)
    for reading in ("full", "heldout"):
        config = build("recvae", reading=reading).config
        batch = view(x, users, config, 5, denoises=False)
        if reading == "full":
            assert torch.equal(batch.weights, x.unit_weights())
        else:
            assert len(batch.targets.items) > 0
            assert torch.equal(batch.weights, view(x, users, config, 5).weights)
    recommender = build("recvae").recommender
    assert recommender.denoises
    with recommender.epoch(3):
        assert (recommender.phase, recommender.denoises) == ("encoder", True)
    with recommender.epoch(4):
        assert (recommender.phase, recommender.denoises) == ("decoder", False)
    assert (recommender.phase, recommender.denoises) == ("", True)
