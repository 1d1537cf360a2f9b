"""What the Triton kernels compute, against the float64 specification; run by `test_triton` and `test_triton_gpu`.

In the interpreter (TRITON_INTERPRET=1) tensors live on the CPU and bf16 `tl.dot` is wrong, so bf16 is only used where
kernels do no arithmetic in it. Integer-valued data make scores exact in every dtype and full of ties: lists must then
agree exactly.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETED:
    from . import interpreter  # noqa: F401

from cfsfl_fast import backends, kernels, ops, reference  # noqa: E402  (the interpreter is chosen before Triton is imported)

# The package's functions have their files' names.
step_file, linear_filter, linear_nll, linear_topk, resting, row_bag, tile = (
    importlib.import_module(f"cfsfl_fast.kernels.{name}")
    for name in ("feedback_step", "linear_filter", "linear_nll", "linear_topk", "resting", "row_bag", "tile")
)

DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = [torch.float32, torch.float16] + ([] if INTERPRETED else [torch.bfloat16])


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Uninitialised memory is NaN, or the largest integer."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(before)


def csr(B: int, M: int, n: int) -> tuple[Tensor, Tensor]:
    """Rows of 0 to 2n distinct ascending items; the first row is empty."""
    lengths = [(n * b) % (2 * n + 1) for b in range(B)]
    rows = [torch.randperm(M)[:length].sort().values for length in lengths]
    offsets = torch.tensor([0, *(len(row) for row in rows)]).cumsum(0)
    return torch.cat(rows).to(DEVICE), offsets.to(DEVICE)


def integers(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randint(-2, 3, shape).to(DEVICE, dtype)


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape).to(DEVICE, dtype)


def double(x: Any) -> Any:
    """Every float tensor inside, in float64."""
    if isinstance(x, Tensor):
        return x.double() if x.is_floating_point() else x
    return type(x)(map(double, x)) if isinstance(x, (list, tuple)) else x


def close(got: Tensor, truth: Tensor, plain: Tensor) -> None:
    """No further from the float64 truth than twice plain PyTorch in the same dtype, plus a few roundings of the
    output."""
    assert got.shape == truth.shape
    finite = truth.isfinite()
    assert torch.equal(got.double()[~finite].nan_to_num(7), truth[~finite].nan_to_num(7))
    got, truth, plain = got[finite], truth[finite], plain[finite]
    if len(truth):
        rounding = torch.finfo(got.dtype).eps * truth.abs().max().item()
        allowed = 2 * (plain.double() - truth).abs().max().item() + 4 * rounding
        worst = (got.double() - truth).abs().max().item()
        assert worst <= allowed, f"{worst} from the truth; plain PyTorch allows {allowed}"


def compare(ours: Callable[..., Any], spec: Callable[..., Any], *arguments: Any) -> None:
    """All float results of ours are close to the specification's, all integer results equal."""
    with torch.no_grad():
        got, plain, truth = ours(*arguments), spec(*arguments), spec(*double(arguments))
    got, plain, truth = ((x,) if isinstance(x, Tensor) else x for x in (got, plain, truth))
    for g, p, t in zip(got, plain, truth, strict=True):
        if t.is_floating_point():
            close(g, t, p)
        else:
            assert torch.equal(g, t)


@pytest.fixture
def chunked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 128 items or so."""
    monkeypatch.setenv("CFSFL_CHUNK_BYTES", "2048")


@pytest.fixture
def filtered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every catalogue is filtered, into buffers that overflow soon."""
    monkeypatch.setenv("CFSFL_FILTER_FROM", "1")
    for module in (tile, linear_topk, linear_filter, resting):
        monkeypatch.setattr(module, "CAPACITY", 1024)


# linear_topk


