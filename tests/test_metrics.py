"""Metrics against their definitions, and evaluation that does not depend on how it is batched."""

import math

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from cfsfl_fast import metrics
from cfsfl_fast.baselines import MostPopular
from cfsfl_fast.datasets import Dataset
from cfsfl_fast.evaluation import evaluate
from cfsfl_fast.interactions import Interactions, as_interactions
from cfsfl_fast.model import CFSFL


def test_a_case_worked_by_hand() -> None:
    targets = as_interactions((torch.tensor([1, 4, 7, 2]), torch.tensor([0, 3, 4])), 10)
    ids = torch.tensor([[4, 0, 1, 9], [3, 5, -1, -1]])
    hit = metrics.hits(ids, targets)
    assert hit.tolist() == [[True, False, True, False], [False] * 4]
    assert metrics.recall(hit, targets.counts, 2).tolist() == [0.5, 0]
    assert metrics.recall(hit, targets.counts, 4).tolist() == [2 / 3, 0]
    ideal = 1 + 1 / math.log2(3) + 0.5
    assert metrics.ndcg(hit, targets.counts, 4).tolist() == pytest.approx([(1 + 0.5) / ideal, 0])


def test_metrics_equal_a_slow_transcription() -> None:
    random = np.random.default_rng(0)
    truth = [set(random.choice(200, n, replace=False).tolist()) for n in (1, 5, 60, 150)]
    ids = torch.stack([torch.from_numpy(random.permutation(200)[:100]) for _ in truth])
    items = torch.tensor([i for row in truth for i in sorted(row)])
    targets = as_interactions((items, torch.tensor([0, 1, 6, 66, 216])), 200)
    hit = metrics.hits(ids, targets)
    for r, name in ((20, "recall"), (50, "recall"), (100, "ndcg")):
        found = getattr(metrics, name)(hit, targets.counts, r).tolist()
        for row, wanted, value in zip(ids.tolist(), truth, found, strict=True):
            relevant = [i in wanted for i in row[:r]]
            if name == "recall":
                expected = sum(relevant) / min(r, len(wanted))
            else:
                gain = sum(1 / math.log2(place + 2) for place, good in enumerate(relevant) if good)
                expected = gain / sum(1 / math.log2(place + 2) for place in range(min(r, len(wanted))))
            assert value == pytest.approx(expected, abs=1e-12)


def test_mean_and_its_error() -> None:
    found = metrics.mean(torch.tensor([1.0, 2.0, 4.0, 5.0]))
    assert found == (3.0, pytest.approx(math.sqrt(10 / 3) / 2))
    assert math.isnan(metrics.mean(torch.tensor([1.0])).error)


def test_users_without_a_target_are_left_out() -> None:
    fold_in = sp.csr_matrix(np.eye(3, 6, dtype=np.float32))
    targets = sp.csr_matrix((np.ones(1), ([1], [4])), shape=(3, 6))
    seen: list[int] = []

    def recommend(x: Interactions, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        seen.extend(x.items.tolist())
        return torch.tensor([[4, 0]]), torch.zeros(1, 2)

    found = evaluate(recommend, fold_in, targets)
    assert seen == [1]
    assert found.ndcg100.tolist() == [1.0]


@pytest.mark.parametrize("batch_size", [1, 7, 20, 1000])
def test_any_batch_size_gives_the_same_figures(toy: Dataset, batch_size: int) -> None:
    torch.manual_seed(0)
    model = CFSFL(toy.n_items, steps=2, top_k=5, hidden_dim=24, latent_dim=6)
    torch.nn.init.normal_(model.recommender.input.feedback)
    test = toy.test
    once = evaluate(model.recommend, test.fold_in, test.targets, batch_size=20)
    again = evaluate(model.recommend, test.fold_in, test.targets, batch_size=batch_size)
    assert torch.equal(once.ndcg100, again.ndcg100)
    assert torch.equal(once.recall20, again.recall20)


def test_fold_in_and_targets_must_match() -> None:
    with pytest.raises(ValueError, match=r"\(3, 6\) and \(3, 7\)"):
        evaluate(MostPopular(sp.csr_matrix((3, 6))).recommend, sp.csr_matrix((3, 6)), sp.csr_matrix((3, 7)))


def test_most_popular_ranks_by_users_then_id() -> None:
    train = sp.csr_matrix(np.array([[1, 1, 0, 0], [1, 0, 0, 1], [0, 1, 0, 1]], dtype=np.float32))
    ids, scores = MostPopular(train).recommend(as_interactions(np.array([[0, 0, 0, 0], [0, 1, 0, 0]]), 4), 4)
    assert ids.tolist() == [[0, 1, 3, 2], [0, 3, 2, -1]]
    assert scores[1].tolist() == [2, 2, 0, -math.inf]
