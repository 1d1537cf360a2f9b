"""The synthetic data: deterministic, long-tailed, and worth learning from beyond popularity."""

import numpy as np
import pytest
import torch

from cfsfl_fast.datasets import (
    PRESETS,
    Dataset,
    Protocol,
    device_generator,
    matrix_events,
    split_events,
    synthetic,
    synthetic_dataset,
)
from cfsfl_fast.datasets.device_generator import SHAPES, Shape, synthetic_csr, synthetic_rows


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


# In torch operations

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=[
        pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    ]),
]  # fmt: skip


@pytest.mark.parametrize("device", DEVICES)
def test_rows_made_on_a_device(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_generator, "_BLOCK_EVENTS", 20_000)  # several blocks
    items, offsets = synthetic_rows(900, 400, events_per_user=30.0, seed=3, device=device)
    again = synthetic_rows(900, 400, events_per_user=30.0, seed=3, device=device)
    other = synthetic_rows(900, 400, events_per_user=30.0, seed=4, device=device)
    assert torch.equal(items, again[0])
    assert torch.equal(offsets, again[1])
    assert len(items) != len(other[0]) or not torch.equal(items, other[0])
    assert items.device.type == device
    assert (int(offsets[0]), int(offsets[-1])) == (0, len(items))
    counts = offsets.diff()
    assert int(counts.min()) >= 1
    assert float((counts >= 3).double().mean()) > 0.99  # a user of one narrow taste may draw fewer distinct items
    assert 22 < float(counts.double().mean()) < 31
    assert int(items.min()) >= 0
    assert int(items.max()) < 400
    inside = torch.ones_like(items, dtype=torch.bool)
    inside[offsets[:-1]] = False  # the first item of each user
    assert bool((items.diff() > 0)[inside[1:]].all()), "ascending and unique within a user"


def test_rows_made_by_torch_are_like_those_made_by_numpy() -> None:
    """The same skewness of activity and popularity, and tastes that a model can learn."""
    by_torch = synthetic_csr(Shape(3000, 500, 40.0, 0), seed=1)
    by_numpy = synthetic(3000, 500, events_per_user=40.0, seed=1)
    assert by_torch.nnz == pytest.approx(by_numpy.nnz, rel=0.1)
    for axis in (0, 1):
        sums = [np.sort(np.asarray(x.sum(axis)).ravel())[::-1] for x in (by_torch, by_numpy)]
        heads = [float(s[: len(s) // 10].sum() / s.sum()) for s in sums]
        assert heads[0] == pytest.approx(heads[1], rel=0.25), axis
    data = split_events(matrix_events(by_torch, "torch"), Protocol(held_out=300))
    train = data.train.toarray()
    popular = recall_at_20(data, np.broadcast_to(train.sum(0), (len(data.test.user_ids), data.n_items)))
    learned = recall_at_20(data, data.test.fold_in @ linear_model(train, 300.0))
    assert learned > 1.3 * popular


@pytest.mark.parametrize("sizes", [(0, 5, 2.0), (5, 0, 2.0), (5, 5, 6.0), (5, 5, 0.0)])
def test_wrong_sizes_are_refused_on_a_device_too(sizes: tuple[int, int, float]) -> None:
    with pytest.raises(ValueError, match="must"):
        synthetic_rows(sizes[0], sizes[1], events_per_user=sizes[2])


def test_presets_are_the_published_sizes() -> None:
    assert set(SHAPES) == {name for name in PRESETS if PRESETS[name].held_out and name != "none"}
    for name, shape in SHAPES.items():
        assert shape.held_out == PRESETS[name].held_out
