"""torch.compile of models and updates: one graph, the operations in it as operators, the answers of eager calls."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import scipy.sparse as sp
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from cfsfl_fast import CFSFL, backends, cpp, library, operators, ops
from cfsfl_fast.interactions import Interactions, as_interactions
from cfsfl_fast.testing import backend_params, random_problem
from cfsfl_fast.training import Noise, joint_step, recommender_step, view

M, B = 60, 7


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """No trace is left from another test."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def histories(seed: int = 0, n_users: int = B) -> Interactions:
    return as_interactions(sp.random(n_users, M, 0.2, format="csr", random_state=seed), M)


def build(**choices: Any) -> CFSFL:
    torch.manual_seed(0)
    sizes = {"hidden_dim": 12, "latent_dim": 8, "lookup_dim": 8, "feedback_dim": 8, "steps": 2, "top_k": 5}
    model = CFSFL(M, **{**sizes, **choices})
    torch.nn.init.normal_(model.recommender.input.feedback)
    return model.eval()


def same_gradients(model: CFSFL, compiled: Callable[..., Tensor], eager: Callable[..., Tensor], *inputs: Any) -> None:
    parameters = list(model.parameters())
    found, expected = compiled(*inputs), eager(*inputs)
    assert torch.equal(found, expected)
    gradients = (torch.autograd.grad(loss, parameters, allow_unused=True) for loss in (found, expected))
    for (name, _), one, other in zip(model.named_parameters(), *gradients, strict=True):
        assert (one is None) == (other is None), name
        assert one is None or torch.allclose(one, other, atol=1e-6), name


@pytest.mark.parametrize("backend", backend_params())
def test_a_compiled_model_is_one_graph_and_the_eager_model(backend: str) -> None:
    action = "softmax" if backend == "torch" else "straight_through"  # which every backend has of the library
    model, counter = build(backend=backend, action=action), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(histories()), model(histories()))
    target = torch.randn(B, M)
    loss = lambda network: lambda x: (network(x) * target).sum()  # noqa: E731
    same_gradients(model, loss(compiled), loss(model), histories())
    assert counter.frame_count == 2  # with gradients and without
    names = {str(node.target) for graph in counter.graphs for node in graph.graph.nodes}
    assert any("_feedback_step" in name or "_fuse_softmax" in name for name in names)


@pytest.mark.parametrize(
    ("step", "recommender"),
    [(joint_step, "vae"), *((recommender_step, name) for name in ("vae", "mf", "warp", "cdae", "awae"))],
)
def test_a_compiled_update_is_the_eager_one(step: Callable[..., Any], recommender: str) -> None:
    model = build(recommender=recommender, anneal_steps=10, reading="heldout").train()
    users = torch.arange(B)
    batch = view(histories(), users, model.config, 0)
    eps = Noise(users, model.config.latent_dim, False, (0,))

    def loss() -> Tensor:
        found = step(model, batch, eps, 3)
        return found[0] if isinstance(found, tuple) else found

    same_gradients(model, torch.compile(loss, backend="aot_eager", fullgraph=True), loss)


def test_batches_of_other_shapes() -> None:
    model, counter = build(), CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    with torch.no_grad():
        for seed in range(5):
            x = histories(seed, n_users=B + seed)
            assert torch.equal(compiled(x), model(x))
    assert counter.frame_count <= 3  # the first shapes, others, and more users than the padding of the first


@pytest.mark.parametrize("form", ["scipy", "dense"])
def test_other_forms_of_histories_are_converted_outside_the_graph(form: str) -> None:
    x = sp.random(B, M, 0.2, format="csr", random_state=0)
    model = build()
    with torch.no_grad():
        found = torch.compile(model, backend="eager")(x if form == "scipy" else torch.tensor(x.toarray()))
        assert torch.equal(found, model(x))


