"""An exported program serves without this package and gives what the model gives."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from cfsfl_fast import CFSFL, reference
from cfsfl_fast.cli import main
from cfsfl_fast.export import Served, exported, save_exported
from tests.conftest import clusters

SIZES = {"steps": 3, "top_k": 6, "hidden_dim": 24, "latent_dim": 8, "lookup_dim": 8, "feedback_dim": 8}
X = clusters(30)
M = X.shape[1]

ELSEWHERE = """
import sys
sys.modules["cfsfl_fast"] = None  # an import of it raises
import json, torch
texts = {"cfsfl.json": ""}
program = torch.export.load(sys.argv[1], extra_files=texts).module()
ids, scores = program(torch.tensor(json.loads(sys.argv[2])))
assert not scores.requires_grad
print(json.dumps({"ids": ids.tolist(), "scores": scores.tolist(), "description": json.loads(texts["cfsfl.json"])}))
"""


def model(**changes: object) -> CFSFL:
    torch.manual_seed(0)
    made = CFSFL(M, **{**SIZES, **changes}).eval()  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return made


def lists(users: list[int], length: int) -> torch.Tensor:
    """Histories as the program takes them: shuffled, -1 behind."""
    rows = torch.full((len(users), length), -1)
    for row, user in zip(rows, users, strict=True):
        row[: X[user].nnz] = torch.from_numpy(np.random.default_rng(user).permutation(X[user].indices))
    return rows


@pytest.mark.parametrize(
    "changes",
    [{"steps": 0}, {"reading": "full"}, {"action": "topk_softmax", "top_k": M + 5}, {"action": "softmax"}],
    ids=str,
)
def test_a_program_gives_what_the_model_gives(changes: dict[str, object]) -> None:
    made = model(**changes)
    seen_out = changes != {"reading": "full"}
    program = exported(made, 7, exclude_seen=seen_out).module()
    assert all(p.requires_grad for p in made.parameters())
    for users, length in [(list(range(30)), 14), ([4], 11), ([2, 2], 12)]:
        ids, scores = program(lists(users, length))
        wanted, values = made.recommend(X[users], 7, exclude_seen=seen_out)
        assert ids.equal(wanted)
        assert torch.allclose(scores, values, atol=1e-5)


@pytest.fixture(scope="module")
def whole() -> Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """A program that ranks every item."""
    return exported(model(), M, steps=2).module()


def test_what_counts_for_nothing(whole: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]) -> None:
    wanted = [t.clone() for t in whole(lists([1, 2], 12))]
    more = torch.cat([lists([1, 2], 12), lists([1, 2], 12)[:, :3], torch.tensor([[M, -9, 2**40]] * 2)], 1)
    for found, expected in zip(whole(more), wanted, strict=True):
        assert found.equal(expected), "repeated ids, and ids of no item"


def test_odd_shapes(whole: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]) -> None:
    made = model()
    for shape in [(1, 1), (2, 1), (1, 2), (2, 2), (1, 3)]:
        ids, _ = whole(torch.full(shape, -1))
        assert ids.equal(made.recommend(np.zeros((shape[0], M)), M, steps=2)[0]), "an empty history"
    most = np.ones((1, M))
    most[0, [3, 8]] = 0
    ids, scores = whole(torch.from_numpy(most[0].nonzero()[0])[None])
    assert ids.equal(made.recommend(most, M, steps=2)[0])
    assert scores[0, 2:].isneginf().all()


def test_ties_go_to_the_smaller_id() -> None:
    made = model(steps=0)
    with torch.no_grad():
        made.recommender.output.weight.zero_()
        made.recommender.output.bias.copy_(torch.tensor([0.0, -0.0, 1.0, -1.0]).repeat(M // 4))
    ids, scores = exported(made, M, exclude_seen=False).module()(torch.tensor([[5, 6]]))
    wanted = sorted(range(M), key=lambda j: (-[0, 0, 1, -1][j % 4], j))
    assert ids[0].tolist() == wanted
    assert scores[0].tolist() == [[0, 0, 1, -1][j % 4] for j in wanted]


def test_lists_of_a_program_are_those_of_the_specification(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(-3, 4, (50, 30), generator=generator) * torch.tensor([1e-40, 0.0, -0.0, 1.0, 3e38]).repeat(6)
    scores[:, 7] = float("nan")
    scores[:30, 3:9] = float("-inf")
    scores[4, 11] = float("inf")
    wanted = reference.top(scores, 20)
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    found = reference.top(scores, 20)
    assert found[0].equal(wanted[0])
    assert found[1].equal(wanted[1])


def test_a_fresh_process_without_the_package(tmp_path: Path) -> None:
    made = model()
    made.item_ids = np.array([f"item-{j}" for j in range(M)])
    made.save_pretrained(tmp_path / "run")
    result = CliRunner().invoke(main, ["export", str(tmp_path / "run"), "--out", str(tmp_path / "m.pt2"), "-n", "500"])
    assert result.exit_code == 0, result.output
    assert "40 per user" in result.output
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["m.pt2", "run"]
    histories = lists([0, 7, 9], 13)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, str(tmp_path / "m.pt2"), json.dumps(histories.tolist())],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["ids"] == made.recommend(X[[0, 7, 9]], M)[0].tolist()
    assert found["description"]["item_ids"][3] == "item-3"
    assert (found["description"]["n_items"], found["description"]["n"]) == (M, M)
    assert found["description"]["config"]["steps"] == 3


def test_what_is_refused(tmp_path: Path) -> None:
    for n in (0, M + 1):
        with pytest.raises(ValueError, match=f"n must be 1 to {M}, the number of items; got {n}"):
            exported(model(), n)
    with pytest.raises(ValueError, match="steps must be at least 0; got -1"):
        Served(model(), 3, steps=-1)
    with pytest.raises(ValueError, match=r"a \.pt2 file; got model.onnx"):
        save_exported(model(), tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []
