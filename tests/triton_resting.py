"""Steps of one loop, where users come to rest or are answered from candidates: the bits of steps alone. Run as
`triton_cases` is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from .triton_cases import (  # noqa: F401  (fixtures among them)
    DEVICE,
    chunked,
    csr,
    filtered,
    kernels,
    linear_topk,
    normal,
    poisoned,
    reference,
    resting,
    step_file,
    step_inputs,
)
from .triton_faults import fault


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[int], list[int]]]:
    """Which users every look found to have moved, and to be open."""
    found: list[tuple[list[int], list[int]]] = []

    def look(*arguments: Any, **options: Any) -> Any:
        seen = resting.look(*arguments, **options)
        users = [t.nonzero().squeeze(1).tolist() for t in (seen.moved, seen.open)]
        assert sorted(seen.order[: int(seen.active)].tolist()) == users[1]
        found.append((users[0], users[1]))
        return seen

    monkeypatch.setattr(linear_topk, "look", look)
    return found


def same(got: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for i, (one, other) in enumerate(zip(got, expected, strict=True)):
        assert torch.equal(one, other), i


def turns(B: int, M: int, k: int, moves: list[list[int]], action: str = "hard") -> None:
    """Steps of one loop, at each of which some users' codes move; scores are exact, and full of ties."""
    u, *rest = step_inputs(B, M, 5, 12, 20, 9)
    exclude = csr(B, M, min(M // 2, 9))
    state = kernels.loop_state()
    for move in moves:
        u = u.clone()
        u[move, -1] += 1
        got = kernels.feedback_step(u, *rest, k, action, exclude, state)
        same(got, kernels.feedback_step(u, *rest, k, action, exclude))
        assert torch.equal(got[2], reference.linear_topk(u, *rest[:2], k, exclude)[0])
        assert int(state._buffers["active"]) == 0


MOVES = [[*range(18)], [1, 17], [], [1, 4]]


def test_users_at_rest(looks: list[tuple[list[int], list[int]]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups of which some users move, one or none; products of the library's and of ours."""
    turns(18, 70, 6, MOVES)
    assert looks == [(move, move) for move in MOVES]
    monkeypatch.setenv("CFSFL_SKIP_FROM", "1")
    turns(3, 70, 6, [[0, 1, 2], [1]], "topk_softmax")
    monkeypatch.setenv("CFSFL_SKIP_FROM", "9")
    turns(3, 70, 6, [[0, 1, 2], [1]])


@pytest.mark.usefixtures("chunked")
def test_users_at_rest_in_every_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CFSFL_SKIP_FROM", "1")
    turns(3, 300, 9, [[0, 1, 2], [1], [0, 2]])


def test_zeros_of_two_signs_and_nan_have_moved_or_not_by_their_bits() -> None:
    u, *rest = step_inputs(3, 40, 5, 12, 20, 9)
    u[0, 0], u[1, 0] = 0, float("nan")
    state = kernels.loop_state()
    kernels.feedback_step(u, *rest, 5, "hard", None, state)
    u = u.clone()
    u[0, 0] = -0.0
    kernels.feedback_step(u, *rest, 5, "hard", None, state)
    assert state._buffers["moved"].tolist() == [1, 0, 0]


def test_another_turn_begins_anew(looks: list[tuple[list[int], list[int]]]) -> None:
    """Where anything else than the code has changed, everyone has moved."""
    u, *rest = step_inputs(3, 40, 5, 12, 20, 9)
    other = [*rest]
    other[2] = rest[2] + 1
    state = kernels.loop_state()
    for inputs, k in ((rest, 5), (rest, 5), (other, 5), (other, 4)):
        same(kernels.feedback_step(u, *inputs, k, "hard", None, state), kernels.feedback_step(u, *inputs, k, "hard"))
    assert [len(moved) for moved, _ in looks] == [3, 0, 3, 3]


class Drift:
    """A loop over a filtered catalogue, whose codes drift."""

    def __init__(self, B: int = 3, M: int = 500) -> None:
        self.u, *self.rest = step_inputs(B, M, 5, 12, 20, 9)
        self.u, self.rest[0], self.rest[1] = normal(B, 5), normal(M, 5), normal(M) / 10
        self.exclude = csr(B, M, 9)
        self.state = kernels.loop_state()

    def expected(self, k: int) -> Tensor:
        scored = (t.double() for t in (self.u, *self.rest[:2]))
        return reference.linear_topk(*scored, k, self.exclude)[0]

    def step(self, by: float, users: slice = slice(None)) -> None:
        self.u = self.u.clone()
        self.u[users] += by * normal(*self.u[users].shape)
        found = kernels.feedback_step(self.u, *self.rest, 6, "hard", self.exclude, self.state)
        assert torch.equal(found[2], self.expected(6))
        scored = (t.double() for t in (self.u, *self.rest[:2]))
        scores = reference.linear(*scored).gather(1, found[2])
        torch.testing.assert_close(found[3].double(), scores, atol=1e-5, rtol=0)


@pytest.mark.usefixtures("filtered")
def test_candidates_of_an_earlier_step(looks: list[tuple[list[int], list[int]]]) -> None:
    loop = Drift()
    loop.step(0)
    loop.step(0.003)
    loop.step(0.003, slice(0, 1))
    loop.step(3, slice(1, 2))
    loop.step(0.003)
    ids, _ = kernels.linear_topk(loop.u, *loop.rest[:2], 11, loop.exclude, loop.state)
    assert torch.equal(ids, loop.expected(11))
    everyone = [0, 1, 2]
    assert looks == [(everyone, everyone), (everyone, []), ([0], []), ([1], [1]), (everyone, []), (everyone, [])]
    assert int(loop.state._buffers["active"]) == 0


@pytest.mark.usefixtures("filtered")
def test_candidates_do_not_outlive_what_they_are_of(looks: list[tuple[list[int], list[int]]]) -> None:
    loop = Drift()
    loop.step(0)
    kernels.linear_topk(loop.u, *loop.rest[:2], 13, loop.exclude, loop.state)  # more than twice as long a list
    kernels.linear_nll(loop.u, *loop.rest[:2], *csr(3, 500, 5), None, 4, loop.state)  # their buffer is used
    loop.step(0)
    assert [len(open_) for _, open_ in looks] == [3, 3, 3]


@pytest.mark.usefixtures("filtered")
def test_ties_are_no_proof() -> None:
    """All scores equal: nothing beats the bound on the rest, and the list is found in full again."""
    M = 500
    u, weight, bias = torch.ones(2, 1, device=DEVICE), torch.ones(M, 1, device=DEVICE), torch.zeros(M, device=DEVICE)
    state = kernels.loop_state()
    for _ in range(2):
        ids, _ = kernels.linear_topk(u, weight, bias, 7, None, state)
        assert torch.equal(ids, torch.arange(7, device=DEVICE).expand(2, 7))
        assert state._buffers["open"].tolist() == [1, 1]


@pytest.mark.usefixtures("filtered")
@pytest.mark.parametrize("name", ["", "K"])
def test_the_last_of_a_list_proves_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Candidates that score 9, 9 and 5 when found, the last of them falling, and a rising item that just missed 5."""
    M, k = 500, 3
    monkeypatch.setattr(linear_topk, "threshold", lambda *a: a[5].fill_(5.0))
    weight, bias = torch.zeros(M, 1, device=DEVICE), torch.full((M,), -9.0, device=DEVICE)
    for item, (w, b) in {3: (0, 9), 40: (0, 9), 200: (-1, 6), 300: (1, 3.99)}.items():
        weight[item], bias[item] = w, b

    def check() -> None:
        state = kernels.loop_state()
        for u, last in ((1.0, 200), (1.1, 300)):
            code = torch.full((1, 1), u, device=DEVICE)
            assert kernels.linear_topk(code, weight, bias, k, None, state)[0].tolist() == [[3, 40, last]]
        assert state._buffers["open"].tolist() == [1]

    check()
    if name:
        with fault(LOOK, K=lambda v: v - 1), pytest.raises(AssertionError):
            check()


LOOK, OPEN = resting.look_fwd_kernel, resting.linear_scores_fwd_kernel
STEP = step_file.feedback_step_fwd_kernel
LOOP_FAULTS: dict[str, tuple[Any, dict[str, Any]]] = {
    "half of the code compared": (LOOK, {"H": lambda v: v // 2}),
    "the step before forgotten": (LOOK, {"last_ptr": torch.clone}),
    "answers of another step": (STEP, {"old_h_ptr": lambda t: t + 1}),
    "the wrong ones at rest": (STEP, {"moved_ptr": lambda t: 1 - t}),
    "last items not scored": (OPEN, {"M": lambda v: v - 20}),
    "last user not scored": (OPEN, {"active_ptr": lambda t: t - 1}),
    "scores of other users": (OPEN, {"order_ptr": lambda t: t.flip(0)}),
    "columns shifted": (OPEN, {"bias_ptr": lambda t: t.roll(1)}),
    "open users not counted anew": (STEP, {"LOOKED": lambda v: False}),
    "lists of another step": (STEP, {"old_ids_ptr": lambda t: t - 1}),
    "feedback of another step": (STEP, {"old_v_ptr": lambda t: t + 1}),
}


@pytest.mark.parametrize("name", LOOP_FAULTS)
def test_a_planted_fault_of_the_loop_is_seen(
    name: str, looks: list[tuple[list[int], list[int]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CFSFL_SKIP_FROM", "1")
    kernel, wrong = LOOP_FAULTS[name]

    def check() -> None:
        looks.clear()
        turns(3, 70, 6, [[0, 1, 2], [1, 2], []])
        assert looks == [([0, 1, 2],) * 2, ([1, 2],) * 2, ([], [])]

    check()
    with fault(kernel, **wrong), pytest.raises(AssertionError):
        check()


WIDE_FAULTS: dict[str, dict[str, Any]] = {
    "the bound is the threshold": {"norm_ptr": torch.zeros_like},
    "candidates not scored again": {"weight_ptr": torch.zeros_like},
    "the anchor forgotten": {"anchor_ptr": lambda t: t * 0 + float("nan")},
    "the count not begun anew": {"found_ptr": torch.clone},
    "proved lists elsewhere": {"run_ptr": torch.clone},
    "candidates of others": {"buffer_ptr": lambda t: t.flip(0)},
}


@pytest.mark.usefixtures("filtered")
@pytest.mark.parametrize("name", WIDE_FAULTS)
def test_a_planted_fault_of_the_candidates_is_seen(name: str, looks: list[tuple[list[int], list[int]]]) -> None:
    def check() -> None:
        looks.clear()
        loop = Drift()
        loop.step(0)
        loop.step(0.003)
        loop.step(5)
        assert looks[1][1] == []

    check()
    with fault(LOOK, **WIDE_FAULTS[name]), pytest.raises(AssertionError):
        check()
