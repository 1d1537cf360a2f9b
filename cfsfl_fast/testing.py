"""What tests and benches share: the tolerance rule, poisoned memory, and random problems of every shape.

The rule: an implementation may be no further from the float64 truth than twice plain PyTorch in the same dtype, plus
one rounding of the output.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from cfsfl_fast import backends

CSR = tuple[Tensor, Tensor]
Layers = list[tuple[Tensor, Tensor]]

BACKENDS = ("torch", "cpp", "triton")


def backend_params() -> list[Any]:
    """Every backend as a pytest parameter; one that cannot run here is skipped with its reason."""
    import pytest

    params = []
    for backend in BACKENDS:
        reason = backends.why_not(backend, torch.device("cpu"))
        params.append(pytest.param(backend, marks=pytest.mark.skipif(reason is not None, reason=str(reason))))
    return params


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Every uninitialised tensor inside is NaN, or the largest integer."""
    old = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(old[0], warn_only=old[1])


def distance(x: Tensor, truth: Tensor) -> float:
    """The greatest |x - truth|; equal infinities are 0 apart, NaN is infinitely far."""
    if x.numel() == 0:
        return 0.0
    far = (x.double() - truth.double()).abs().masked_fill_(x.double() == truth.double(), 0)
    return float(far.nan_to_num_(nan=float("inf"), posinf=float("inf")).max())


def assert_as_good(found: Tensor, truth: Tensor, plain: Tensor, what: str = "") -> None:
    """The tolerance rule: found against the float64 truth, measured by plain PyTorch in found's dtype."""
    assert found.shape == truth.shape, f"{what}: shape {(*found.shape,)}, not {(*truth.shape,)}"
    assert found.dtype == plain.dtype, f"{what}: {found.dtype}, not {plain.dtype}"
    found, truth, plain = found.detach(), truth.detach(), plain.detach()
    finite = truth[truth.isfinite()]
    size = float(finite.abs().max()) if finite.numel() else 0.0
    # Float64 has no better truth, and the worst of a few numbers is luck: a few roundings more for both.
    roundings = 16 if found.dtype == torch.float64 else 1 if found.numel() >= 64 else 8
    allowed = 2 * distance(plain, truth) + roundings * torch.finfo(found.dtype).eps * size
    error = distance(found, truth)
    assert error <= allowed, f"{what}: {error:.3g} from the truth, {allowed:.3g} allowed"


@dataclass(frozen=True)
class Problem:
    """Inputs of every operation, of matching sizes."""

    u: Tensor  # [B, H]
    weight: Tensor  # [M, H]
    bias: Tensor  # [M]
    exclude: CSR | None
    items: Tensor  # [E], targets or a history
    offsets: Tensor  # [B + 1]
    weights: Tensor  # [E]
    hx: Tensor  # [B, D]
    lookup: Tensor  # [M, D]
    reward: Layers
    feedback: Layers
    hoisted: Tensor  # [B, P]
    wv: Tensor  # [V, P]

    def tensors(self) -> Iterator[Tensor]:
        """Every floating-point input."""
        yield from (self.u, self.weight, self.bias, self.weights, self.hx, self.lookup, self.hoisted, self.wv)
        for layer in (*self.reward, *self.feedback):
            yield from layer

    def to(self, dtype: torch.dtype, grad: bool = False) -> Problem:
        """Copies in a dtype, as leaves that want gradients or not."""

        def convert(t: Tensor) -> Tensor:
            strided = not t.is_contiguous()
            t = t.detach().to(dtype, copy=True)
            return (t.t().contiguous().t() if strided else t).requires_grad_(grad)

        names = ("u", "weight", "bias", "hx", "lookup", "hoisted", "wv")
        converted: dict[str, Any] = {name: convert(getattr(self, name)) for name in names}
        return replace(
            self,
            **converted,
            weights=self.weights.detach().to(dtype),
            reward=[(convert(w), convert(b)) for w, b in self.reward],
            feedback=[(convert(w), convert(b)) for w, b in self.feedback],
        )

    def leaves(self) -> dict[str, Tensor]:
        """The inputs that can have a gradient, by name."""
        layers = {
            f"{n}.{i}.{w}": t
            for n in ("reward", "feedback")
            for i, layer in enumerate(getattr(self, n))
            for w, t in zip("wb", layer, strict=True)
        }
        names = ("u", "weight", "bias", "hx", "lookup", "hoisted", "wv")
        return {**{name: getattr(self, name) for name in names}, **layers}


