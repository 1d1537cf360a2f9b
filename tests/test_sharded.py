"""Item tables in parts: the same weights, lists, losses and gradients as in one process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from cfsfl_fast import CFSFL, CFSFLConfig, backends, item_rows
from cfsfl_fast.distributed import ALONE
from cfsfl_fast.sharded import Shard
from tests.processes import outputs
from tests.test_distributed import Nth

BACKENDS = [
    pytest.param(backend, marks=pytest.mark.skipif(reason is not None, reason=str(reason)))
    for backend in ("torch", "cpp")
    for reason in [backends.why_not(backend, torch.device("cpu"))]
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("size", "choices"),
    [
        (2, {}),
        (3, {"action": "topk_softmax", "mask_kept": False, "recommender": "dae"}),
        (2, {"action": "softmax", "reading": "full", "loss_steps": "all"}),
    ],
    ids=["two", "three", "softmax"],
)
def test_a_model_in_parts_is_the_whole_model(backend: str, size: int, choices: dict[str, Any]) -> None:
    first, *others = outputs(["-m", "tests.parts_of_a_model", backend, json.dumps(choices)], size)
    assert not any(others)
    found = json.loads(first)
    assert found["same weights"]
    assert found["same numbers after"], "a part draws other numbers than the whole model"
    assert found["same lists"]
    assert found["same ids"][0]
    if backend == "cpp":  # whose scores are the same bits in any table
        assert found["same ids"] == [True] * 3
        assert found["same list of a code"] == [True, True]
    mine, whole = found["losses"]
    assert mine == pytest.approx(whole, rel=1e-6)
    assert found["gradients"] < 1e-4, found["gradient of"]


@pytest.mark.parametrize(("n_items", "width", "size"), [(50, 3, 4), (40_000, 3, 3), (32_771, 1, 2), (16_384 * 2, 2, 5)])
def test_parts_are_drawn_as_the_whole_is(n_items: int, width: int, size: int) -> None:
    def drawn() -> tuple[torch.Tensor, ...]:
        torch.manual_seed(0)
        return item_rows.glorot(n_items, width), item_rows.normal(n_items, width, 0.1), torch.rand(2)

    whole = drawn()
    torch.manual_seed(0)
    assert torch.equal(whole[0], nn.init.xavier_uniform_(torch.empty(n_items, width)))
    assert torch.equal(whole[1], torch.randn(n_items, width) * 0.1)
    for rank in range(size):
        span = Nth(rank, size).span(n_items)
        with item_rows.kept(span):
            part = drawn()
        assert torch.equal(part[0], whole[0][slice(*span)])
        assert torch.equal(part[1], whole[1][slice(*span)])
        assert torch.equal(part[2], whole[2])


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"recommender": "warp"}, "need recommender = 'vae' or 'dae'; got 'warp'"),
        ({"feedback": "scores"}, "need feedback = 'embedding'; got 'scores'"),
        ({"backend": "reference"}, "need backend = .*; got 'reference'"),
        ({"precision": "bf16"}, "need precision = 'fp32'; got 'bf16'"),
    ],
)
def test_what_needs_every_item_in_one_place_is_refused(choices: dict[str, Any], message: str) -> None:
    run_time = {name: value for name, value in choices.items() if name in ("backend", "precision")}
    config = CFSFLConfig(**{name: value for name, value in choices.items() if name not in run_time})
    with pytest.raises(ValueError, match=message):
        CFSFL.part(30, config, Shard(ALONE, 30), **run_time)


def test_a_part_alone_answers_no_question_about_every_item(tmp_path: Path) -> None:
    part = CFSFL.part(30, CFSFLConfig(hidden_dim=8, latent_dim=4), Shard(ALONE, 30))
    x = torch.zeros(2, 30)
    for ask in (part, lambda x: part.recommend(x, candidates=[1]), lambda x: part.save_pretrained(tmp_path / "m")):
        with pytest.raises(ValueError, match="need the whole model; this is part 0"):
            ask(x)
    assert part.recommend(x, 3)[0].shape == (2, 3)
    with pytest.raises(ValueError, match="3 items cannot be shared by 4 processes"):
        CFSFL.part(3, CFSFLConfig(), Shard(Nth(0, 4), 3))
