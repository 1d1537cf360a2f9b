"""CFSFL: the equations, odd inputs, and what must not change an answer."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from torch import Tensor

from cfsfl_fast import CFSFL, backends, library
from cfsfl_fast.reference import ACTIONS

M = 57


def build(n_items: int = M, seed: int = 0, **choices: object) -> CFSFL:
    """A small model whose feedback matters (Wv is zero at birth)."""
    torch.manual_seed(seed)
    sizes = {"steps": 3, "top_k": 7, "hidden_dim": 20, "latent_dim": 6, "lookup_dim": 8, "feedback_dim": 4}
    model = CFSFL(n_items, **{**sizes, **choices})
    torch.nn.init.normal_(model.recommender.input.feedback)
    return model.eval()


def histories(n_users: int = 23, n_items: int = M, seed: int = 0) -> sp.csr_matrix:
    """Ragged rows: one empty, one full."""
    dense = np.random.default_rng(seed).random((n_users, n_items)) < 0.2
    dense[0], dense[-1] = False, True
    return sp.csr_matrix(dense.astype(np.float32))


def by_the_book(model: CFSFL, x: np.ndarray, steps: int) -> Tensor:
    """The equations in dense float64, line by line. [B, M]"""
    p = {name: value.double() for name, value in model.state_dict().items()}
    dense = torch.from_numpy(x).double()
    x_hat = dense / dense.norm(dim=1, keepdim=True).clamp_min(1e-300)
    mean = dense @ p["lookup.weight"] / dense.sum(1, keepdim=True).clamp_min(1)
    v_hat = torch.zeros(len(x), model.config.feedback_dim, dtype=torch.float64)
    for t in range(steps + 1):
        inner = x_hat @ p["recommender.input.weight"] + v_hat @ p["recommender.input.feedback"]
        code = torch.tanh(inner + p["recommender.input.bias"]) @ p["recommender.code.weight"].T
        mu = (code + p["recommender.code.bias"])[:, : model.config.latent_dim]
        u = torch.tanh(mu @ p["recommender.hidden.weight"].T + p["recommender.hidden.bias"])
        s = u @ p["recommender.output.weight"].T + p["recommender.output.bias"]
        if t == steps:
            return s
        listed = s.masked_fill(dense > 0, -math.inf) if model.config.reading == "heldout" else s
        rows = []
        for user, scores in enumerate(listed.tolist()):
            ranked = sorted((i for i in range(len(scores)) if scores[i] > -math.inf), key=lambda i: (-scores[i], i))
            best = ranked if model.config.action == "softmax" else ranked[: model.config.top_k]
            w = torch.full((len(best),), 1 / max(1, len(best)), dtype=torch.float64)
            if "softmax" in model.config.action and best:
                w = s[user, best].softmax(0)
            rows.append(mean[user] + w @ p["lookup.weight"][best])
        h = torch.stack(rows)
        z = h
        for i in range(4):
            z = z @ p[f"reward.{i}.weight"].T + p[f"reward.{i}.bias"]
            z = z.relu() if i < 3 else z.sigmoid()
        v = torch.cat([h, z], 1)
        for i in range(3):
            v = v @ p[f"feedback.{i}.weight"].T + p[f"feedback.{i}.bias"]
            v = v.relu() if i < 2 else v
        v_hat = v / v.norm(dim=1, keepdim=True).clamp_min(1e-12)
    raise AssertionError


@pytest.mark.parametrize("reading", ["heldout", "full"])
@pytest.mark.parametrize("action", ACTIONS)
def test_scores_are_those_of_the_equations(action: str, reading: str) -> None:
    model, x = build(action=action, reading=reading), histories()
    expected = by_the_book(model, x.toarray(), 3)
    assert torch.allclose(model(x).double(), expected, atol=2e-5)
    plain = by_the_book(model, x.toarray(), 0)
    assert not torch.allclose(expected, plain, atol=1e-3)
    assert torch.allclose(model(x, steps=0).double(), plain, atol=2e-6)


@pytest.mark.parametrize("action", ACTIONS)
def test_backends_agree(action: str) -> None:
    model, x = build(action=action), histories()
    with backends.use_backend("reference"):
        expected = model(x)
    for backend in ("torch", backends.resolve(model.device)):
        with backends.use_backend(backend):
            assert torch.allclose(model(x), expected, atol=1e-5)


def test_feedback_of_a_new_model_changes_nothing() -> None:
    torch.manual_seed(0)
    model = CFSFL(M, steps=4, hidden_dim=16, latent_dim=4).eval()
    assert torch.equal(model(histories()), model(histories(), steps=0))


@pytest.mark.parametrize("action", ACTIONS)
def test_one_user_or_a_batch_in_any_order(action: str) -> None:
    model, x = build(action=action), histories()
    ids, scores = model.recommend(x, 10)
    order = np.random.default_rng(1).permutation(x.shape[0])
    permuted = model.recommend(x[order], 10)
    assert torch.equal(permuted[0], ids[order])
    assert torch.equal(permuted[1], scores[order])
    for user in range(x.shape[0]):
        alone = model.recommend(x[user], 10)
        assert torch.equal(alone[0][0], ids[user])
        assert torch.equal(alone[1][0], scores[user])


def test_recommend_is_the_sorted_forward_without_what_was_seen() -> None:
    model, x = build(), histories()
    ids, scores = model.recommend(x, 12)
    full = model(x).detach().masked_fill(torch.from_numpy(x.toarray() > 0), -math.inf)
    best = full.sort(dim=1, descending=True, stable=True)
    expected = best.indices[:, :12].masked_fill(best.values[:, :12] == -math.inf, -1)
    assert torch.equal(ids, expected)
    assert torch.allclose(scores, best.values[:, :12], atol=1e-5)
    assert ids[-1].tolist() == [-1] * 12  # this user has every item
    assert (ids.dtype, scores.dtype) == (torch.int64, torch.float32)


def test_seen_items_may_stay() -> None:
    model, x = build(), histories()
    ids, _ = model.recommend(x, M, exclude_seen=False)
    assert torch.equal(ids.sort(1).values, torch.arange(M).expand(x.shape[0], M))


@pytest.mark.parametrize("form", [[3, 5, 7], np.array([7, 5, 3, 3]), torch.tensor([3, 5, 7]), {3, 5, 7}])
def test_excluded_items_never_come(form: object) -> None:
    ids, _ = build().recommend(histories(), M, exclude=form)
    assert not np.isin(ids, [3, 5, 7]).any()
    assert (ids[0] >= 0).sum() == M - 3


def test_items_excluded_per_user() -> None:
    x = histories()
    others = sp.csr_matrix(1 - x.toarray())
    ids, scores = build().recommend(x, 5, exclude=others)
    assert bool((ids == -1).all())
    assert bool((scores == -math.inf).all())


def test_only_candidates_come() -> None:
    model, x = build(), histories()
    listed = [50, 4, 4, 9, 30]
    ids, scores = model.recommend(x, 10, candidates=listed, exclude=[9])
    full = model(x).detach().masked_fill(torch.from_numpy(x.toarray() > 0), -math.inf)
    for user in range(x.shape[0]):
        own = sorted((i for i in (4, 30, 50) if full[user, i] > -math.inf), key=lambda i: -float(full[user, i]))
        assert ids[user].tolist() == own + [-1] * (10 - len(own))
    assert bool(((scores == -math.inf) == (ids == -1)).all())
    assert model.recommend(x, 4, candidates=[])[0].tolist() == [[-1] * 4] * x.shape[0]


@pytest.mark.parametrize("n_items", [1, 2, 5])
@pytest.mark.parametrize("action", ACTIONS)
def test_a_list_longer_than_the_catalogue(n_items: int, action: str) -> None:
    model = build(n_items, action=action, top_k=50)
    x = np.eye(3, n_items, dtype=np.float32)
    scores = model(x)
    assert scores.shape == (3, n_items)
    assert torch.allclose(scores.double(), by_the_book(model, x, 3), atol=2e-5)
    ids, _ = model.recommend(x, 10)
    assert ids.shape == (3, 10)
    assert bool((ids[:, n_items:] == -1).all())


def test_an_empty_batch() -> None:
    model = build()
    assert model(np.zeros((0, M))).shape == (0, M)
    ids, scores = model.recommend(np.zeros((0, M)), 4)
    assert ids.shape == scores.shape == (0, 4)


def test_more_users_than_fit_in_a_batch() -> None:
    model = build()
    x = histories(1300)
    ids, _ = model.recommend(x, 3)
    assert torch.equal(ids[700:705], model.recommend(x[700:705], 3)[0])


@pytest.mark.parametrize("reading", ["heldout", "full"])
def test_every_parameter_gets_the_gradient_of_the_specification(reading: str) -> None:
    model, x = build(reading=reading).double(), histories()
    target = torch.randn(x.shape[0], M, dtype=torch.float64)
    gradients = {}
    for backend in ("torch", "reference"):
        with backends.use_backend(backend):
            loss = (model(x) * target).sum()
            gradients[backend] = torch.autograd.grad(loss, list(model.parameters()))
    for (name, _), found, expected in zip(model.named_parameters(), *gradients.values(), strict=True):
        assert torch.allclose(found, expected, atol=1e-9), name
        assert bool(expected.any()), name


def test_before_the_last_step_gradients_touch_only_listed_items() -> None:
    model, x = build(reading="full"), histories()
    trace = model.unroll(x)
    output = model.recommender.output
    dweight, dbias = torch.autograd.grad(trace.feedback.sum(), [output.weight, output.bias])
    listed = torch.zeros(M, dtype=torch.bool)
    listed[trace.ids.flatten()] = True
    assert not bool(listed.all())
    assert not bool(dweight[~listed].any())
    assert not bool(dbias[~listed].any())
    assert bool(dweight[listed].any(1).all())


def test_trace_shows_every_step() -> None:
    model, x = build(), histories()
    trace = model.unroll(x)
    assert trace.ids.shape == (3, 23, 7)
    assert trace.rewards.shape == (3, 23)
    assert trace.feedback.shape == (3, 23, 4)
    first, _ = model.recommend(x, 7, steps=0)
    assert torch.equal(trace.ids[0], first)
    assert model.unroll(x, steps=0).ids.shape == (0, 23, 7)


def test_training_mode_drops_and_samples() -> None:
    model, x = build().train(), histories()
    torch.manual_seed(1)
    one, two = model(x), model(x)
    assert not torch.equal(one, two)
    torch.manual_seed(1)
    assert torch.equal(model(x), one)
    ids, _ = model.recommend(x)
    assert torch.equal(ids, model.eval().recommend(x)[0])


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"n": -1}, "at least 0; got -1"),
        ({"exclude": [M]}, f"0 to {M - 1}; got {M}"),
        ({"candidates": [-2]}, f"0 to {M - 1}; got -2"),
        ({"candidates": [0.5]}, "item ids; got torch.float32"),
        ({"steps": -1}, "steps must be at least 0; got -1"),
        ({"exclude": sp.csr_matrix((3, M))}, "row per user, 23; got 3"),
    ],
)
def test_wrong_use_is_refused(wrong: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        build().recommend(histories(), **wrong)


def test_damaged_weights_are_noticed() -> None:
    model = build()
    with torch.no_grad():
        model.recommender.hidden.weight[0, 0] = math.nan
    with pytest.raises(ValueError, match="NaN"):
        model.recommend(histories())


@pytest.mark.parametrize(
    ("choices", "words"),
    [
        ({"n_items": 0}, "n_items must be at least 1; got 0"),
        ({"steps": -1}, "steps must be at least 0; got -1"),
        ({"top_k": 0}, "top_k must be at least 1; got 0"),
        ({"action": "argmax"}, "action must be one of .*; got 'argmax'"),
        ({"recommender": "gru"}, "recommender must be one of .*; got 'gru'"),
        ({"backend": "cuda"}, "backend must be one of .*; got 'cuda'"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\); got 1.0"),
        ({"depth": 3}, "unknown config field 'depth'"),
    ],
)
def test_wrong_choices_are_refused(choices: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        CFSFL(**{"n_items": 5, **choices})


def test_a_backend_that_cannot_run_says_why() -> None:
    with (
        backends.use_backend("triton"),
        pytest.raises(backends.BackendError, match="'triton' cannot run: the Triton kernels run on"),
    ):
        build()(histories())


def test_gradients_come_from_the_backend_of_the_forward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    sums = library.row_bag_backward
    monkeypatch.setattr(library, "row_bag_backward", lambda *rows: called.append(1) or sums(*rows))
    model = build(backend="torch")
    loss = model(histories()).square().sum()
    loss.backward()  # outside of the model's own choice
    assert len(called) == 3  # input, output and lookup table
