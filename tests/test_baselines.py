"""Baselines against what they are defined by: constrained least squares, a known answer, real figures."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from click.testing import CliRunner

from cfsfl_fast import backends, item_item, ops
from cfsfl_fast.baselines import BASELINES, EASE, EDLAE, SLIM, WMF, MostPopular, select
from cfsfl_fast.cli import main
from cfsfl_fast.datasets import Dataset, Protocol, open_dataset, split_events
from cfsfl_fast.datasets.matrices import matrix_events
from cfsfl_fast.evaluation import evaluate
from cfsfl_fast.interactions import Interactions, as_interactions
from cfsfl_fast.item_item import gram, invert, ridge_inverse
from cfsfl_fast.scarcity import check_free
from tests.conftest import clusters

wmf = pytest.mark.skipif(find_spec("implicit") is None, reason="implicit is not installed")
NAMES = [pytest.param(name, marks=wmf) if name == "wmf" else name for name in sorted(BASELINES)]


def ragged(n_users: int = 60, n_items: int = 23, seed: int = 0) -> sp.csr_matrix:
    """Rows of every length, an empty one and a full one; the last item has no user but the full one."""
    random = np.random.default_rng(seed)
    dense = random.random((n_users, n_items)) < random.random((n_users, 1)) * np.linspace(0.9, 0.1, n_items)
    dense[:, -1], dense[0], dense[-1] = False, False, True
    return sp.csr_matrix(dense.astype(np.float32))


def column_by_column(x: np.ndarray, penalty: np.ndarray) -> np.ndarray:
    """The least squares that EASE is: b_j from all other columns, with a penalty on every row of B. [M, M]"""
    n_items = x.shape[1]
    weights = np.zeros((n_items, n_items))
    for j in range(n_items):
        others = np.arange(n_items) != j
        design = np.vstack([x[:, others], np.diag(np.sqrt(penalty[others]))])
        aim = np.concatenate([x[:, j], np.zeros(n_items - 1)])
        weights[others, j] = np.linalg.lstsq(design, aim, rcond=None)[0]
    return weights


@pytest.mark.parametrize("block", [5, 512])
def test_ease_is_the_constrained_least_squares(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(item_item, "BLOCK", block)
    x = ragged()
    found = EASE(x, ridge=3.0).weight.numpy()
    assert np.allclose(found, column_by_column(x.toarray(), np.full(23, 3.0)), atol=1e-6)


def test_edlae_minimises_the_expected_loss_under_dropout() -> None:
    x, p, ridge = ragged(), 0.4, 2.0
    dense = torch.from_numpy(x.toarray()).double()
    found = EDLAE(x, ridge=ridge, dropout=p).weight
    assert np.allclose(
        found.numpy(), column_by_column(dense.numpy(), (ridge + p / (1 - p) * dense.sum(0)).numpy()), atol=1e-6
    )
    # E |x - (x o m / (1 - p)) B|^2 over masks m, every entry kept with probability 1 - p: by all masks of the entries
    # of one user at a time, its gradient off the diagonal is 0.
    weight = found.double().requires_grad_()
    loss = ridge * weight.square().sum()
    for row in dense:
        items = row.nonzero().squeeze(1)
        if len(items) > 12:  # 2^n masks; the variance of a sum of independent terms says the same
            loss = loss + (row - row @ weight).square().sum() + p / (1 - p) * weight[items].square().sum()
            continue
        masks = torch.tensor([[m >> i & 1 for i in range(len(items))] for m in range(1 << len(items))]).double()
        likely = ((1 - p) ** masks.sum(1)) * p ** (len(items) - masks.sum(1))
        loss = loss + (likely[:, None] * (row - masks / (1 - p) @ weight[items]).square()).sum()
    (gradient,) = torch.autograd.grad(loss, weight)
    assert float((gradient * (1 - torch.eye(23))).abs().max()) < 1e-4
    assert torch.equal(EDLAE(x, ridge=ridge, dropout=0.0).weight, EASE(x, ridge=ridge).weight)


@pytest.mark.parametrize("block", [1, 7, 23, 100])
def test_products_of_histories_in_blocks(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(item_item, "BLOCK", block)
    x = ragged()
    weighted = sp.diags(np.linspace(0.5, 2, 60)) @ x
    found = gram(x, weighted.tocsr(), torch.float64, label="products")
    assert np.allclose(found, x.toarray().T @ weighted.toarray(), rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [1, 6, 7, 50])
def test_inverse_where_it_stands(n: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(item_item, "BLOCK", 7)
    rows = torch.randn(80, n, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
    A = rows.T @ rows + torch.eye(n)
    found = A.to(dtype, copy=True)
    invert(found)
    assert torch.equal(found, found.T)
    assert torch.allclose(found.double() @ A, torch.eye(n).double(), atol=1e-10 if dtype == torch.float64 else 1e-4)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("double_rows", [0, 1000], ids=["float32", "float64"])
@pytest.mark.parametrize("n_users", [0, 1, 9, 60])
def test_inverse_by_users_and_by_items(
    n_users: int, double_rows: int, weighted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(item_item, "BLOCK", 7)
    monkeypatch.setattr(item_item, "DOUBLE_ROWS", double_rows)
    x = ragged()[60 - n_users :]
    weights, ridge = np.linspace(0.5, 2, n_users) if weighted else None, np.linspace(0.1, 3, 23)
    W = np.diag(np.ones(n_users) if weights is None else weights)
    expected = np.linalg.inv(x.toarray().T @ W @ x.toarray() + np.diag(ridge))
    inverted = []
    monkeypatch.setattr(item_item, "invert", lambda A, **told: (inverted.append(len(A)), invert(A, **told)))
    for sparse_cost, n_rows in ((0, min(n_users, 23)), (10**9, 23 if n_users else 0)):
        monkeypatch.setattr(item_item, "SPARSE_COST", sparse_cost)
        found = ridge_inverse(x, ridge, weights, label="test")
        assert inverted.pop() == n_rows
        assert found.dtype == torch.float32
        assert torch.equal(found, found.T)
        assert np.allclose(found, expected, rtol=1e-6, atol=1e-6 if double_rows else 1e-4)


def test_a_ridge_without_an_inverse_is_refused_whoever_is_fewer() -> None:
    for n_users in (9, 60):
        with pytest.raises(torch.linalg.LinAlgError):
            ridge_inverse(ragged()[:n_users], np.full(23, -5.0), label="test")


def test_wide_catalogues_are_float32_and_close(monkeypatch: pytest.MonkeyPatch) -> None:
    x = clusters(300)
    expected = EASE(x, ridge=10.0).weight
    monkeypatch.setattr(item_item, "DOUBLE_ROWS", 10)
    assert torch.allclose(EASE(x, ridge=10.0).weight, expected, atol=1e-5)


def test_memory_is_looked_at_before_it_is_taken() -> None:
    with pytest.raises(MemoryError, match=r"EASE takes 1000000000.0 GB; [0-9.]+ GB are free"):
        check_free(10**18, "EASE")
    with pytest.raises(MemoryError, match=r"EASE of 4,000,000 items takes 64000.0 GB; [0-9.]+ GB are free"):
        EASE(sp.csr_matrix((3, 4_000_000), dtype=np.float32))


@pytest.mark.parametrize("backend", ["torch", "cpp"])
@pytest.mark.parametrize(("l1", "l2"), [(0.0, 2.0), (1.0, 0.5), (4.0, 3.0), (50.0, 1.0)])
def test_slims_columns_are_the_non_negative_elastic_nets(backend: str, l1: float, l2: float) -> None:
    if reason := backends.why_not(backend, torch.device("cpu")):
        pytest.skip(reason)
    x = torch.from_numpy(ragged().toarray())
    G = x.T @ x
    with backends.use_backend("reference"):
        expected, _ = ops.slim(G, 3, 23, l1, l2)
    with backends.use_backend(backend):
        found, unfinished = ops.slim(G, 3, 23, l1, l2)
    assert unfinished == 0
    assert torch.allclose(found, expected, atol=2e-4)
    assert bool(expected.any()) == (l1 < 50)
    # The conditions of an optimum: no weight wants to move, those at 0 none but down.
    G = G.double() + l2 * torch.eye(23)
    for w, j in zip(found.double(), range(3, 23), strict=True):
        pull = G[j] - l2 * torch.eye(23)[j] - G @ w - l1
        pull[j] = 0
        assert float(pull[w > 0].abs().max() if w.any() else 0) < 0.02
        assert float(pull.max()) < 0.02
        assert w[j] == 0


def test_slim_is_scikit_learns_elastic_net() -> None:
    linear_model = pytest.importorskip("sklearn.linear_model", reason="scikit-learn is not installed")
    x, l1, l2 = ragged(), 2.0, 5.0
    fitted = SLIM(x, l1=l1, l2=l2).weight.toarray()
    dense, n = x.toarray().astype(np.float64), x.shape[0]
    for j in range(23):
        net = linear_model.ElasticNet(
            alpha=(l1 + l2) / n, l1_ratio=l1 / (l1 + l2), positive=True, fit_intercept=False, tol=1e-8, max_iter=10_000
        )
        others = np.arange(23) != j
        assert np.allclose(fitted[others, j], net.fit(dense[:, others], dense[:, j]).coef_, atol=2e-4)
        assert fitted[j, j] == 0


def weighted_squares(x: np.ndarray, alpha: float, ridge: float, fixed: np.ndarray) -> np.ndarray:
    """For every row of x the u of least sum_j c_j (x_j - < u, y_j >)^2 + ridge |u|^2, by ordinary least squares: rows
    sqrt(c_j) y_j with the aims sqrt(c_j) x_j, and sqrt(ridge) I with 0.
    """
    found = []
    for row in x:
        root = np.sqrt(np.where(row > 0, alpha, 1.0))
        width = fixed.shape[1]
        rows = np.vstack([root[:, None] * fixed, ridge**0.5 * np.eye(width)])
        found.append(np.linalg.lstsq(rows, np.concatenate([root * row, np.zeros(width)]), rcond=None)[0])
    return np.array(found)


@wmf
def test_wmf_is_where_neither_factor_wants_to_move() -> None:
    """As users' factors are folded in, so items' are those of the weighted squares, where the iterations have ended."""
    x, alpha, ridge = ragged(), 3.0, 2.0
    fitted = WMF(x, factors=4, alpha=alpha, ridge=ridge, iterations=200)
    dense, Y = x.toarray().astype(np.float64), fitted.weight.double().numpy()
    users = fitted.user_factors(as_interactions(x, 23)).double().numpy()
    assert np.allclose(users, weighted_squares(dense, alpha, ridge, Y), atol=1e-5)
    assert not users[0].any()  # without a history
    assert np.allclose(Y, weighted_squares(dense.T, alpha, ridge, users), atol=1e-3)
    assert np.abs(Y).max() > 0.1
    ids, scores = fitted.recommend(as_interactions(x, 23), 5)
    expected = np.where(dense > 0, -np.inf, users @ Y.T)
    assert np.allclose(scores[1:-1], -np.sort(-expected[1:-1], axis=1)[:, :5], atol=1e-5)
    assert bool((ids[-1] == -1).all())


@wmf
def test_wmf_folds_in_as_implicit_does() -> None:
    from implicit.cpu.als import AlternatingLeastSquares

    x = ragged()
    fitted = WMF(x[:40], factors=6, alpha=4.0, ridge=1.5, seed=3)
    als = AlternatingLeastSquares(6, 1.5, 4.0, random_state=3)
    als.fit(x[:40], show_progress=False)
    assert np.allclose(fitted.weight, als.item_factors, atol=1e-5)
    expected = als.recalculate_user(np.arange(20), x[40:])
    assert np.allclose(fitted.user_factors(as_interactions(x[40:], 23)), expected, atol=1e-5)
    assert torch.equal(WMF(x[:40], factors=6, alpha=4.0, ridge=1.5, seed=3).weight, fitted.weight)
    assert not torch.allclose(WMF(x[:40], factors=6, alpha=4.0, ridge=1.5, seed=4).weight, fitted.weight, atol=1e-3)


def test_wmf_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "implicit.cpu.als", None)
    with pytest.raises(ImportError, match=r"WMF needs implicit .*: pip install 'cfsfl-fast\[implicit\]'"):
        WMF(ragged())


@pytest.mark.parametrize("name", NAMES)
def test_the_known_answer(name: str) -> None:
    data = split_events(matrix_events(clusters(400), "clusters"), Protocol(held_out=40))
    fitted = BASELINES[name](data.train)
    judged = evaluate(fitted.recommend, data.test.fold_in, data.test.targets)
    recall = judged.summary()["Recall@20"].value
    assert recall < 0.7 if name == "most popular" else recall > 0.98


@pytest.mark.parametrize("name", NAMES)
def test_lists_are_sorted_whole_and_without_what_was_seen(name: str) -> None:
    x = ragged()
    fitted = BASELINES[name](x)
    rows = as_interactions(x, 23)
    ids, scores = fitted.recommend(rows, 23)
    assert ids.dtype == torch.int64
    for user, (listed, values) in enumerate(zip(ids.tolist(), scores.tolist(), strict=True)):
        own = set(x[user].indices.tolist())
        kept = [i for i in listed if i >= 0]
        assert sorted([*kept, *own]) == list(range(23))
        assert listed[len(kept) :] == [-1] * len(own)
        assert values[len(kept) :] == [-math.inf] * len(own)
        order = sorted(zip(kept, values, strict=False), key=lambda pair: (-pair[1], pair[0]))
        assert order == list(zip(kept, values, strict=False))
    some = fitted.recommend(rows.take(torch.tensor([5, 9])), 4)
    assert torch.equal(some[0], ids[[5, 9], :4])
    assert fitted.recommend(rows.take(torch.tensor([], dtype=torch.int64)), 4)[0].shape == (0, 4)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "most popular"])
def test_values_do_not_count_and_nonsense_is_refused(name: str) -> None:
    x = ragged()
    rows = as_interactions(x, 23)
    expected = BASELINES[name](x).recommend(rows, 23)
    weighted = x.copy()
    weighted.data *= 3
    found = BASELINES[name](weighted).recommend(rows, 23)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    x.data[3] = math.nan
    with pytest.raises(ValueError, match="NaN"):
        BASELINES[name](x)


@pytest.mark.parametrize(
    ("name", "choices", "words"),
    [
        ("ease", {"ridge": 0.0}, "ridge must be above 0; got 0"),
        ("ease", {"ridge": math.nan}, "ridge must be above 0; got nan"),
        ("ease", {"alpha": 1}, "EASE has no choice 'alpha'; it has: ridge"),
        ("slim", {"l1": -1.0}, "l1 must be at least 0; got -1"),
        ("slim", {"l1": 0.0, "l2": 0.0}, "one of l1 and l2 must be above 0; got 0 and 0"),
        ("wmf", {"factors": 0}, "factors must be a whole number of at least 1; got 0"),
        ("wmf", {"factors": 2.5}, "factors must be a whole number of at least 1; got 2.5"),
        ("wmf", {"alpha": math.nan}, "alpha must be above 0; got nan"),
        ("wmf", {"ridge": 0.0}, "ridge must be above 0; got 0"),
        ("edlae", {"dropout": 1.0}, r"dropout must be in \[0, 1\); got 1.0"),
    ],
)
def test_wrong_choices_are_refused(name: str, choices: dict[str, float], words: str, toy: Dataset) -> None:
    with pytest.raises(ValueError, match=words):
        select(BASELINES[name], toy, choices)


class Hill(MostPopular):
    """Recommends the most popular items to users for whom its choices are near enough to (1, 30), nothing to others."""

    label = "hill"
    ladders: ClassVar = {"a": (0, 1, 2, 3), "b": (10, 20, 30, 40)}

    def __init__(self, train: Any, *, a: int = 3, b: int = 10, show_progress: bool = False) -> None:
        super().__init__(train)
        self.answered = 8 - abs(a - 1) - abs(b - 30) // 10

    def recommend(self, x: Interactions, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        ids, scores = super().recommend(x, n)
        ids[self.answered :], scores[self.answered :] = -1, -math.inf
        return ids, scores


def test_choices_climb_to_the_best_of_their_neighbours(toy: Dataset) -> None:
    found = select(Hill, toy, {}, show_progress=False)
    assert found.choices == {"a": 1, "b": 30}
    tried = [choices for choices, _ in found.tried]
    assert tried[0] == {"a": 3, "b": 10}
    assert all(tried.count(choices) == 1 for choices in tried)
    assert {"a": 0, "b": 30} in tried
    assert {"a": 1, "b": 40} in tried
    assert len(tried) < 16
    assert found.score == max(score for _, score in found.tried)
    assert select(Hill, toy, {"b": 20}, show_progress=False).choices == {"a": 1, "b": 20}
    assert select(Hill, toy, {"b": 17}, show_progress=False).choices == {"a": 1, "b": 17}  # on no ladder
    assert select(Hill, toy, {}, search=False, show_progress=False).choices == {}


def test_the_end_of_a_ladder_is_told(
    toy: Dataset, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    select(Hill, toy, {}, show_progress=False)
    assert not caplog.records
    monkeypatch.setattr(Hill, "ladders", {"a": (1, 2, 3), "b": (10, 20, 30, 40)})
    select(Hill, toy, {}, show_progress=False)
    assert caplog.messages == ["hill: the best a, 1, ends what was tried (1 to 3): one beyond it may be better"]
    select(Hill, toy, {"a": 1}, show_progress=False)
    assert len(caplog.records) == 1


@pytest.mark.parametrize("name", sorted(BASELINES))
def test_defaults_are_on_their_ladders(name: str) -> None:
    kind = BASELINES[name]
    for choice, ladder in kind.ladders.items():
        assert kind.choices()[choice] in ladder
        assert list(ladder) == sorted(ladder)


def test_the_command_lists_every_choice() -> None:
    lines = CliRunner().invoke(main, ["baseline", "--help"]).output.splitlines()
    for name, kind in BASELINES.items():
        [listed] = [line.strip() for line in lines if line.strip().startswith(f"{name} ")]
        assert listed.count(" = ") == len(kind.choices())
        assert all(f"{choice} = {default:g}" in listed for choice, default in kind.choices().items())


def test_the_command(toy: Dataset, toy_folder: Path, tmp_path: Path) -> None:
    def cfsfl(*arguments: object) -> tuple[int, str]:
        result = CliRunner().invoke(main, ["baseline", *map(str, arguments)])
        return result.exit_code, result.output

    code, output = cfsfl("ease", toy_folder, "--out", tmp_path / "ease")
    assert code == 0, output
    report = json.loads((tmp_path / "ease" / "report.json").read_text())
    assert report["system"] == "EASE"
    assert 3 <= len(report["tried"]) <= len(EASE.ladders["ridge"])
    best = max(report["tried"], key=lambda tried: tried["NDCG@100"])
    assert report["choices"] == {"ridge": best["ridge"]}
    assert report["validation"]["NDCG@100"][0] == best["NDCG@100"]
    fitted = EASE(toy.train, ridge=best["ridge"])
    judged = evaluate(fitted.recommend, toy.test.fold_in, toy.test.targets)
    assert report["test"]["EASE"]["NDCG@100"][0] == judged.summary()["NDCG@100"].value
    with np.load(tmp_path / "ease" / "users.npz", allow_pickle=False) as users:
        assert np.array_equal(users["EASE/NDCG@100"], judged.ndcg100.numpy())
    assert cfsfl("ease", toy_folder, "--out", tmp_path / "ease")[0] == 2
    code, output = cfsfl("edlae", toy_folder, "--out", tmp_path / "edlae", "--set", "ridge=7", "--set", "dropout=0.5")
    assert code == 0, output
    assert "EDLAE, ridge = 7, dropout = 0.5, fitted in" in output
    assert len(json.loads((tmp_path / "edlae" / "report.json").read_text())["tried"]) == 1
    assert "has no choice 'x'" in cfsfl("ease", toy_folder, "--out", tmp_path / "new", "--set", "x=1")[1]
    assert (
        "--set takes NAME=NUMBER; got 'ridge'"
        in cfsfl("ease", toy_folder, "--out", tmp_path / "n", "--set", "ridge")[1]
    )


def test_ease_on_real_data(real_data: Callable[[str], Path]) -> None:
    data = open_dataset(real_data("ml-1m.npz"))
    judged = evaluate(EASE(data.train, ridge=500.0).recommend, data.test.fold_in, data.test.targets)
    found = {name: round(mean.value, 4) for name, mean in judged.summary().items()}
    assert found == {"Recall@20": 0.3564, "Recall@50": 0.4787, "NDCG@100": 0.4263}
