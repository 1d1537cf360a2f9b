"""Precision and determinism: what each promises, and that torch's switches come back."""

from __future__ import annotations

import copy
import os
from typing import Any

import pytest
import torch

from cfsfl_fast import CFSFL, CFSFLConfig, backends, numerics, ops
from cfsfl_fast.datasets import Dataset, Protocol, split_events
from cfsfl_fast.datasets.matrices import matrix_events
from cfsfl_fast.reference import ACTIONS
from cfsfl_fast.runs import Run
from cfsfl_fast.testing import random_problem
from tests.conftest import clusters
from tests.test_captured import CUDA, DEVICES
from tests.test_model import M, build, histories
from tests.test_training import QUICK

CPU = torch.device("cpu")


def switches() -> tuple[Any, ...]:
    return (
        torch.get_float32_matmul_precision(),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        numerics.filling.fill_uninitialized_memory,
    )


def _fail_after(act: Any, value: Any) -> None:
    act(value)
    raise ZeroDivisionError


@pytest.mark.parametrize("before", ["highest", "high"])
@pytest.mark.parametrize("strict", [(False, False), (True, True), (True, False)])
def test_switches_come_back(before: str, strict: tuple[bool, bool], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(numerics.WORKSPACE, raising=False)
    held = switches()
    try:
        torch.set_float32_matmul_precision(before)
        torch.use_deterministic_algorithms(strict[0], warn_only=strict[1])
        mine = switches()
        for precision in ("fp32", "bf16"):
            seen = []
            with pytest.raises(ZeroDivisionError), numerics.numerics(precision, True, CPU):
                _fail_after(seen.append, switches()[:3])
            assert seen == [("highest", True, False)]
            assert switches() == mine
        with numerics.numerics("bf16", False, torch.device("cuda")):
            assert switches() == ("high", *mine[1:])
        with numerics.numerics("fp32", False, torch.device("cuda")):
            assert switches() == ("highest", *mine[1:])
        assert switches() == mine
    finally:
        torch.set_float32_matmul_precision(held[0])
        torch.use_deterministic_algorithms(held[1], warn_only=held[2])
        os.environ.pop(numerics.WORKSPACE, None)


def test_what_a_device_cannot_do_is_refused() -> None:
    with pytest.raises(ValueError, match=r"tf32.*tensor cores; the model is on cpu"):
        build(precision="tf32").recommend(histories())
    with pytest.raises(ValueError, match="precision must be one of fp32, tf32, bf16; got 'fp16'"):
        build(precision="fp16")
    with pytest.raises(ValueError, match='backend="reference"'):
        build(precision="bf16", backend="reference")


def test_a_narrow_precision_trains_by_the_multinomial_loss_alone(toy: Dataset, tmp_path: Any) -> None:
    run = Run(
        toy, tmp_path / "run", CFSFLConfig(**{**QUICK, "recommender": "mf"}), show_progress=False, precision="bf16"
    )
    with pytest.raises(ValueError, match="'mf' has another"):
        run.train()


def rounded(model: CFSFL) -> CFSFL:
    """The model in float32 whose output layer a narrow one's product sees."""
    twin = copy.deepcopy(model)
    twin.precision = "fp32"
    with torch.no_grad():
        for t in (twin.recommender.output.weight, twin.recommender.output.bias):
            t.copy_(t.bfloat16())
    return twin


@DEVICES
@pytest.mark.parametrize("action", ACTIONS)
def test_narrow_products_are_near_and_differ(action: str, device: str) -> None:
    model = build(precision="bf16", action=action).to(device)
    x = histories()
    with torch.no_grad():
        narrow, wide = model(x, steps=0), rounded(model)(x, steps=0)
    assert narrow.dtype == torch.float32
    assert not torch.equal(narrow, wide)
    torch.testing.assert_close(narrow, wide, atol=0.05, rtol=0.02)
    for t in model.parameters():
        assert t.dtype == torch.float32
    assert bool(model(x).isfinite().all())
    model(x).square().mean().backward()
    wide_twin = rounded(model)
    wide_twin(x).square().mean().backward()
    for (name, one), other in zip(model.named_parameters(), wide_twin.parameters(), strict=True):
        if name.startswith("recommender."):  # the virtual user's gradients hang on which items are listed
            assert one.grad is not None
            assert other.grad is not None
            assert one.grad.dtype == torch.float32
            assert float((one.grad - other.grad).norm()) < 0.2 * float(other.grad.norm()) + 1e-6, name


@DEVICES
def test_lists_of_narrow_products_are_scored_again_on_request(device: str) -> None:
    """The list is that of float32 as long as the margin holds its items; scores then are float32's. On a CUDA device,
    with the code of tf32.
    """
    model = build(precision="bf16", steps=0).to(device)
    twin = copy.deepcopy(model)
    twin.precision = "fp32" if device == "cpu" else "tf32"
    x = histories()
    for options in ({}, {"exclude_seen": False}, {"candidates": [50, 4, 9, 30, 31, 32], "exclude": [9]}):
        expected = twin.recommend(x, 9, rescore=True, **options)
        narrow, again = (model.recommend(x, 9, rescore=rescore, **options) for rescore in (False, True))
        assert torch.equal(again[0], expected[0])
        torch.testing.assert_close(again[1], expected[1], atol=1e-5, rtol=1e-5)
        assert not torch.equal(narrow[1], expected[1])
    twin.precision = "fp32"
    assert torch.equal(twin.recommend(x, 9, rescore=True)[1], twin.recommend(x, 9)[1])


@pytest.mark.parametrize("backend", ["torch", "cpp"])
def test_losses_of_narrow_products_are_float32(backend: str) -> None:
    p = random_problem(30, 300, 40, exclude=False)
    answers = []
    for dtype in (torch.bfloat16, torch.float32):
        leaves = [t.bfloat16().to(dtype).requires_grad_() for t in (p.u, p.weight, p.bias)]
        with backends.use_backend(backend):
            nll, _, scores = ops.linear_nll(leaves[0], ops.Table(*leaves[1:]), p.items, p.offsets, None, 5)
            (nll.mean() + scores.mean()).backward()
        answers.append((nll, scores, *(t.grad.float() for t in leaves if t.grad is not None)))
    (nll, scores, *_), _ = answers
    assert nll.dtype == scores.dtype == torch.float32
    for one, other in zip(*([t.detach() for t in ts] for ts in answers), strict=True):
        assert float((one - other).norm()) < 0.02 * float(other.norm())


@DEVICES
def test_training_with_narrow_products_learns_as_well(device: str, tmp_path: Any) -> None:
    pytest.importorskip("safetensors")
    data = split_events(matrix_events(clusters(400), "clusters"), Protocol(held_out=40))
    config = CFSFLConfig(**{**QUICK, "epochs": (12, 1, 2)})
    run = Run(data, tmp_path / "run", config, device=device, show_progress=False, precision="bf16")
    _, plain, control, looped = (found["Recall@20"][0] for found in run.train()["test"].values())
    assert min(plain, control, looped) > 0.99


@pytest.mark.parametrize("device", [CUDA])
@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_deterministic_answers_do_not_depend_on_the_batch(device: str, precision: str) -> None:
    sizes = {"hidden_dim": 600, "latent_dim": 200, "lookup_dim": 64, "feedback_dim": 128, "top_k": 20}
    model = build(2000, deterministic=True, precision=precision, **sizes).to(device)
    x = histories(700, 2000)
    ids, scores = model.recommend(x, 30)
    for size in (1, 33, 512, 700):
        n = min(8 * size, 700)
        found = model.recommend(x[:n], 30, batch_size=size)
        assert torch.equal(found[0], ids[:n])
        assert torch.equal(found[1], scores[:n])


def test_a_model_says_what_it_runs_with() -> None:
    model = CFSFL(M, precision="bf16", deterministic=True, graphs=False)
    again = CFSFL.from_config(M, model.config)
    assert (model.precision, model.deterministic, model.graphs.mode) == ("bf16", True, False)
    assert (again.precision, again.deterministic, again.graphs.mode) == ("fp32", False, "auto")
    assert "precision" not in model.config.to_dict()