def test_the_backend_of_a_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """The innermost choice: of the model, of `use_backend` inside or outside of what is compiled."""
    seen: list[str] = []
    real = backends.resolve
    monkeypatch.setattr(backends, "resolve", lambda device, asked=None: seen.append(real(device, asked)) or seen[-1])
    x = histories()
    torch.compile(build(backend="torch"), backend="eager")(x)
    assert set(seen) == {"torch"}
    seen.clear()
    with backends.use_backend("torch"):
        torch.compile(build(), backend="eager")(x)
    assert set(seen) == {"torch"}
    seen.clear()

    def inside(u: Tensor) -> Tensor:
        with backends.use_backend("reference"):
            return ops.linear_topk(u, ops.Table(u, u[:, 0]), 1)[1]

    torch.compile(inside, backend="eager")(torch.randn(3, 3))
    assert "reference" in seen
    assert not backends._traced


# Operators


def operator_inputs(backend: str) -> dict[str, tuple[Any, ...]]:
    p = random_problem(6, 40, 5)
    assert p.exclude is not None
    rows, x = p.exclude, (p.items, p.offsets)
    flat = [t for layer in (*p.reward, *p.feedback) for t in layer]
    linear = p.u, p.weight, p.bias
    ids, scores = library.linear_topk(*linear, 5, rows)
    lse = torch.linspace(1, 2, 6)
    mean, soft_lse = library.fuse_softmax(*linear, p.lookup, rows)
    return {
        "loop_state": (backend,),
        "row_bag": (p.lookup, *x, p.weights, backend),
        "row_bag_backward": (p.hx, *x, p.weights, 40, backend),
        "row_dot": (p.hx, p.lookup, ids, backend),
        "fuse": (p.hx, p.lookup, ids, scores, "topk_softmax", backend),
        "fuse_softmax": (*linear, p.lookup, *rows),
        "fuse_softmax_backward": (p.hx, *linear, p.lookup, *rows, mean, soft_lse),
        "linear_topk": (*linear, 5, *rows, None, backend),
        "feedback_step": (*linear, p.hx, p.lookup, flat, 3, p.hoisted, p.wv, 5, "hard", None, None, None, backend),
        "linear_nll": (*linear, *x, *rows, 5, None, backend),
        "linear_nll_backward": (torch.randn(6), *linear, *x, None, None, lse, backend),
    }


@pytest.mark.parametrize("backend", backend_params())
@pytest.mark.parametrize("name", operator_inputs(""))
def test_operators_are_registered_rightly(name: str, backend: str) -> None:
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    if name == "loop_state":
        checks = checks[:2]  # no two calls give the same number
    operator = getattr(torch.ops.cfsfl_fast, name).default
    torch.library.opcheck(operator, operator_inputs(backend)[name], test_utils=checks)


def test_every_operator_is_checked() -> None:
    registered = {n.split("::")[1].split(".")[0] for n in torch._C._dispatch_get_all_op_names() if "cfsfl_fast::" in n}
    assert registered == set(operator_inputs(""))


def test_steps_of_a_compiled_loop_remember_one_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """One state for each run of the loop, which every step gets, and which goes when the loop is over."""
    given: list[Any] = []
    real = cpp.linear_topk
    monkeypatch.setattr(cpp, "linear_topk", lambda *a: given.append(a[5]) or real(*a))
    model = build(backend="cpp", steps=3)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        for seed in (0, 1):
            assert torch.equal(compiled(histories(seed)), model(histories(seed)))
    first, second = given[:3], given[6:9]
    assert first[0] is first[1] is first[2] is not None
    assert second[0] is second[2] is not first[0]
    given.clear()
    del first, second
    gc.collect()
    assert not operators._states


def test_room_behind_rows_is_not_looked_at() -> None:
    model, x = build(), histories()
    roomy = x.padded(len(x), len(x.items) + 30)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    same_gradients(model, lambda _: compiled(roomy).square().sum(), lambda _: model(x).square().sum(), None)


def test_eager_calls_meet_no_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("an operator was called")

    monkeypatch.setattr(operators.Operators, "__init__", refuse)
    model = build()
    model(histories()).sum().backward()
    model.recommend(histories(), 3)
