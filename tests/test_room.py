"""Rows with room behind them: no operation looks at it, on any backend, and shapes do not depend on the data."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from cfsfl_fast import backends, library, ops
from cfsfl_fast.interactions import Interactions, as_interactions
from cfsfl_fast.testing import CSR, Problem, backend_params, poisoned, random_problem
from tests.conftest import clusters

B, M, K = 13, 90, 6


def with_room(rows: CSR, room: int = 37) -> CSR:
    items, offsets = rows
    return torch.cat([items, items.new_full((room,), M)]), offsets


def roomy(p: Problem) -> Problem:
    """The same problem with room behind its rows, and weights there that would be seen."""
    items, offsets = with_room((p.items, p.offsets))
    weights = torch.cat([p.weights, torch.full((37,), 1e6, dtype=p.weights.dtype)])
    return dataclasses.replace(
        p, items=items, offsets=offsets, weights=weights, exclude=p.exclude and with_room(p.exclude, 11)
    )


def answers(p: Problem, action: str) -> list[Tensor]:
    """What every operation gives, and every gradient."""
    p = p.to(p.u.dtype, grad=True)
    output, lookup = ops.Table(p.weight, p.bias), ops.Table(p.lookup)
    state = ops.loop_state(p.u.device)
    bag = ops.row_bag(lookup, p.items, p.offsets, p.weights)
    turn = ops.feedback_step(
        p.u, output, p.hx + bag, lookup, p.reward, p.feedback, p.hoisted, p.wv, K, action, p.exclude, state
    )
    ids, scores = ops.linear_topk(p.u, output, K, p.exclude, state)
    nll, *rest = ops.linear_nll(p.u, output, p.items, p.offsets, p.exclude, K, state)
    unweighted = ops.row_bag(lookup, p.items, p.offsets)
    h = ops.fuse_softmax(p.u, output, unweighted, lookup, p.exclude)
    squares = ops.linear_squares(p.u, output, p.items, p.offsets, p.exclude, positive=5.0)
    warp = ops.linear_warp(p.u, output, p.items, p.offsets, p.exclude)
    logistic = ops.linear_logistic(p.u, output, p.items, p.offsets, p.exclude)
    found = [bag, turn.feedback, turn.logit, scores.clamp_min(-99), nll, h, squares, warp, logistic]
    sum((t.double() * (i + 1)).sum() for i, t in enumerate(found)).backward()
    gradients = [t.grad for t in p.leaves().values() if t.grad is not None]
    return [t.detach() for t in (*found, ids, turn.ids, turn.scores, *rest, *gradients)]


@pytest.mark.parametrize("backend", [*backend_params(), "reference"])
@pytest.mark.parametrize("action", ["straight_through", "softmax"])
def test_no_operation_looks_at_the_room(backend: str, action: str) -> None:
    p = random_problem(B, M, 8)
    with backends.use_backend(backend), poisoned():
        exact, found = answers(p, action), answers(roomy(p), action)
    assert len(exact) > 20
    for i, (one, other) in enumerate(zip(exact, found, strict=True)):
        assert torch.equal(one, other), i


@pytest.mark.parametrize("chunk", [None, 300])
def test_library_calls_step_over_the_room_without_cutting_it_off(
    chunk: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a device, where cutting off would wait for it."""
    if chunk:
        monkeypatch.setattr(library, "CHUNK_SCORES", chunk)
    monkeypatch.setattr(library, "without_room", lambda items, offsets: (items, offsets))
    p = random_problem(B, M, 8)
    with backends.use_backend("torch"), poisoned():
        for action in ("straight_through", "softmax"):
            exact, found = answers(p, action), answers(roomy(p), action)
            for i, (one, other) in enumerate(zip(exact, found, strict=True)):
                assert torch.equal(one, other), i


# Histories


def fixed(n_users: int = 20, room: int = 60) -> tuple[Interactions, Interactions]:
    """Histories, and the same with room."""
    x = as_interactions(clusters(n_users), 40)
    return x, x.padded(len(x), len(x.items) + room)


def same(found: Interactions, expected: Interactions, capacity: int) -> None:
    assert found.fixed
    assert len(found.items) == capacity
    assert torch.equal(found.offsets, expected.offsets)
    n = int(found.offsets[-1])
    assert torch.equal(found.items[:n], expected.items)
    assert bool((found.items[n:] == found.n_items).all())


def test_rows_are_taken_into_a_capacity() -> None:
    x, roomy = fixed()
    users = torch.tensor([7, 3, 3, 19, 0])
    for source in (x, roomy):
        same(source.take(users, 200), x.take(users), 200)
        assert torch.equal(source.take(users).items, x.take(users).items)
    n = len(x.take(users).items)
    same(x.take(users, n), x.take(users), n)
    same(x.padded(21).take(torch.tensor([20, 2, 20]), 50), x.padded(21).take(torch.tensor([20, 2, 20])), 50)
    nobody = Interactions(x.items[:0], torch.zeros(4, dtype=torch.int64), 40)
    same(nobody.take(torch.tensor([1, 2]), 5), nobody.take(torch.tensor([1, 2])), 5)


def test_a_selection_keeps_its_capacity() -> None:
    x, roomy = fixed()
    for keep in (x.items % 3 != 1, x.items >= 0, x.items < 0):
        room = torch.ones(60, dtype=torch.bool)  # what is said of the room does not matter
        kept = torch.cat([keep, room])
        same(roomy.where(kept), x.where(keep), len(roomy.items))
        values = torch.arange(len(x.items)) + 1.0
        picked = roomy.pick(kept, torch.cat([values, torch.full((60,), 9.0)]))
        n = int(keep.sum())
        assert torch.equal(picked[:n], values[keep])
        assert not bool(picked[n:].any())
        same(roomy.where(kept).where(roomy.where(kept).items != 4), x.where(keep & (x.items != 4)), len(roomy.items))


def test_values_in_the_room_are_zero_and_its_row_is_nobodys() -> None:
    x, roomy = fixed()
    n = len(x.items)
    assert torch.equal(roomy.rows[:n], x.rows)
    assert roomy.rows[n:].tolist() == [20] * 60
    for name in ("unit_weights", "mean_weights"):
        weights = getattr(roomy, name)()
        assert torch.equal(weights[:n], getattr(x, name)())
        assert not bool(weights[n:].any())
    assert torch.equal(roomy.exact().items, x.items)
    assert roomy.to("cpu").fixed
    assert torch.equal(roomy.union(roomy.where(roomy.items < 9)).items, x.items)
