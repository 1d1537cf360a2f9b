"""Offline scoring: in parts, in batches, and by engines where they are installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from cfsfl_fast import CFSFL, CFSFLConfig
from cfsfl_fast.cli import main
from cfsfl_fast.scoring import Scorer, score_in_arrow

N_ITEMS = 30


@pytest.fixture(scope="module", params=["numbers", "texts"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 30 items with ids 100, 101 ... in an order of their own."""
    torch.manual_seed(0)
    model = CFSFL.from_config(N_ITEMS, CFSFLConfig(steps=2, top_k=5, hidden_dim=16, latent_dim=8, lookup_dim=8))
    ids = np.random.default_rng(0).permutation(N_ITEMS) + 100
    model.item_ids = ids if request.param == "numbers" else np.array([f"item {i}" for i in ids])
    place = tmp_path_factory.mktemp("scoring") / "model"
    model.save_pretrained(place)
    return place


def users(model: CFSFL, n: int = 25) -> list[list[Any]]:
    """Histories by the items' own ids; the third is empty."""
    random = np.random.default_rng(1)
    assert model.item_ids is not None
    return [[] if i == 2 else random.choice(model.item_ids, 4 + i % 3, replace=False).tolist() for i in range(n)]


def expected(model: CFSFL, histories: list[list[Any]], n: int) -> list[list[Any]]:
    assert model.item_ids is not None
    place = {item: j for j, item in enumerate(model.item_ids.tolist())}
    dense = torch.zeros(len(histories), N_ITEMS)
    for row, history in zip(dense, histories, strict=True):
        row[[place[item] for item in history]] = 1
    ids, _ = model.recommend(dense, n)
    return [model.item_ids[row[row >= 0]].tolist() for row in ids.numpy()]


def test_answers_do_not_depend_on_the_batch(folder: Path) -> None:
    scorer = Scorer(folder, 6)
    histories = users(scorer.model)
    whole = scorer({"items": histories, "user": np.arange(len(histories))})
    assert whole["user"].tolist() == list(range(len(histories)))
    assert [row.tolist() for row in whole["items"]] == expected(scorer.model, histories, 6)
    assert all((np.diff(row) <= 0).all() and row.dtype == np.float32 for row in whole["scores"])
    alone = [scorer({"items": [history]}) for history in histories]
    assert all(np.array_equal(a["items"][0], b) for a, b in zip(alone, whole["items"], strict=True))
    assert all(np.array_equal(a["scores"][0], b) for a, b in zip(alone, whole["scores"], strict=True))


def test_odd_batches(folder: Path) -> None:
    scorer = Scorer(folder, 40)
    known = scorer.item_ids[:3].tolist()
    asked = [known, [*known, known[0]], [*known, "never heard of" if isinstance(known[0], str) else 7], []]
    first, twice, unknown, none = scorer({"items": asked})["items"]
    assert len(first) == N_ITEMS - 3, "as many as there are"
    assert np.array_equal(first, twice)
    assert np.array_equal(first, unknown)
    assert len(none) == N_ITEMS
    assert set(known) <= set(Scorer(folder, 40, exclude_seen=False)({"items": [known]})["items"][0].tolist())
    assert len(scorer({"items": []})["items"]) == 0
    with pytest.raises(ValueError, match="needs a column 'items'; got 'user'"):
        scorer({"user": [1]})
    with pytest.raises(ValueError, match=r"whole numbers or texts; got float64 \(is a value missing\?\)"):
        scorer({"items": [np.array([3.0, np.nan])]})  # as pandas makes of whole numbers; none would be known


def test_ids_of_any_width(folder: Path) -> None:
    scorer = Scorer(folder, 5)
    asked = [scorer.item_ids[:4], scorer.item_ids[4:6]]
    wanted = scorer({"items": asked})["items"]
    widths: dict[str, list[Any]] = {"i": [np.uint64, np.int32, object, str], "U": [object, "U40"]}
    for dtype in widths[scorer.item_ids.dtype.kind]:
        found = scorer({"items": [ids.astype(dtype) for ids in asked]})["items"]
        assert all(np.array_equal(a, b) for a, b in zip(found, wanted, strict=True)), dtype


def test_shards_of_the_command_are_the_whole(folder: Path, tmp_path: Path) -> None:
    model = CFSFL.from_pretrained(folder)
    history = tmp_path / "history.csv"
    lines = [f"u{i},{item}" for i, items in enumerate(users(model)) for item in items]
    history.write_text("\n".join(["user,item", *lines, ""]))
    asked = ["recommend", str(folder), f"--history={history}", "-n", "4"]
    whole = CliRunner().invoke(main, asked).stdout.splitlines()
    assert len(whole) == 1 + 24 * 4
    parts = [CliRunner().invoke(main, [*asked, f"--shard={i}/3"]).stdout.splitlines() for i in (1, 2, 3)]
    assert all(part[0] == whole[0] for part in parts)
    assert [line for part in parts for line in part[1:]] == whole[1:]
    for wrong in ("0/3", "4/3", "1", "a/b", "1/0"):
        refused = CliRunner().invoke(main, [*asked, f"--shard={wrong}"])
        assert refused.exit_code == 2
        assert f"--shard takes I/N with 1 <= I <= N, as 1/4; got '{wrong}'" in refused.output


def test_arrow_batches_as_spark_hands_them_on(folder: Path) -> None:
    pa = pytest.importorskip("pyarrow", reason="pip install pyarrow")
    scorer = Scorer(folder, 5)
    histories = users(scorer.model)
    table = pa.table({"user": list(range(len(histories))), "items": histories})
    found = list(score_in_arrow(iter(table.to_batches(max_chunksize=7)), folder, 5))
    assert len(found) == 4
    answers = pa.Table.from_batches(found).to_pydict()
    assert answers["user"] == list(range(len(histories)))
    assert answers["items"] == expected(scorer.model, histories, 5)


def test_ray_data_scores_on_its_workers(folder: Path, tmp_path: Path) -> None:
    ray = pytest.importorskip("ray", reason="pip install 'ray[data]'")
    pytest.importorskip("ray.data", reason="pip install 'ray[data]'")
    model = CFSFL.from_pretrained(folder)
    histories = users(model)
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
    try:
        given = ray.data.from_items([{"user": i, "items": history} for i, history in enumerate(histories)])
        best = given.map_batches(
            Scorer, fn_constructor_args=[str(folder)], fn_constructor_kwargs={"n": 5}, batch_size=8, concurrency=2
        )
        found = {row["user"]: list(row["items"]) for row in best.take_all()}
    finally:
        ray.shutdown()
    assert [found[i] for i in range(len(histories))] == expected(model, histories, 5)
