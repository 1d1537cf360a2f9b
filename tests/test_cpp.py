"""The C++ kernels: every instruction set, thread count and shortcut gives the same bits, also on hostile inputs."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cfsfl_fast import reference
from cfsfl_fast.testing import Problem, poisoned, random_problem, random_rows

cpp = pytest.importorskip("cfsfl_fast.cpp", reason="the extension is not built")
_cpp = cpp._cpp

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def _restore() -> Iterator[None]:
    isa, screening, threads = _cpp.isa(), _cpp.screening(), torch.get_num_threads()
    yield
    _cpp.set_isa(isa)
    _cpp.set_screening(screening)
    torch.set_num_threads(threads)


def full(p: Problem, k: int) -> tuple[Tensor, Tensor]:
    """The lists with every shortcut off."""
    old = _cpp.set_screening(False)
    try:
        return cpp.linear_topk(p.u, p.weight, p.bias, k, p.exclude)
    finally:
        _cpp.set_screening(old)


def same(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> None:
    """The same bits, NaN included."""
    for x, y in zip(a, b, strict=True):
        if x.is_floating_point():
            x, y = x.contiguous().view(torch.int32), y.contiguous().view(torch.int32)
        assert torch.equal(x, y)


def everything(p: Problem, k: int) -> list[Tensor]:
    """Every operation's output once."""
    nll, lse, lists, kept = cpp.linear_nll(p.u, p.weight, p.bias, p.items, p.offsets, p.exclude, k)
    dnll = torch.linspace(0.1, 1, len(p.u))
    chunked = cpp.linear_nll_backward(dnll, p.u, p.weight, p.bias, p.items, p.offsets, p.exclude, lse, None)
    step = cpp.feedback_step(
        p.u,
        p.weight,
        p.bias,
        p.hx,
        p.lookup,
        p.reward,
        p.feedback,
        p.hoisted,
        p.wv,
        k,
        "topk_softmax",
        p.exclude,
        cpp.loop_state(),
    )
    bag = cpp.row_bag(p.lookup, p.items, p.offsets, p.weights)
    dbag = cpp.row_bag_backward(p.hx, p.items, p.offsets, p.weights, len(p.lookup))
    dot = cpp.row_dot(p.hx, p.lookup, step[2])
    assert kept is not None
    return [nll, lse, *lists, kept, chunked[2], *step, bag, dbag, dot]