def exact_topk(B: int, M: int, k: int, dtype: torch.dtype, excluding: bool, calls: int = 1) -> None:
    u, weight, bias = integers(B, 5, dtype=dtype), integers(M, 5, dtype=dtype), integers(M, dtype=dtype)
    exclude = csr(B, M, min(M // 2, 9)) if excluding else None
    state = kernels.loop_state() if calls > 1 else None
    for _ in range(calls):
        ids, scores = kernels.linear_topk(u, weight, bias, k, exclude, state)
        true_ids, true_scores = reference.linear_topk(u.double(), weight.double(), bias.double(), k, exclude)
        assert torch.equal(ids, true_ids)
        assert torch.equal(scores.double(), true_scores)
        u = integers(B, 5, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("B", "M", "k"),
    [(3, 1, 1), (4, 63, 7), (3, 300, 1), (3, 4111, 50), (2, 3001, 256), (2, 40, 40), (1, 300, 17), (1, 300, 129)],
)
def test_topk_is_exact(B: int, M: int, k: int, dtype: torch.dtype) -> None:
    exact_topk(B, M, k, dtype, excluding=M != 300)


def test_topk_longer_than_the_kernels_select() -> None:
    exact_topk(2, 700, 300, torch.float32, excluding=True)


@pytest.mark.usefixtures("chunked")
@pytest.mark.parametrize("k", [1, 9, 60])
def test_topk_by_chunks(k: int) -> None:
    exact_topk(4, 517, k, torch.float32, excluding=True, calls=2)


@pytest.mark.usefixtures("filtered")
@pytest.mark.parametrize(("M", "k", "calls"), [(403, 20, 1), (500, 3, 3)])
def test_topk_by_filter(M: int, k: int, calls: int) -> None:
    """Ties make some users fall short: the certificate fails and they are rescued."""
    exact_topk(3, M, k, torch.float32, excluding=True, calls=calls)


@pytest.mark.usefixtures("filtered")
@pytest.mark.parametrize("excluding", [False, True])
def test_filter_without_certificate(excluding: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """All equal, nearly all excluded, thresholds that nobody or everybody reaches."""
    M = 1100
    tau = torch.tensor([9.0, float("-inf"), 1.0], device=DEVICE)
    monkeypatch.setattr(linear_topk, "threshold", lambda *a: a[5][:, -1].copy_(tau))
    u, weight, bias = integers(3, 2) * 0, integers(M, 2), torch.ones(M, device=DEVICE)
    gone = torch.arange(200, M, device=DEVICE), torch.tensor([0, 0, 0, M - 200], device=DEVICE)
    ids, scores = kernels.linear_topk(u, weight, bias, 20, gone if excluding else None)
    assert torch.equal(ids, torch.arange(20, device=DEVICE).expand(3, 20))
    assert torch.equal(scores, torch.ones_like(scores))


SPECIAL = {
    "all equal": lambda M: torch.full((M,), 3.0),
    "zeros of both signs": lambda M: torch.zeros(M) * (torch.arange(M) % 2 * 2 - 1),
    "all -inf": lambda M: torch.full((M,), float("-inf")),
    "all NaN": lambda M: torch.full((M,), float("nan")),
    "few finite": lambda M: torch.where(torch.arange(M) % 997 == 5, 1.0, float("-inf")),
    "NaN between": lambda M: torch.where(torch.arange(M) % 3 == 1, float("nan"), torch.arange(M) % 101.0),
    "+inf tied": lambda M: torch.where(torch.arange(M) % 7 == 1, float("inf"), torch.arange(M) * 1.0),
    "lowest floats": lambda M: torch.where(torch.arange(M) % 5 == 1, torch.finfo(torch.float32).min, float("-inf")),
    "denormals": lambda M: (torch.arange(M) % 13) * 1e-44 - 5e-44,
    "ascending": lambda M: torch.arange(M) * 1.0,
    "descending": lambda M: -torch.arange(M) * 1.0,
    "one group holds all": lambda M: torch.where(torch.arange(M) % 256 < 24, torch.arange(M) * 1.0, -1.0),
}


@pytest.mark.parametrize("name", SPECIAL)
@pytest.mark.parametrize("k", [1, 50])
def test_topk_of_special_scores(name: str, k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    M = 9001
    bias = SPECIAL[name](M).to(DEVICE)
    for chunk in ("", "40000"):
        monkeypatch.setenv("CFSFL_CHUNK_BYTES", chunk)
        ids, scores = kernels.linear_topk(torch.zeros(1, 1, device=DEVICE), torch.zeros(M, 1, device=DEVICE), bias, k)
        true_ids, true_scores = reference.top(bias[None], k)
        assert torch.equal(ids, true_ids), name
        assert torch.equal(scores, true_scores)


def test_topk_of_millions() -> None:
    M = 1_100_003
    bias = torch.arange(M, device=DEVICE) % 1000 * -1.0
    bias[-3:] = torch.tensor([1.0, 3.0, 2.0], device=DEVICE)
    zero = torch.zeros(1, 1, device=DEVICE)
    ids, _ = kernels.linear_topk(zero, torch.zeros(M, 1, device=DEVICE), bias, 6)
    assert ids.tolist() == [[M - 2, M - 1, M - 3, 0, 1000, 2000]]


def test_tables_of_more_than_two_billion_elements() -> None:
    """Places of elements need 64 bits. A CPU's pages of zeros take no memory until they are written."""
    M, D = (1 << 25) + 9, 64
    zeros = np.zeros((M, D), np.float16)
    table = torch.from_numpy(zeros) if INTERPRETED else torch.zeros(M, D, dtype=torch.float16, device=DEVICE)
    table[-1], table[7] = 5, 2
    items, offsets = torch.tensor([7, M - 1], device=DEVICE), torch.tensor([0, 2], device=DEVICE)
    assert (kernels.row_bag(table, items, offsets) == 7).all()
    h, _ = kernels.fuse(table[:1], table, items[None], table[:1, :2], "hard")
    assert (h == 3.5).all()
    assert (kernels.row_dot(h, table, items[None]) == torch.tensor([7 * D, 17.5 * D], device=DEVICE)).all()


def test_topk_overflows_the_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    """More survivors than the buffer holds, ascending and tied: folded into the list, again and again."""
    M = 9001
    bias = (torch.arange(M) // 3 * 1.0).to(DEVICE)
    bias[torch.arange(M) % 256 > 3] = -1
    zero = torch.zeros(1, 1, device=DEVICE)
    monkeypatch.setattr(tile, "CAPACITY", 2048)
    ids, _ = kernels.linear_topk(zero, torch.zeros(M, 1, device=DEVICE), bias, 200)
    assert torch.equal(ids, reference.top(bias[None], 200)[0])


# feedback_step


def layers(D: int, F: int, V: int, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    def linear(n_in: int, n_out: int) -> tuple[Tensor, Tensor]:
        return normal(n_out, n_in, dtype=dtype) / n_in**0.5, normal(n_out, dtype=dtype)

    return [linear(D, F), linear(F, F), linear(F, F), linear(F, 1)], [linear(D + 1, F), linear(F, F), linear(F, V)]


def step_inputs(B: int, M: int, H: int, D: int, F: int, V: int, dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    """u, weight, bias, hx, lookup, reward, feedback, hoisted, wv; scores exact in every dtype."""
    entry = normal(B, 70, dtype=dtype), normal(V, 70, dtype=dtype)
    scored = integers(B, H, dtype=dtype), integers(M, H, dtype=dtype), integers(M, dtype=dtype)
    return *scored, normal(B, D, dtype=dtype), normal(M, D, dtype=dtype), *layers(D, F, V, dtype), *entry


def our_step(*arguments: Any, state: Any = None) -> tuple[Tensor, ...]:
    return kernels.feedback_step(*arguments, state)[:5]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("action", ["straight_through", "topk_softmax", "hard"])
def test_step(action: str, dtype: torch.dtype) -> None:
    inputs = step_inputs(5, 300, 7, 12, 20, 9, dtype)
    compare(our_step, reference.feedback_step, *inputs, 10, action, csr(5, 300, 9))


def test_step_at_the_papers_widths_over_two_groups() -> None:
    inputs = step_inputs(19, 90, 4, 64, 128, 128)
    compare(our_step, reference.feedback_step, *inputs, 12, "topk_softmax", csr(19, 90, 30))


@pytest.mark.usefixtures("filtered")
def test_step_by_filter() -> None:
    inputs = step_inputs(3, 300, 3, 12, 20, 9)
    compare(our_step, reference.feedback_step, *inputs, 5, "hard", csr(3, 300, 9))


@pytest.mark.usefixtures("chunked")
def test_step_by_chunks() -> None:
    inputs = step_inputs(4, 300, 3, 12, 20, 9)
    compare(our_step, reference.feedback_step, *inputs, 20, "straight_through", csr(4, 300, 20))


def test_step_with_empty_lists_and_other_depths() -> None:
    """Every item excluded: h is hx, nothing is NaN. Two reward layers: the dense part by library calls."""
    *inputs, reward, feedback, hoisted, wv = step_inputs(3, 20, 3, 12, 20, 9)
    hx = inputs[3]
    exclude = torch.arange(20, device=DEVICE).repeat(2), torch.tensor([0, 20, 20, 40], device=DEVICE)
    for depth in (0, 2):
        shallow = [(normal(20, 12), normal(20)), (normal(1, 20), normal(1))]
        rest = shallow if depth else reward, feedback, hoisted, wv, 5, "topk_softmax", exclude
        compare(our_step, reference.feedback_step, *inputs, *rest)
    rest = reward, feedback, hoisted, wv, 5, "hard", exclude
    v, _, ids, _, _, h, w = kernels.feedback_step(*inputs, *rest)
    assert torch.equal(h[[0, 2]], hx[[0, 2]])
    assert (ids[[0, 2]] == -1).all()
    assert (w[[0, 2]] == 0).all()
    assert v.isfinite().all()


def test_step_is_the_same_for_every_batch_and_every_turn() -> None:
    """Same bits alone and together, first and later with one state: counters and buffers reset themselves."""
    u, weight, bias, hx, lookup, reward, feedback, hoisted, wv = step_inputs(17, 90, 3, 12, 20, 9)
    state = kernels.loop_state()

    def step(users: slice, *more: Any) -> tuple[Tensor, ...]:
        rest = lookup, reward, feedback, hoisted[users], wv, 5, "hard"
        return kernels.feedback_step(u[users], weight, bias, hx[users], *rest, *more)

    first, again, alone = step(slice(None), None, state), step(slice(None), None, state), step(slice(16, None))
    for x, y, z in zip(first, again, alone, strict=True):
        assert torch.equal(x, y)
        assert torch.equal(x[16:], z)


@pytest.mark.parametrize("action", ["straight_through", "topk_softmax", "hard"])
def test_fuse(action: str) -> None:
    ids = torch.randint(-1, 40, (5, 37), device=DEVICE).sort(1, descending=True).values
    ids[2] = -1
    scores = normal(5, 37).masked_fill(ids < 0, float("-inf"))
    compare(lambda *a: kernels.fuse(*a)[0], reference.fuse, normal(5, 9), normal(40, 9), ids, scores, action)


def test_row_dot() -> None:
    ids = torch.randint(-1, 40, (5, 37), device=DEVICE)

    def spec(x: Tensor, table: Tensor, ids: Tensor) -> Tensor:
        return (table[ids.clamp_min(0)] * x[:, None]).sum(2).masked_fill(ids < 0, 0)

    compare(kernels.row_dot, spec, normal(5, 200)[:, 3:140], normal(40, 137), ids)


# row_bag


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("D", "weighted"), [(1, True), (64, False), (137, True)])
def test_row_bag(D: int, weighted: bool, dtype: torch.dtype) -> None:
    items, offsets = csr(6, 40, 17)
    weights = normal(len(items), dtype=dtype) if weighted else None
    compare(kernels.row_bag, reference.row_bag, normal(40, D + 3, dtype=dtype)[:, :D], items, offsets, weights)


def bag_gradient(B: int, M: int, n: int, D: int, weighted: bool, hot: int = 0) -> None:
    items, offsets = csr(B, M, n)
    if hot:
        items[: len(items) * 3 // 4] = hot
    weights = normal(len(items)) if weighted else None
    dout = normal(B, D)

    def spec(dout: Tensor, items: Tensor, offsets: Tensor, weights: Tensor | None, M: int) -> Tensor:
        rows = reference.rows_of(offsets)
        entries = dout[rows] if weights is None else dout[rows] * weights[:, None]
        return dout.new_zeros(M, D).index_add(0, items, entries)

    compare(kernels.row_bag_backward, spec, dout, items, offsets, weights, M)


def test_row_bag_gradient() -> None:
    bag_gradient(7, 50, 11, 9, weighted=True)
    bag_gradient(7, 50, 0, 9, weighted=False)


@pytest.mark.parametrize("hot", [3, 29])
def test_row_bag_gradient_of_a_hot_item(hot: int) -> None:
    """A segment over many splits, with a head and a tail."""
    bag_gradient(60, 30, 14, 5, weighted=hot == 3, hot=hot)


# linear_nll


def our_nll(u: Tensor, weight: Tensor, bias: Tensor, x: Any, exclude: Any) -> tuple[Tensor, ...]:
    nll, _, _, kept = kernels.linear_nll(u, weight, bias, *x, exclude, 0)
    _, lse, _, kept = kernels.linear_nll(u, weight, bias, *x, exclude, 0)
    return nll, *kernels.linear_nll_backward(torch.ones_like(nll), u, weight, bias, *x, exclude, lse, kept)


def nll_with_gradients(u: Tensor, weight: Tensor, bias: Tensor, x: Any, exclude: Any) -> tuple[Tensor, ...]:
    with torch.enable_grad():
        leaves = [t.detach().requires_grad_() for t in (u, weight, bias)]
        nll = reference.linear_nll(*leaves, *x, exclude)
        return nll.detach(), *torch.autograd.grad(nll.sum(), leaves)


def nll(B: int, M: int, dtype: torch.dtype, excluding: bool) -> None:
    u, weight, bias = normal(B, 6, dtype=dtype), normal(M, 6, dtype=dtype), normal(M, dtype=dtype)
    everything = csr(B, M, M // 4)
    exclude = None
    if excluding:  # rows of the targets' complement
        rows = [torch.ones(M, dtype=torch.bool) for _ in range(B)]
        for b, row in enumerate(rows):
            row[everything[0][everything[1][b] : everything[1][b + 1]].cpu()] = False
            row[::3] = False
        kept = [row.nonzero().squeeze(1) for row in rows]
        exclude = (
            torch.cat(kept).to(DEVICE),
            torch.tensor([0, *(len(row) for row in kept)]).cumsum(0).to(DEVICE),
        )
    compare(our_nll, nll_with_gradients, u, weight, bias, everything, exclude)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("excluding", [False, True])
def test_nll(excluding: bool, dtype: torch.dtype) -> None:
    nll(5, 301, dtype, excluding)


@pytest.mark.usefixtures("chunked")
def test_nll_by_chunks() -> None:
    nll(4, 517, torch.float32, excluding=False)
    nll(4, 517, torch.float32, excluding=True)


@pytest.mark.usefixtures("chunked")
@pytest.mark.parametrize("M", [300, 64])
def test_nll_with_a_list(M: int) -> None:
    u, weight, bias, x = integers(4, 6), integers(M, 6), integers(M), csr(4, M, 9)
    _, _, (ids, scores), _ = kernels.linear_nll(u, weight, bias, *x, None, 11)
    true_ids, true_scores = reference.linear_topk(u, weight, bias, 11)
    assert torch.equal(ids, true_ids)
    assert torch.equal(scores, true_scores)


def test_nll_of_nothing() -> None:
    """Every item of a user excluded: the loss is 0, the gradient too."""
    exclude = torch.arange(9, device=DEVICE), torch.tensor([0, 9], device=DEVICE)
    x = torch.empty(0, dtype=torch.int64, device=DEVICE), torch.zeros(2, dtype=torch.int64, device=DEVICE)
    loss, *gradients = our_nll(normal(1, 2), normal(9, 2), normal(9), x, exclude)
    assert loss.item() == 0
    assert all((g == 0).all() for g in gradients)


# Through the border: gradients of a whole step


@pytest.mark.parametrize("action", ["straight_through", "topk_softmax", "softmax", "hard"])
def test_gradients_through_ops(action: str) -> None:
    inputs = step_inputs(3, 60, 4, 12, 20, 9)
    x, exclude = csr(3, 60, 5), csr(3, 60, 7)
    weights = torch.rand(len(x[0]), device=DEVICE)

    def gradients(*flat: Any) -> tuple[Tensor, ...]:
        *leaves, reward, feedback, hoisted, wv, bag = flat
        leaves += [hoisted, wv]
        leaves = [t.detach().clone().requires_grad_() for t in leaves]
        reward, feedback = ([(a.detach().clone().requires_grad_(), b) for a, b in net] for net in (reward, feedback))
        with (
            torch.enable_grad(),
            backends.use_backend("reference" if leaves[0].dtype == torch.float64 or plain else "triton"),
        ):
            u, weight, bias, hx, lookup, hoisted, wv = leaves
            output, table = ops.Table(weight, bias), ops.Table(lookup)
            got = ops.feedback_step(u, output, hx, table, reward, feedback, hoisted, wv, 8, action, exclude)
            loss, _, best = ops.linear_nll(u, output, *x, None, 8)
            total = (
                got.feedback.sum() + got.logit.sum() + got.following.square().sum() + loss.sum() + best.square().sum()
            )
            total = total + ops.row_bag(table, *x, bag).square().sum() + got.scores[:, :2].square().sum()
            return torch.autograd.grad(total, [*leaves, reward[0][0], feedback[0][0]])

    plain = False
    ours = gradients(*inputs, weights)
    plain = True
    compare(lambda *_: ours, gradients, *inputs, weights)


# Room behind the rows: entries of no row, with an id out of range


def test_room_is_not_looked_at() -> None:
    B, M, D = 21, 150, 9
    (items, offsets), exclude = csr(B, M, 14), csr(B, M, 6)
    items[: len(items) * 3 // 4] = 3  # a hot item's splits
    weights, table, dout, dnll = normal(len(items)), normal(M, D), normal(B, D), normal(B)
    step = step_inputs(B, M, 7, 12, 20, 9)

    def roomy(rows: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return torch.cat([rows[0], rows[0].new_full((777,), M)]), rows[1]

    answers = []
    for x, w, gone in (
        ((items, offsets), weights, exclude),
        (roomy((items, offsets)), torch.cat([weights, weights.new_full((777,), 1e6)]), roomy(exclude)),
    ):
        nll, lse, lists, kept = kernels.linear_nll(*step[:3], *x, gone, 5)
        answers.append(
            [
                kernels.row_bag(table, *x, w),
                kernels.row_bag_backward(dout, *x, w, M),
                kernels.row_bag_backward(dout, *x, None, M),
                *kernels.feedback_step(*step, 10, "topk_softmax", gone),
                *kernels.linear_topk(*step[:3], 20, gone),
                nll, lse, *lists,
                *kernels.linear_nll_backward(dnll, *step[:3], *x, gone, lse, kept),
            ]
        )  # fmt: skip
    for i, (exact, found) in enumerate(zip(*answers, strict=True)):
        assert torch.equal(exact, found), i