def loss_and_gradients(
    problem: Problem, loss: Callable[[Problem], Tensor], backend: str, dtype: torch.dtype
) -> list[tuple[Tensor, ...]]:
    """A loss of users and its gradients in u, weight and bias: of a backend in a dtype, of the specification in float64
    and of the specification in the dtype, as `assert_as_good` compares them.

    Args:
        loss: of a problem whose leaves want gradients. [B]
    """
    dloss = torch.rand(len(problem.u), dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    answers = []
    for dt, run in ((dtype, backend), (torch.float64, "reference"), (dtype, "reference")):
        p = problem.to(dt, grad=True)
        with backends.use_backend(run), poisoned():
            found = loss(p)
            (found * dloss.to(dt)).sum().backward()
        answers.append((found, *(leaf.grad for leaf in (p.u, p.weight, p.bias) if leaf.grad is not None)))
    return answers


def random_rows(n_rows: int, n_items: int, longest: int, generator: torch.Generator, without: CSR | None = None) -> CSR:
    """CSR rows of 0..longest items, ascending and unique, the first row empty; `without`: rows that they avoid."""
    rows = []
    for b in range(n_rows):
        size = int(torch.randint(0, min(longest, n_items) + 1, (), generator=generator)) if b else 0
        row = torch.randperm(n_items, generator=generator)[:size].sort().values
        if without is not None:
            row = row[~torch.isin(row, without[0][without[1][b] : without[1][b + 1]])]
        rows.append(row)
    sizes = torch.tensor([len(r) for r in rows], dtype=torch.int64)
    items = torch.cat(rows) if rows else torch.empty(0, dtype=torch.int64)
    return items, torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)])


def random_problem(
    B: int,
    M: int,
    H: int,
    *,
    D: int = 6,
    V: int = 5,
    seed: int = 0,
    exclude: bool = True,
    whole: bool = False,
    strided: bool = False,
    longest: int = 20,
) -> Problem:
    """A float32 problem. whole: small whole numbers, so that scores are exact and many are equal."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        if whole:
            return torch.randint(-2, 3, shape, generator=g).float()
        return torch.randn(shape, generator=g) * scale

    def layers(sizes: Sequence[int]) -> Layers:
        return [(draw(o, i, scale=i**-0.5), draw(o, scale=0.1)) for i, o in pairwise(sizes)]

    left_out = random_rows(B, M, M // 3, g) if exclude else None
    items, offsets = random_rows(B, M, longest, g, without=left_out)
    if len(items) > 4:  # a hot item
        rows = torch.repeat_interleave(torch.arange(B), offsets.diff())
        hot = items.mode().values
        taken = torch.zeros(B, dtype=torch.bool).index_fill_(0, rows[items == hot], True)
        first = offsets[:-1].clamp_max(len(items) - 1)
        banned = torch.zeros(B, dtype=torch.bool)
        if left_out is not None:
            owner = torch.repeat_interleave(torch.arange(B), left_out[1].diff())
            banned[owner[left_out[0] == hot]] = True
        free = (offsets.diff() > 0) & ~taken & ~banned
        items[first[free]] = hot
    u, weight, lookup = draw(B, H), draw(M, H, scale=H**-0.5), draw(M, D)
    if strided:
        u, weight, lookup = u.t().contiguous().t(), weight.t().contiguous().t(), lookup.t().contiguous().t()
    return Problem(
        u, weight, draw(M, scale=0.3), left_out, items, offsets, draw(len(items)), draw(B, D), lookup,
        layers([D, 9, 7, 1]), layers([D + 1, 8, V]), draw(B, 7), draw(V, 7),
    )  # fmt: skip


def assert_list(ids: Tensor, scores: Tensor, exclude: CSR | None, n_items: int) -> None:
    """What holds for every list: order, ties to the smaller id, padding, no item twice, none that is left out."""
    for b, (row, s) in enumerate(zip(ids.tolist(), scores.tolist(), strict=True)):
        listed = [(j, x) for j, x in zip(row, s, strict=True) if j >= 0]
        assert all(j == -1 and x == -float("inf") for j, x in zip(row[len(listed) :], s[len(listed) :], strict=True))
        assert [j for j, _ in listed] == [j for j in row[: len(listed)]], "padding comes last"
        assert len({j for j, _ in listed}) == len(listed)
        assert all(0 <= j < n_items for j, _ in listed)
        assert all((x, -i) > (y, -j) for (i, x), (j, y) in pairwise(listed)), "out of order"
        assert all(x > -float("inf") for _, x in listed)
        if exclude is not None:
            banned = set(exclude[0][exclude[1][b] : exclude[1][b + 1]].tolist())
            assert not banned & {j for j, _ in listed}