SHAPES = [(1, 5, 1), (3, 2000, 7), (7, 70, 16), (29, 1500, 45), (61, 2300, 24), (500, 2100, 8)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("isa", _cpp.supported_isas())
def test_instruction_sets(isa: str, shape: tuple[int, int, int]) -> None:
    p = random_problem(*shape)
    expected = everything(p, min(20, shape[1]))
    assert _cpp.set_isa(isa) is not None
    assert _cpp.isa() == isa
    with poisoned():
        same(tuple(everything(p, min(20, shape[1]))), tuple(expected))


def test_unknown_instruction_set() -> None:
    with pytest.raises(ValueError, match=r"plain.*got 'mmx'"):
        _cpp.set_isa("mmx")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("screening", [False, True])
def test_thread_counts(shape: tuple[int, int, int], screening: bool) -> None:
    p = random_problem(*shape)
    _cpp.set_screening(screening)
    answers = []
    for threads in (1, 2, 3, 7, 2):
        torch.set_num_threads(threads)
        answers.append(tuple(everything(p, min(20, shape[1]))))
    for answer in answers[1:]:
        same(answer, answers[0])


def rows(p: Problem, chosen: list[int]) -> Problem:
    """A problem of some of the users."""

    def csr(items: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
        parts = [items[offsets[b] : offsets[b + 1]] for b in chosen]
        ends = torch.tensor([0, *(len(part) for part in parts)]).cumsum(0)
        return torch.cat(parts), ends

    items, offsets = csr(p.items, p.offsets)
    exclude = None if p.exclude is None else csr(*p.exclude)
    return Problem(
        p.u[chosen], p.weight, p.bias, exclude, items, offsets, csr(p.weights, p.offsets)[0], p.hx[chosen],
        p.lookup, p.reward, p.feedback, p.hoisted[chosen], p.wv,
    )  # fmt: skip


@pytest.mark.parametrize("screening", [False, True])
@pytest.mark.parametrize("chosen", [[0], [5, 2], list(range(10, 40)), [*range(61)]])
def test_batches(chosen: list[int], screening: bool) -> None:
    """A user's answers have the same bits in any batch."""
    p = random_problem(61, 2300, 31)
    _cpp.set_screening(screening)

    def answers(q: Problem) -> tuple[Tensor, ...]:
        nll, lse, lists, kept = cpp.linear_nll(q.u, q.weight, q.bias, q.items, q.offsets, q.exclude, 13)
        step = cpp.feedback_step(
            q.u,
            q.weight,
            q.bias,
            q.hx,
            q.lookup,
            q.reward,
            q.feedback,
            q.hoisted,
            q.wv,
            13,
            "hard",
            q.exclude,
            cpp.loop_state(),
        )
        assert kept is not None
        step = *step[:4], *step[5:]  # less a product of the library's, which rounds by the batch
        return nll, lse, *lists, kept, *step, cpp.row_bag(q.lookup, q.items, q.offsets, q.weights)

    same(answers(rows(p, chosen)), tuple(t[chosen] for t in answers(p)))


def hostile(name: str, p: Problem, g: torch.Generator) -> Problem:
    """A problem with one kind of trouble."""
    u, weight, bias = p.u.clone(), p.weight.clone(), p.bias.clone()
    M = len(weight)
    if name == "equal":
        weight[:], bias[:] = weight[0].clone(), 0.5
    elif name == "duplicates":
        weight, bias = weight[torch.arange(M) % 7], bias[torch.arange(M) % 7]
    elif name == "huge":
        weight[::3] *= 1e30
        weight[5] *= 1e38
        u[1] *= 1e25
    elif name == "huge users":
        u *= 1e30
    elif name == "one ulp":
        weight[:] = weight[0].clone()
        bias = torch.full((M,), 1.0)
        bias[torch.randperm(M, generator=g)[: M // 2]] = torch.nextafter(torch.tensor(1.0), torch.tensor(2.0))
        u *= 1e-4
    elif name == "late ulp":  # the best come last, by the least that they can
        weight[:] = 0
        bias = torch.full((M,), 1.0)
        bias[-3:] = torch.nextafter(torch.tensor(1.0), torch.tensor(2.0))
    elif name == "denormal":
        weight *= 1e-39
        bias *= 1e-42
    elif name == "tiny and large":
        weight *= 1e-38
        u *= 1e37
        bias *= 0
    elif name == "small squares":  # || w ||^2 is flushed to zero, < u, w > is not
        weight *= 1e-20
        u *= 1e17
        bias *= 0
    elif name == "infinite bias":
        bias[::5], bias[1::5], bias[2::50] = float("-inf"), float("inf"), float("nan")
    elif name == "rare infinite bias":
        bias[3], bias[700], bias[701] = float("inf"), float("-inf"), float("nan")
    elif name == "not numbers":
        weight[7], weight[9, 0], weight[11, 1], u[2], u[3, 0] = (
            float("nan"),
            float("inf"),
            -float("inf"),
            float("nan"),
            float("inf"),
        )
    elif name == "zero":
        weight[:], bias[:], u[:] = 0, 0, 0
        bias[::2] = -0.0
    elif name == "one large norm":
        weight[17] *= 1000
    elif name == "large bias":
        bias = bias * 1e6
    return Problem(u, weight, bias, *list(vars(p).values())[3:])


HOSTILE = [
    "nothing", "equal", "duplicates", "huge", "huge users", "one ulp", "late ulp", "denormal", "tiny and large",
    "small squares", "infinite bias", "rare infinite bias", "not numbers", "zero", "one large norm", "large bias",
]  # fmt: skip


def check_shortcuts(p: Problem, k: int, g: torch.Generator, moves: list[float]) -> dict[str, int]:
    """Screened and stepwise lists against the full ones, bit for bit, and those against a sort of every score."""
    every = cpp.linear_nll(p.u, p.weight, p.bias, p.items, p.offsets, p.exclude, 0)[3]
    assert every is not None
    ids, scores = reference.top(every, k)
    found = full(p, k)
    assert torch.equal(found[0], ids)
    assert torch.equal(found[1], scores)
    same(cpp.linear_topk(p.u, p.weight, p.bias, k, p.exclude), full(p, k))
    state = cpp.loop_state()
    u = p.u
    for step, move in enumerate(moves):
        changed = torch.rand(len(u), 1, generator=g) < 0.7
        u = torch.where(
            changed, u + move * u.norm(dim=1, keepdim=True) / u.shape[1] ** 0.5 * torch.randn(u.shape, generator=g), u
        )
        if not move:
            u = u.clone()
        q = Problem(u, *list(vars(p).values())[1:])
        size = k if step % 4 < 3 else 2 * k
        same(cpp.linear_topk(q.u, q.weight, q.bias, size, q.exclude, state), full(q, size))
    return dict(state.counts)


@pytest.mark.parametrize("exclude", [False, True])
@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("flushed", [False, True])
def test_shortcuts_change_no_bit(name: str, exclude: bool, flushed: bool) -> None:
    g = torch.Generator().manual_seed(HOSTILE.index(name))
    p = hostile(name, random_problem(37, 2600, 41, exclude=exclude), g)
    old = _cpp.flush_denormals(flushed, torch.get_num_threads())
    try:
        for k in (1, 9, 50):
            check_shortcuts(p, k, g, [0, 1e-5, 0, 1e-3, 0.01, 1e-4, 0.3, 0, 3.0, 1e-6])
    finally:
        _cpp.flush_denormals(old, torch.get_num_threads())


def aligned(users: bool, g: torch.Generator) -> Problem:
    """What 8-bit codes lose of u (or of w) lies along the other vector: the best five items look worthless.

    One coordinate sets the step of the code, the others are just below half a step; the decoys are coded exactly.
    """
    M, H = 1500, 48
    p = random_problem(30, M, H, exclude=False)
    lossy, plain = torch.full((H,), 0.49), torch.ones(H)
    lossy[0], plain[0] = 127.0, 0.0
    u = (lossy if users else plain).repeat(30, 1)
    weight = torch.zeros(M, H)
    decoy = 1 + torch.rand(M, generator=g)
    weight[:, 0 if users else 1] = decoy / 127 if users else decoy
    best = torch.randperm(M, generator=g)[:5]
    weight[best] = plain if users else lossy
    return Problem(u, weight, torch.zeros(M), None, *list(vars(p).values())[4:])


@pytest.mark.parametrize("users", [True, False])
def test_codes_that_lose_what_counts(users: bool) -> None:
    g = torch.Generator().manual_seed(3)
    p = aligned(users, g)
    same(cpp.linear_topk(p.u, p.weight, p.bias, 5), full(p, 5))
    check_shortcuts(p, 5, g, [0, 1e-4, 0])


def test_roundings_that_count() -> None:
    """Scores that jump by a rounding of a cancelled sum: further than || u_t - u_(t-1) || ||w|| says."""
    M, H = 3000, 48
    p = random_problem(30, M, H, exclude=False)
    u, weight = torch.zeros(30, H), torch.zeros(M, H)
    # One lane adds 1e8, then v, then -1e8: v is rounded to a multiple of 8, and these lie beside the middle.
    u[:, 0], u[:, 32], weight[:, 0], weight[:, 32], weight[:, 16] = 1e8, 1e8, 1, -1, 3.9999
    weight[-5:, 16] = 8
    bias, state = torch.zeros(M), cpp.loop_state()
    for v in (1.0, 1.0001, 1.0, 1.0001):
        u = u.clone()
        u[:, 16] = v
        q = Problem(u, weight, bias, None, *list(vars(p).values())[4:])
        found = cpp.linear_topk(u, weight, bias, 5, None, state)
        same(found, full(q, 5))
        assert found[0][0, 0] == (M - 5 if v == 1 else 0)


@settings(max_examples=60, deadline=None)
@given(
    B=st.integers(24, 50),
    M=st.integers(500, 2600),
    H=st.integers(1, 70),
    k=st.integers(1, 60),
    levels=st.sampled_from([0, 1, 3, 50]),
    scale=st.sampled_from([1e-20, 1.0, 1e12]),
    seed=st.integers(0, 10**6),
    moves=st.lists(st.sampled_from([0, 1e-6, 1e-3, 0.05, 1.0]), max_size=5),
)
def test_shortcuts_on_any_problem(
    B: int, M: int, H: int, k: int, levels: int, scale: float, seed: int, moves: list[float]
) -> None:
    """levels > 0: few distinct values, so many equal scores."""
    g = torch.Generator().manual_seed(seed)
    p = random_problem(B, M, H, seed=seed, exclude=bool(seed % 2))
    if levels:
        p = Problem(p.u, (p.weight * levels).round() / levels, (p.bias * levels).round(), *list(vars(p).values())[3:])
    p = Problem(p.u, p.weight * scale, p.bias * scale, *list(vars(p).values())[3:])
    check_shortcuts(p, k, g, moves)


def test_ways_are_taken() -> None:
    """Screening, refinement, repetition and the full search all happen where they should."""
    p = random_problem(64, 6000, 40, exclude=False)
    state = cpp.loop_state()
    topk: Callable[[Tensor], object] = lambda u: cpp.linear_topk(u, p.weight, p.bias, 20, None, state)  # noqa: E731
    topk(p.u)
    first = state.counts
    assert first["screened"] + first["full"] == 64
    if _cpp.screening():
        assert first["screened"] > 60
    topk(p.u.clone())
    assert state.counts["repeated"] == 64
    u = p.u.clone()
    u[:32] += 1e-3
    topk(u)
    assert state.counts["repeated"] == 96
    assert state.counts["refined"] == 32
    topk(u + torch.randn(u.shape, generator=torch.Generator().manual_seed(0)))
    after = state.counts
    assert after["refined"] == 32, "too far for bounds"
    assert sum(after.values()) == 4 * 64


def test_a_list_that_is_finished_costs_no_product() -> None:
    """At a fixed point the state answers from memory: the table is not even read."""
    p = random_problem(40, 3000, 16, exclude=False)
    state = cpp.loop_state()
    weight = p.weight.clone()
    first = cpp.linear_topk(p.u, weight, p.bias, 9, None, state)
    weight.fill_(float("nan"))
    same(cpp.linear_topk(p.u, weight, p.bias, 9, None, state), first)


def test_loss_scores_are_the_lists_scores() -> None:
    """The loss keeps exactly the scores that lists are made of."""
    p = random_problem(31, 1500, 29)
    *_, (ids, scores), kept = cpp.linear_nll(p.u, p.weight, p.bias, p.items, p.offsets, p.exclude, 17)
    same((ids, scores), full(p, 17))
    assert torch.equal(kept.gather(1, ids), scores)


def test_repeated_runs() -> None:
    p = random_problem(61, 2300, 31)
    with poisoned():
        first = tuple(everything(p, 11))
        for _ in range(3):
            same(tuple(everything(p, 11)), first)


def test_other_dtypes_are_the_librarys() -> None:
    from cfsfl_fast import library

    p = random_problem(7, 60, 9).to(torch.float64)
    same_ids = cpp.linear_topk(p.u, p.weight, p.bias, 5)[0], library.linear_topk(p.u, p.weight, p.bias, 5)[0]
    assert torch.equal(*same_ids)
    assert cpp.row_bag(p.lookup, p.items, p.offsets).dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_that_torch_would_read_out_of_bounds_are_refused_in_every_dtype(dtype: torch.dtype) -> None:
    p = random_problem(4, 60, 9).to(dtype)
    items, offsets = torch.tensor([3, 5]), torch.tensor([0, 2**40, -(2**40), 1, 2])
    u, weight, bias = p.u, p.weight, p.bias
    for call in (
        lambda: cpp.row_bag(p.lookup, items, offsets),
        lambda: cpp.row_bag_backward(u, items, offsets, None, 60),
        lambda: cpp.linear_topk(u, weight, bias, 5, (items, offsets)),
        lambda: cpp.linear_nll(u, weight, bias, items, offsets, None, 5),
        lambda: cpp.linear_nll(u, weight, bias, p.items, p.offsets, (items, offsets), 5),
        lambda: cpp.linear_nll_backward(bias[:4], u, weight, bias, items, offsets, None, bias[:4], None),
    ):
        with pytest.raises(ValueError, match="offsets must ascend"):
            call()


@pytest.mark.parametrize(
    ("items", "offsets", "message"),
    [
        ([3, 2], [0, 2, 2], "ascend"),
        ([2, 2], [0, 2, 2], "ascend"),
        ([2, 60], [0, 2, 2], "60"),
        ([-1, 3], [0, 2, 2], "-1"),
        ([1, 3], [0, 1], "3 offsets"),
        ([1, 3], [0, 1, 1], "offsets must ascend"),
    ],
)
def test_bad_rows_are_refused(items: list[int], offsets: list[int], message: str) -> None:
    p = random_problem(2, 60, 9)
    with pytest.raises(ValueError, match=message):
        cpp.linear_topk(p.u, p.weight, p.bias, 5, (torch.tensor(items), torch.tensor(offsets)))


@pytest.mark.parametrize("bad", [-1, 60])
def test_bad_items_are_refused(bad: int) -> None:
    p = random_problem(2, 60, 9)
    rows = torch.tensor([bad]), torch.tensor([0, 1, 1])
    with pytest.raises(ValueError, match=str(bad)):
        cpp.row_bag(p.lookup, *rows)
    with pytest.raises(ValueError, match=str(bad)):
        cpp.row_bag_backward(p.hx, *rows, None, 60)
    with pytest.raises(ValueError, match=str(bad)):
        cpp.linear_nll(p.u, p.weight, p.bias, *rows, None, 3)


def test_flush_denormals_reaches_every_thread() -> None:
    tiny = torch.full((200_000,), 1e-39)
    threads = torch.get_num_threads()
    old = _cpp.flush_denormals(True, threads)
    try:
        assert _cpp.flush_denormals(True, threads) is True or not (tiny * 0.5 == 0).all()
        assert (tiny * 0.5 == 0).all() or sys.platform != "linux"
    finally:
        _cpp.flush_denormals(old, threads)
    assert (tiny * 0.5 != 0).all()


@pytest.mark.parametrize("flushed", [False, True])
def test_pool_follows_its_caller(flushed: bool) -> None:
    """torch.set_flush_denormal reaches one thread; the scores of denormal products must not show which."""
    p = random_problem(50, 700, 24)
    weight, bias = p.weight * 1e-40, p.bias * 1e-40
    torch.set_num_threads(2)
    before = _cpp.flush_denormals(not flushed, 2)
    assert torch.set_flush_denormal(flushed)
    try:
        two = cpp.linear_topk(p.u, weight, bias, 30)
        torch.set_num_threads(1)
        same(cpp.linear_topk(p.u, weight, bias, 30), two)
        assert bool(two[1].view(torch.int32).any()) is not flushed
    finally:
        torch.set_flush_denormal(False)
        _cpp.flush_denormals(before, 2)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_one_openmp_pool() -> None:
    """The extension runs in torch's OpenMP library; a second one would fight it for the cores."""
    code = (
        "import cfsfl_fast.cpp; print(*{l.split()[-1] for l in open('/proc/self/maps') if 'gomp' in l or 'iomp' in l})"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    pools = [path for path in out.stdout.split() if "libgomp" in path or "libiomp" in path]
    assert len(pools) == 1, pools


def test_environment_chooses() -> None:
    env = {**os.environ, "CFSFL_ISA": "plain", "CFSFL_SCREENING": "0"}
    code = "from cfsfl_fast import cpp; print(cpp._cpp.isa(), cpp._cpp.screening())"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT, env=env)
    assert out.stdout.split() == ["plain", "False"]


@pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="installed without its sources")
def test_a_failing_compiler_leaves_a_working_install(tmp_path: Path) -> None:
    env = {**os.environ, "CC": "false", "CXX": "false"}
    args = ["setup.py", "build_ext", "--force", "--build-lib", str(tmp_path), "--build-temp", str(tmp_path / "temp")]
    out = subprocess.run([sys.executable, *args], capture_output=True, text=True, cwd=ROOT, env=env, timeout=60)
    assert out.returncode == 0, out.stderr
    assert "C++ kernels were not built" in out.stdout + out.stderr
    assert not list(tmp_path.rglob("*.so"))


def test_exclusion_rows_are_random_but_legal() -> None:
    """The builder that every test leans on."""
    items, offsets = random_rows(50, 40, 30, torch.Generator().manual_seed(0))
    assert offsets[1] == 0
    for b in range(50):
        row = items[offsets[b] : offsets[b + 1]]
        assert (row.diff() > 0).all()
