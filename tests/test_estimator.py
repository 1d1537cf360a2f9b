"""CFSFLRecommender: what code written for `implicit` and scikit-learn expects, and what odd input comes to."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from cfsfl_fast import CFSFL, CFSFLConfig, CFSFLRecommender
from cfsfl_fast.datasets import Dataset
from cfsfl_fast.evaluation import evaluate
from cfsfl_fast.holdout import held_out, hide, set_aside
from cfsfl_fast.interactions import as_interactions
from cfsfl_fast.runs import Run
from cfsfl_fast.stages import Epoch
from tests.conftest import clusters

SMALL: dict[str, Any] = {
    "steps": 2, "top_k": 6, "hidden_dim": 24, "latent_dim": 8, "lookup_dim": 8, "feedback_dim": 8,
    "batch_size": 32, "epochs": (20, 1, 2), "learning_rate": 1e-2, "joint_learning_rate": 1e-3, "random_state": 0,
}  # fmt: skip
X = clusters()
M = X.shape[1]


@pytest.fixture(scope="module")
def fitted() -> CFSFLRecommender:
    return CFSFLRecommender(**SMALL).fit(X)


def weights(estimator: CFSFLRecommender) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in estimator.model_.state_dict().items()}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# The signatures of implicit


@pytest.mark.parametrize("name", ["fit", "recommend", "similar_items"])
def test_signatures_are_those_of_implicit(name: str) -> None:
    base = pytest.importorskip("implicit.recommender_base", reason="pip install implicit")
    theirs, mine = (inspect.signature(getattr(c, name)).parameters for c in (base.RecommenderBase, CFSFLRecommender))
    shared = [(p.name, p.default, p.kind) for p in list(mine.values())[: len(theirs)]]
    assert shared == [(p.name, p.default, p.kind) for p in theirs.values()]
    assert all(p.kind is p.KEYWORD_ONLY for p in list(mine.values())[len(theirs) :])


def test_implicits_evaluation_runs_on_it(fitted: CFSFLRecommender) -> None:
    evaluation = pytest.importorskip("implicit.evaluation", reason="pip install implicit")
    train, test = evaluation.train_test_split(X, random_state=1)
    found = evaluation.ranking_metrics_at_k(fitted, train, test, K=5, show_progress=False)
    users = np.flatnonzero(np.diff(test.indptr))
    ids, _ = fitted.recommend(users, train[users], N=5)
    hits = np.array([np.isin(row, test[u].indices) for row, u in zip(ids, users, strict=True)])
    likes = np.minimum(np.diff(test.indptr)[users], 5)
    assert found["precision"] == pytest.approx(hits.sum() / likes.sum())
    discount = 1 / np.log2(np.arange(2, 7))
    assert found["ndcg"] == pytest.approx(((hits * discount).sum(1) / discount.cumsum()[likes - 1]).mean())
    assert found["precision"] > 0.8, "what a user misses is the rest of their cluster"


def test_one_user_and_many(fitted: CFSFLRecommender) -> None:
    ids, scores = fitted.recommend(np.array([3, 8, 5]), X[[3, 8, 5]], N=4)
    assert (ids.shape, ids.dtype, scores.shape, scores.dtype) == ((3, 4), np.int32, (3, 4), np.float32)
    for row, user in enumerate([3, 8, 5]):
        one, score = fitted.recommend(user, X[user], N=4)
        assert one.tolist() == ids[row].tolist()
        assert score.tolist() == scores[row].tolist()
        assert one.shape == (4,)
        assert all(i % 4 == user % 4 for i in one[:2]), "users like one item in four"
        assert not set(one) & set(X[user].indices)


def test_filters(fitted: CFSFLRecommender) -> None:
    ids, scores = fitted.recommend(0, X[0], N=M, filter_already_liked_items=False)
    assert sorted(ids) == list(range(M))
    without, _ = fitted.recommend(0, X[0], N=5, filter_already_liked_items=False, filter_items=ids[:3])
    assert without.tolist() == ids[3:8].tolist()
    assert fitted.recommend(0, X[0], 5, False, (int(ids[0]), int(ids[1])))[0].tolist() == ids[2:7].tolist()
    chosen, values = fitted.recommend(0, X[0], filter_already_liked_items=False, items=[9, 2, 30])
    assert chosen.tolist() == [i for i in ids if i in (2, 9, 30)]
    assert values.tolist() == pytest.approx(scores[np.isin(ids, [2, 9, 30])].tolist(), rel=1e-6)
    padded, low = fitted.recommend(0, X[0], N=M)
    assert padded.tolist() == [i for i in ids if i not in X[0].indices] + [-1] * X[0].nnz
    assert np.isneginf(low[-X[0].nnz :]).all()
    with pytest.raises(ValueError, match="items and filter_items"):
        fitted.recommend(0, X[0], items=[1], filter_items=[2])
    same = fitted.recommend(0, X[0], recalculate_user=True)[0]
    assert same.tolist() == fitted.recommend(0, X[0])[0].tolist()


def test_similar_items(fitted: CFSFLRecommender) -> None:
    table = fitted.model_.recommender.output.weight.detach().double()
    table = table / table.norm(dim=1, keepdim=True)
    ids, scores = fitted.similar_items(7, N=6)
    assert ids[0] == 7
    assert np.allclose(scores, (table @ table[7])[ids.tolist()], atol=1e-6)
    assert np.allclose(scores, np.sort((table @ table[7]).numpy())[::-1][:6], atol=1e-6)
    assert all(i % 4 == 3 for i in ids[:4]), "neighbours are of one cluster"
    many, _ = fitted.similar_items([7, 2], N=6)
    assert many[0].tolist() == ids.tolist()
    assert fitted.similar_items(7, N=5, filter_items=[7])[0].tolist() == ids[1:].tolist()
    listed, _ = fitted.similar_items(7, items=[int(ids[4]), int(ids[2]), 7])
    assert listed.tolist() == [7, ids[2], ids[4]]
    everything, low = fitted.similar_items(7, N=M + 2)
    assert everything[-2:].tolist() == [-1, -1]
    assert np.isneginf(low[-2:]).all()
    with pytest.raises(NotImplementedError):
        fitted.similar_items(7, recalculate_item=True)
    with pytest.raises(ValueError, match=f"itemid must be 0 to {M - 1}; got {M}"):
        fitted.similar_items(M)


def test_explain_is_what_leaving_one_out_changes(fitted: CFSFLRecommender) -> None:
    user, item = 6, 2
    total, changes, _ = fitted.explain(user, X, item)
    assert total == pytest.approx(fitted.model_(X[user])[0, item].item(), rel=1e-5)
    for left_out, change in changes:
        history = X[user].toarray()
        history[0, left_out] = 0
        assert change == pytest.approx(total - fitted.model_(history)[0, item].item(), abs=1e-5)
    assert [c for _, c in changes] == sorted((c for _, c in changes), reverse=True)
    assert {i for i, _ in changes} <= set(X[user].indices)
    assert len(fitted.explain(0, X[user], item, N=3).top_contributions) == 3
    assert fitted.explain(user, X[user], item) == fitted.explain(user, X, item)
    assert fitted.explain(0, sp.csr_matrix((1, M)), item).top_contributions == []


def test_trace_shows_every_turn(fitted: CFSFLRecommender) -> None:
    turns = fitted.trace(X[:5], N=4)
    assert turns.ids.shape == (3, 5, 4)
    assert turns.rewards.shape == (3, 5)
    assert ((turns.rewards > 0) & (turns.rewards < 1)).all()
    for t in range(3):
        ids, _ = fitted.model_.recommend(X[:5], 4, steps=t)
        assert turns.ids[t].tolist() == ids.tolist()
    assert fitted.trace(X[0].toarray()[0]).ids.shape == (3, 1, 6), "a list has top_k items"


# scikit-learn


def test_sklearn_clones_it() -> None:
    base = pytest.importorskip("sklearn.base", reason="pip install scikit-learn")
    estimator = CFSFLRecommender(steps=3, epochs=(1, 0, 2), random_state=5)
    copy = base.clone(estimator)
    assert copy is not estimator
    assert copy.get_params() == estimator.get_params()
    assert not hasattr(base.clone(CFSFLRecommender(**{**SMALL, "epochs": (1, 0, 0)}).fit(X)), "model_")


def test_sklearn_searches_over_it() -> None:
    selection = pytest.importorskip("sklearn.model_selection", reason="pip install scikit-learn")
    search = selection.GridSearchCV(CFSFLRecommender(**SMALL), {"epochs": [(0, 0, 0), (15, 0, 0)]}, cv=2)
    search.fit(X)
    assert search.best_params_ == {"epochs": (15, 0, 0)}
    untrained, trained = search.cv_results_["mean_test_score"]
    assert trained > untrained + 0.1
    assert search.best_estimator_.score(X) == search.score(X)


def test_parameters() -> None:
    estimator = CFSFLRecommender(steps=4, latent_dim=7)
    assert estimator.get_params()["steps"] == 4
    assert estimator.get_params()["hidden_dim"] == CFSFLConfig().hidden_dim
    assert repr(estimator) == "CFSFLRecommender(steps=4, latent_dim=7)"
    assert estimator.set_params(steps=1).get_params()["steps"] == 1
    assert inspect.signature(CFSFLRecommender).parameters["top_k"].default == CFSFLConfig().top_k
    paper = CFSFLRecommender.from_config(CFSFLConfig.preset("paper"))
    assert paper.get_params()["reading"] == "full"
    for act in (lambda: CFSFLRecommender(stepz=1), lambda: estimator.set_params(stepz=1)):
        with pytest.raises(ValueError, match="no parameter 'stepz'"):
            act()
    with pytest.raises(ValueError, match="top_k must be at least 1; got 0"):
        CFSFLRecommender(top_k=0).fit(X)


@pytest.mark.parametrize("make", [np.random.RandomState, np.random.default_rng, np.int64])
def test_random_state(make: Callable[[int], Any]) -> None:
    small = {**SMALL, "epochs": (1, 0, 0)}
    first, again, other = (CFSFLRecommender(**{**small, "random_state": make(s)}).fit(X) for s in (3, 3, 4))
    assert equal(weights(first), weights(again))
    assert not equal(weights(first), weights(other))
    free = CFSFLRecommender(**{**small, "random_state": None}).fit(X)
    seed = free.model_.config.seed
    assert equal(weights(free), weights(CFSFLRecommender(**{**small, "random_state": seed}).fit(X)))


# Learning


def test_the_same_weights_as_a_run_in_a_folder(toy: Dataset, tmp_path: Path) -> None:
    estimator = CFSFLRecommender(**SMALL).fit(toy.train, validation=toy.validation)
    run = Run(toy, tmp_path / "run", CFSFLConfig(**{n: v for n, v in SMALL.items() if n != "random_state"}))
    run.train()
    assert equal(weights(estimator), {n: t for n, t in CFSFL.from_pretrained(tmp_path / "run").state_dict().items()})
    loaded = CFSFLRecommender.load(tmp_path / "run")
    assert equal(weights(loaded), weights(estimator))
    assert loaded.get_params()["steps"] == 2


def test_callbacks_and_no_bars_without_a_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    told: list[tuple[int, float, float]] = []
    epochs: list[Epoch] = []
    small = {**SMALL, "epochs": (3, 1, 2)}
    estimator = CFSFLRecommender(**small).fit(
        X, callback=lambda *a: told.append(a), on_epoch=epochs.append, validation=0.2
    )
    assert [t[0] for t in told] == list(range(6))
    assert [(e.stage, e.epoch) for e in epochs] == [
        *(("recommender", i) for i in range(4)), ("reward", 1), *(("joint", i) for i in range(3)),
    ]  # fmt: skip
    assert [t[2] for t in told] == [e.figures.get("loss", e.figures.get("reward_loss")) for e in epochs if e.epoch]
    assert all(e.validation for e in epochs if e.stage != "reward")
    assert estimator.history_ == epochs
    assert capfd.readouterr() == ("", "")


def test_the_best_validated_epoch_is_kept() -> None:
    rows, aside = set_aside(as_interactions(X, M), 30, 0)
    assert len(rows) == 130
    estimator = CFSFLRecommender(**SMALL).fit(X, validation=30)
    best = max(e.validation["NDCG@100"].value for e in estimator.history_ if e.stage == "joint" and e.validation)
    assert aside is not None
    assert estimator.evaluate(aside.fold_in, aside.targets)["NDCG@100"].value == best


def test_validation_of_every_form(toy: Dataset) -> None:
    small = {**SMALL, "epochs": (2, 0, 0)}
    pair = toy.validation.fold_in, toy.validation.targets
    a = CFSFLRecommender(**small).fit(toy.train, validation=toy.validation)
    b = CFSFLRecommender(**small).fit(toy.train, validation=(pair[0].tocoo(), pair[1].toarray()))
    assert equal(weights(a), weights(b))
    c = CFSFLRecommender(**small).fit(toy.train, validation=0.25)
    assert not equal(weights(a), weights(c)), "users that are set aside do not train"
    for bad, words in [
        ((pair[0], pair[1][:3]), r"got \[18, 40\] and \[3, 40\]"),
        ((pair[0].T, pair[1].T), r"\[B, 40\]; got shape \(40, 18\)"),
        (1.5, "1 to 119 of 120 users; got 1.5"),
        (120, "1 to 119 of 120 users"),
        ("some", "got str"),
        (True, "got bool"),
    ]:
        with pytest.raises(ValueError, match=words):
            CFSFLRecommender(**small).fit(toy.train, validation=bad)


def test_hidden_items_are_a_fifth_of_each_history() -> None:
    rows = as_interactions(sp.vstack([X, sp.csr_matrix(([1.0] * 4, ([0] * 4, [1, 2, 3, 9])), (1, M))]), M)
    hidden = hide(rows, 0)
    assert hidden.user_ids.tolist() == [u for u in range(160) if X[u].nnz >= 5], "the user of 4 items is left out"
    assert (hidden.fold_in + hidden.targets != X[hidden.user_ids]).nnz == 0
    assert np.diff(hidden.targets.indptr).tolist() == [int(X[u].nnz * 0.2) for u in hidden.user_ids]
    assert (hide(rows, 0).targets != hidden.targets).nnz == 0
    assert (hide(rows, 1).targets != hidden.targets).nnz > 0
    with pytest.raises(ValueError, match="none of 1 users has 5 items"):
        hide(rows.take(torch.tensor([160])), 0)


def test_evaluate_and_score(fitted: CFSFLRecommender, toy: Dataset) -> None:
    found = fitted.evaluate(toy.test.fold_in, toy.test.targets)
    same = evaluate(fitted.model_.recommend, toy.test.fold_in, toy.test.targets).summary()
    assert found == same
    assert fitted.score(toy.test.fold_in, toy.test.targets) == same["NDCG@100"].value
    hidden = hide(as_interactions(X, M), 0)
    assert fitted.score(X.tocoo()) == fitted.score(hidden.fold_in, hidden.targets)
    with pytest.raises(ValueError, match="no user of 2 has a target"):
        fitted.score(X[:2], sp.csr_matrix((2, M)))
    with pytest.raises(ValueError, match="must have the same users"):
        held_out(X[:2], X[:3], M)


def test_partial_fit_goes_on() -> None:
    estimator = CFSFLRecommender(**SMALL).fit(X)
    before, loss = weights(estimator), estimator.history_[-1].figures["loss"]
    estimator.partial_fit(X[::2]).partial_fit(X, epochs=4)
    assert [e.epoch for e in estimator.history_ if e.stage == "joint"] == list(range(1, 8))
    assert estimator.history_[-1].figures["loss"] < loss
    assert not equal(before, weights(estimator))
    again = CFSFLRecommender(**SMALL).fit(X).partial_fit(X[::2]).partial_fit(X, epochs=4)
    assert equal(weights(estimator), weights(again))
    plain = CFSFLRecommender(**{**SMALL, "steps": 0}).fit(X).partial_fit(X)
    assert plain.history_[-1].stage == "control"
    with pytest.raises(ValueError, match=r"one column per item, \[B, 40\]; got shape \(160, 39\)"):
        estimator.partial_fit(X[:, :39])


def test_save_and_load(fitted: CFSFLRecommender, tmp_path: Path) -> None:
    fitted.save(tmp_path / "model")
    loaded = CFSFLRecommender.load(str(tmp_path / "model"))
    assert equal(weights(loaded), weights(fitted))
    for a, b in zip(loaded.recommend([0, 1], X[:2]), fitted.recommend([0, 1], X[:2]), strict=True):
        assert a.tolist() == b.tolist()
    automatic = "anneal_steps", "code_l1", "kl_cap", "kl_gamma", "l2"
    settled = {name: getattr(fitted.model_.config, name) for name in automatic}
    assert loaded.get_params() == {**fitted.get_params(), **settled}
    loaded.partial_fit(X)
    with pytest.raises(FileNotFoundError):
        CFSFLRecommender.load(tmp_path / "nothing")


# Odd input


def test_what_says_the_same_gives_the_same(fitted: CFSFLRecommender) -> None:
    small = {**SMALL, "epochs": (1, 0, 0)}
    wanted = weights(CFSFLRecommender(**small).fit(X))
    with_zeros = X.tocoo(copy=True)
    rows, columns = np.append(with_zeros.row, [0, 1]), np.append(with_zeros.col, [1, 0])
    values = np.append(with_zeros.data, [0.0, 0.0])
    absent = sp.csr_matrix((values, (rows, columns)), X.shape)
    assert absent.nnz > X.nnz
    twice = sp.coo_matrix((np.append(values, 1.0), (np.append(rows, rows[0]), np.append(columns, columns[0]))), X.shape)
    wide = X.copy()
    wide.indices, wide.indptr = wide.indices.astype(np.int64), wide.indptr.astype(np.int64)
    unsorted = X.copy()
    for a, b in zip(unsorted.indptr, unsorted.indptr[1:], strict=False):
        unsorted.indices[a:b] = unsorted.indices[a:b][::-1]
    unsorted.has_sorted_indices = False
    forms = [
        X.tocsc(), X.tocoo(), sp.csr_array(X), X.tolil(), X.toarray(), X.toarray().astype(np.uint16), X * 3.5,
        X.astype(bool), X.astype(np.uint32), X.astype(np.longdouble), torch.from_numpy(X.toarray()).to_sparse_csc(),
        torch.from_numpy(X.toarray()), np.ma.masked_array(X.toarray() + 1, X.toarray() == 0), absent, twice, wide,
        unsorted, as_interactions(X, M),
    ]  # fmt: skip
    ids = fitted.recommend(np.arange(160), X)[0]
    for form in forms:
        assert equal(weights(CFSFLRecommender(**small).fit(form)), wanted), type(form)
        assert np.array_equal(fitted.recommend(range(160), form)[0], ids), type(form)
    row = sp.csr_array(X)[[4]].toarray()[0]
    assert fitted.recommend(4, row)[0].tolist() == ids[4].tolist()
    assert fitted.recommend(np.int64(4), sp.coo_array(row))[0].tolist() == ids[4].tolist()


class Table:
    """What a DataFrame looks like from outside."""

    shape = (160, 3)


@pytest.mark.parametrize(
    ("act", "error", "words"),
    [
        (lambda e: e.fit(Table()), TypeError, r"got Table of shape \(160, 3\); scipy.sparse.csr_matrix"),
        (lambda e: e.fit([[0, 1]]), TypeError, "must be a matrix users x items; got list"),
        (lambda e: e.fit((X.indices, X.indptr)), TypeError, "got tuple"),
        (lambda e: e.fit(X.toarray()[0]), ValueError, r"got shape \(40,\)"),
        (lambda e: e.fit(X, X), TypeError, "fit takes no targets"),
        (lambda e: e.fit(sp.csr_matrix((0, 5))), ValueError, r"got shape \(0, 5\)"),
        (lambda e: e.fit(sp.csr_matrix((5, 5))), ValueError, r"\[5, 5\] holds no interaction"),
        (lambda e: e.fit(X * -1.0), ValueError, "negative"),
        (lambda e: e.fit(X * np.nan), ValueError, "NaN"),
        (lambda e: e.fit(X.toarray().astype(object)), TypeError, "got object"),
        (lambda e: e.fit(X.astype(complex)), TypeError, "got complex128"),
        (lambda e: e.recommend(np.arange(40), X.T), ValueError, r"\[B, 40\]; got shape \(40, 160\)"),
        (lambda e: e.recommend(0, X.T), ValueError, r"\[B, 40\]; got shape \(40, 160\)"),
        (lambda e: e.recommend(range(160), X.T[:, :160]), ValueError, "is it items x users"),
        (lambda e: e.recommend(0, X), ValueError, r"\[1, 40\]; got \[160, 40\]: hand in user_items\[userid\]"),
        (lambda e: e.recommend([0, 1], X[0]), ValueError, r"\[2, 40\]; got \[1, 40\]"),
        (lambda e: e.recommend(0, None), ValueError, "nothing is kept per user"),
        (lambda e: e.recommend(0.0, X[0]), ValueError, "userid must be a whole number .* got float64"),
        (lambda e: e.recommend("ann", X[0]), ValueError, "userid must be a whole number"),
        (lambda e: e.recommend(0, X[0], N=-1), ValueError, "at least 0; got -1"),
        (
            lambda e: e.recommend(0, X[0], filter_items=[1.0]),
            ValueError,
            "filter_items must be a whole number or a vector of them; got float64",
        ),
        (lambda e: e.recommend(0, X[0], items=[40]), ValueError, "items must be 0 to 39; got 40"),
        (lambda e: e.recommend(0, X[0], items="a"), ValueError, "items must be a whole number or a vector"),
        (lambda e: e.explain(160, X, 3), ValueError, "userid must be 0 to 159; got 160"),
        (lambda e: e.explain(0, X, 3.0), ValueError, "itemid must be a whole number"),
        (lambda e: e.trace(X, -1), ValueError, "at least 0; got -1"),
        (lambda e: e.evaluate(X, X[:3]), ValueError, r"\[160, 40\] and \[3, 40\]"),
        (lambda e: CFSFLRecommender().recommend(0, X[0]), ValueError, "not fitted yet"),
        (lambda e: CFSFLRecommender(device="tpus").fit(X), ValueError, "device must be .* got 'tpus'"),
        (lambda e: CFSFLRecommender(backend="numpy").fit(X), ValueError, "backend must be .* got 'numpy'"),
        (lambda e: CFSFLRecommender(random_state="x").fit(X), ValueError, "random_state must be .* got 'x'"),
    ],
)
def test_what_is_refused(
    fitted: CFSFLRecommender, act: Callable[[CFSFLRecommender], Any], error: type[Exception], words: str
) -> None:
    before = weights(fitted)
    with pytest.raises(error, match=words):
        act(fitted)
    assert equal(before, weights(fitted)), "what is refused changes nothing"
