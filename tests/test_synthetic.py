"""The synthetic data: deterministic, long-tailed, and worth learning from beyond popularity."""

import numpy as np
import pytest

from cfsfl_fast.datasets import Dataset, Protocol, synthetic, synthetic_dataset


def recall_at_20(dataset: Dataset, scores: np.ndarray) -> float:
    scores = np.where(dataset.test.fold_in.toarray() > 0, -np.inf, scores)
    top = np.argsort(-scores, axis=1, kind="stable")[:, :20]
    targets = dataset.test.targets.toarray()
    hits = np.take_along_axis(targets, top, axis=1).sum(1)
    return float((hits / np.minimum(20, targets.sum(1))).mean())


def linear_model(train: np.ndarray, l2: float) -> np.ndarray:
    """The closed-form item-item model (EASE)."""
    gram = train.T @ train
    inverse = np.linalg.inv(gram + l2 * np.eye(len(gram)))
    weights = -inverse / np.diag(inverse)
    np.fill_diagonal(weights, 0)
    return weights


def test_same_seed_same_bits_other_seed_other_data() -> None:
    one, again, other = (synthetic(300, 200, seed=seed) for seed in (4, 4, 5))
    assert np.array_equal(one.indptr, again.indptr)
    assert np.array_equal(one.indices, again.indices)
    assert (one != other).nnz > 0


def test_matrix_is_binary_sorted_and_without_empty_rows() -> None:
    matrix = synthetic(5000, 300, events_per_user=12)  # more users than share one random stream
    assert matrix.shape == (5000, 300)
    assert matrix.dtype == np.float32
    assert set(matrix.data.tolist()) == {1.0}
    assert np.diff(matrix.indptr).min() >= 1
    inside = np.ones(matrix.nnz - 1, bool)
    inside[matrix.indptr[1:-1] - 1] = False
    assert (np.diff(matrix.indices)[inside] > 0).all()


def test_blocks_of_users_differ() -> None:
    matrix = synthetic(8192, 100, events_per_user=10)
    assert (matrix[:4096] != matrix[4096:]).nnz > 10_000


def test_demo_has_about_the_size_that_it_promises() -> None:
    matrix = synthetic()
    assert matrix.shape == (3000, 1500)
    assert 100_000 < matrix.nnz < 130_000


def test_activity_and_popularity_have_long_tails() -> None:
    matrix = synthetic()
    per_user = np.diff(matrix.indptr)
    per_item = np.sort(np.bincount(matrix.indices, minlength=1500))[::-1]
    assert per_user.mean() > 1.2 * np.median(per_user)
    assert 0.05 < per_item[:15].sum() / matrix.nnz < 0.2
    assert 0.35 < per_item[:150].sum() / matrix.nnz < 0.7


def test_there_is_much_to_learn_beyond_popularity() -> None:
    dataset = synthetic_dataset()
    train = dataset.train.toarray().astype(np.float64)
    popular = recall_at_20(dataset, np.tile(train.sum(0), (len(dataset.test.user_ids), 1)))
    learned = recall_at_20(dataset, dataset.test.fold_in @ linear_model(train, 100.0))
    assert 0.1 < popular < 0.25
    assert learned > 1.6 * popular
    assert learned < 0.7  # and it is not a giveaway


def test_dataset_is_whole_and_follows_its_protocol() -> None:
    dataset = synthetic_dataset(400, 150, events_per_user=15, protocol=Protocol(min_user_items=5, held_out=37))
    dataset.validate()
    assert dataset.report["test"]["held_out"] == 37
    assert dataset.n_users == dataset.report["after_users"]["users"] - 74


@pytest.mark.parametrize(
    ("sizes", "wrong"), [((0, 5), {}), ((5, 0), {}), ((5, 5), {"events_per_user": 6}), ((5, 5), {"seed": -1})]
)
def test_impossible_sizes_are_refused(sizes: tuple[int, int], wrong: dict) -> None:
    with pytest.raises(ValueError, match=r"at least 1|events_per_user|seed"):
        synthetic(*sizes, **{"events_per_user": 2, **wrong})


def test_one_user_and_one_item() -> None:
    assert synthetic(1, 1, events_per_user=1).nnz == 1
