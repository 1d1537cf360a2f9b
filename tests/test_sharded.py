"""Item tables in parts: the same weights, lists, losses and gradients as in one process."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import nn

from cfsfl_fast import CFSFL, CFSFLConfig, backends, checkpoint, item_rows
from cfsfl_fast.cli import main
from cfsfl_fast.distributed import ALONE, processes
from cfsfl_fast.sharded import Shard
from tests.processes import PATIENCE, outputs, started
from tests.test_distributed import Nth, assert_alike, shared_answer, wait_for_lines, whole
from tests.test_training import command

assert whole is not None  # a fixture: one run of one process

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


@pytest.mark.parametrize(("size", "parts"), [(2, 2), (4, 2)], ids=["parts", "parts and users"])
def test_a_run_in_parts_is_that_of_one_process(
    size: int, parts: int, toy_folder: Path, whole: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    printed = outputs([*command(toy_folder, run)[1:], f"--item-shards={parts}"], size)
    assert "CF-SFL minus" in printed[0]
    assert not any(printed[1:]), "another than the first process talks"
    assert_alike(run, whole, 1e-4)
    # The files are ordinary: one process reads them, and any number of parts.
    found, expected = (checkpoint.load_model(folder).tensors for folder in (run, whole))
    assert {name: t.shape for name, t in found.items()} == {name: t.shape for name, t in expected.items()}
    asked = ["evaluate", str(run), str(toy_folder), "--json"]
    alone = json.loads(CliRunner().invoke(main, asked).stdout)
    in_parts = json.loads(shared_answer([*asked, "--item-shards=2"]))
    assert in_parts == {name: pytest.approx(value, abs=2e-2) for name, value in alone.items()}
    assert not list(run.rglob(".*")), "a staged file was left behind"


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (2, 4)])
def test_any_number_of_parts_resumes_a_run(
    before: int, after: int, toy_folder: Path, whole: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    asked = command(toy_folder, run)[1:]
    with started([*asked, f"--item-shards={before}"], before) as running:
        wait_for_lines(run / "metrics.jsonl", 6, running[0])
        for process in running:
            process.send_signal(signal.SIGKILL)
    outputs([*asked, "--resume", f"--item-shards={after}"], after)
    assert_alike(run, whole, 1e-4)


def test_parts_of_an_altered_file_are_refused(toy_folder: Path, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    for path in whole.iterdir():
        if path.is_file():
            (run / path.name).write_bytes(path.read_bytes())
    content = bytearray((run / checkpoint.MODEL).read_bytes())
    content[-5] ^= 1
    (run / checkpoint.MODEL).write_bytes(content)
    asked = ["-m", "cfsfl_fast", "evaluate", str(run), str(toy_folder), "--item-shards=2"]
    with started(asked, 2) as running:
        errors = [process.communicate(timeout=PATIENCE)[1] for process in running]
        assert [process.returncode for process in running] == [2, 2]
    assert "model.safetensors is altered" in errors[0]
    assert "process 0 stopped:" in errors[1]
    assert "model.safetensors is altered" in errors[1]


def test_parts_must_divide_the_processes() -> None:
    with (
        pytest.raises(ValueError, match="item_shards must divide the number of processes, 1; got 2"),
        processes(torch.device("cpu"), 2),
    ):
        pass
