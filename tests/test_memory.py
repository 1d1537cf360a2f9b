"""The item memory: its inverse, users left out of it exactly, and its evidence against the plain statement."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from cfsfl_fast import item_item, reference
from cfsfl_fast import memory as module
from cfsfl_fast.interactions import Interactions, as_interactions
from cfsfl_fast.memory import N_EVIDENCE, ItemMemory

M, U, RIDGE = 23, 31, 1.5


def users() -> Tensor:
    """[U, M] with an empty history, a full one, an item that nobody has and one that one user has."""
    random = np.random.default_rng(3)
    x = (random.random((U, M)) < random.uniform(0.05, 0.6, M)).astype(np.float64)
    x[4], x[5] = 0, 1
    x[:, 7] = 0
    x[:, 8] = 0
    x[9, 8] = 1
    return torch.from_numpy(x)


def fitted(x: Tensor) -> ItemMemory:
    memory = ItemMemory(M)
    memory.fit(as_interactions(x, M), RIDGE)
    return memory


def dense(x: Interactions) -> Tensor:
    found = torch.zeros(len(x), x.n_items, dtype=torch.float64)
    found[x.rows, x.items] = 1
    return found


def part(x: Tensor, seed: int = 0) -> Tensor:
    drawn = torch.rand(x.shape, generator=torch.Generator().manual_seed(seed))
    return x * (drawn < 0.7)


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found.double(), expected.double(), rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("double_items", [M, M - 1], ids=["float64", "float32"])
def test_the_matrix_is_the_regularised_inverse(double_items: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(item_item, "DOUBLE_ROWS", double_items)
    monkeypatch.setattr(item_item, "BLOCK", 5)
    close(fitted(users()).precision, reference.item_memory(users(), RIDGE))


def test_scores_are_those_of_the_weights_with_a_zero_diagonal() -> None:
    x, kept = users(), part(users())
    P = reference.item_memory(x, RIDGE)
    B = -P / P.diagonal()
    B.fill_diagonal_(0)
    found, absence = fitted(x).scores(as_interactions(kept, M))
    assert absence is None
    close(found, kept @ B)


def test_a_user_who_is_left_out_was_never_there() -> None:
    """Sherman and Morrison's update against an inverse without the user."""
    x, kept = users(), part(users())
    found, absence = fitted(x).scores(as_interactions(kept, M), as_interactions(x, M))
    assert absence is not None
    for u in range(U):
        P = reference.item_memory(x, RIDGE, absent=u)
        B = -P / P.diagonal()
        B.fill_diagonal_(0)
        close(found[u], kept[u] @ B)
    with_them, _ = fitted(x).scores(as_interactions(kept, M))
    own = (x - kept) > 0
    assert (with_them - found)[own].mean() > 0.02  # who is in the matrix finds their own hidden items in it


@pytest.mark.parametrize("absent", [False, True], ids=["others", "left out"])
def test_evidence_is_what_the_specification_says(absent: bool) -> None:
    x, kept = users(), part(users())
    memory, rows = fitted(x), as_interactions(kept, M)
    whole = as_interactions(x, M) if absent else None
    scores, absence = memory.scores(rows, whole)
    ids = scores.sort(1, descending=True).indices[:, :9]
    s = torch.randn(ids.shape, generator=torch.Generator().manual_seed(1))
    found = memory.evidence(rows, ids, s, 4, absence)
    assert found.shape == (U, 9, N_EVIDENCE)
    for u in range(U):
        P = reference.item_memory(x, RIDGE, absent=u if absent else None)
        counts = x.sum(0) - (x[u] if absent else 0)
        expected = reference.evidence(P, counts, kept[u].nonzero().squeeze(1), ids[u], s[u].double(), 4)
        torch.testing.assert_close(found[u].double(), expected, rtol=2e-3, atol=2e-3)


def test_room_behind_rows_changes_nothing() -> None:
    x, kept = users(), part(users())
    memory = fitted(x)
    plain = as_interactions(kept, M), as_interactions(x, M)
    roomy = tuple(rows.padded(len(rows), len(rows.items) + 13) for rows in plain)
    scores, absence = memory.scores(*plain)
    more, also = memory.scores(*roomy)
    assert torch.equal(scores, more)
    ids = scores.sort(dim=1, descending=True, stable=True).indices[:, :9]
    ids[:, 8] = -1
    s = torch.arange(9.0).expand(ids.shape)
    one, other = memory.evidence(plain[0], ids, s, 4, absence), memory.evidence(roomy[0], ids, s, 4, also)
    assert torch.equal(one, other)
    assert torch.equal(one[:, 8], torch.zeros(U, N_EVIDENCE))


def test_a_user_alone_has_the_bits_of_a_user_among_others() -> None:
    x = users()
    memory, rows = fitted(x), as_interactions(x, M)
    scores, _ = memory.scores(rows)
    ids = scores.sort(dim=1, descending=True, stable=True).indices[:, :9]
    s = torch.arange(9.0).square().expand(ids.shape)
    found = memory.evidence(rows, ids, s, 4)
    for u in range(U):
        alone = rows.take(torch.tensor([u]))
        assert torch.equal(memory.scores(alone)[0][0], scores[u])
        assert torch.equal(memory.evidence(alone, ids[u : u + 1], s[:1], 4)[0], found[u])


def test_too_many_items_are_refused() -> None:
    with pytest.raises(ValueError, match=r"60001 x 60001 numbers; the most is 60000"):
        ItemMemory(module.MAX_ITEMS + 1)


def test_tensors_of_another_memory_are_refused() -> None:
    tensors = fitted(users()).tensors()
    with pytest.raises(ValueError, match=r"a memory of 22 items"):
        ItemMemory(M - 1).restore(tensors)
    tensors["precision"][2, 3] = float("nan")
    with pytest.raises(ValueError, match="finite"):
        ItemMemory(M).restore(tensors)
    assert ItemMemory(M).is_empty


def test_a_ridge_that_is_too_small_is_named() -> None:
    with pytest.raises(ValueError, match=rf"\[{M}, {M}\] is not positive definite: raise memory_ridge"):
        ItemMemory(M).fit(as_interactions(users(), M), -100.0)
