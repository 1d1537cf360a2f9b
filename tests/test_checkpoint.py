"""A model's folder: the same answers after a save and a load; anything truncated or altered is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from cfsfl_fast import CFSFL, checkpoint
from tests.test_model import M, build, histories


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model = build()
    model.item_ids = np.array([f"item {i}" for i in range(M)])
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_the_same_answers_after_a_save_and_a_load(saved: Path) -> None:
    model, loaded = build(), CFSFL.from_pretrained(saved)
    assert loaded.config == model.config
    assert not loaded.training
    assert all(p.requires_grad for p in loaded.parameters())
    for one, other in zip(model.recommend(histories()), loaded.recommend(histories()), strict=True):
        assert torch.equal(one, other)
    assert loaded.item_ids is not None
    assert loaded.item_ids[3] == "item 3"


def test_names_are_those_of_the_format(saved: Path) -> None:
    tensors, _ = checkpoint.read_tensors(saved / checkpoint.MODEL)
    layers = [f"reward.{i}" for i in range(4)] + [f"feedback.{i}" for i in range(3)]
    layers += ["recommender.code", "recommender.hidden", "recommender.output", "recommender.input"]
    expected = {f"{layer}.{part}" for layer in layers for part in ("weight", "bias")}
    assert set(tensors) == expected | {"recommender.input.feedback", "lookup.weight"}


def test_a_folder_is_replaced_whole(saved: Path) -> None:
    (saved / "stray").write_text("from the older model")
    other = build(seed=5)
    other.save_pretrained(saved)
    loaded = CFSFL.from_pretrained(saved)
    assert torch.equal(loaded.lookup.weight, other.lookup.weight)
    assert loaded.item_ids is None
    assert sorted(p.name for p in saved.iterdir()) == [checkpoint.CONFIG, checkpoint.MODEL]
    assert [p.name for p in saved.parent.iterdir()] == [saved.name]


def test_a_failed_save_leaves_the_older_model(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full_disk)
    with pytest.raises(OSError, match="No space"):
        build(seed=5).save_pretrained(saved)
    assert torch.equal(CFSFL.from_pretrained(saved).lookup.weight, build().lookup.weight)
    assert [p.name for p in saved.parent.iterdir()] == [saved.name]


@pytest.mark.parametrize("name", [checkpoint.CONFIG, checkpoint.MODEL, checkpoint.ITEM_IDS])
def test_a_truncated_or_missing_file_is_refused(saved: Path, name: str) -> None:
    content = (saved / name).read_bytes()
    for length in (0, 1, 7, 8, 9, len(content) // 2, len(content) - 1):
        (saved / name).write_bytes(content[:length])
        with pytest.raises(ValueError, match=name.replace(".", r"\.")):
            CFSFL.from_pretrained(saved)
    (saved / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        CFSFL.from_pretrained(saved)


def test_an_altered_byte_anywhere_is_refused(saved: Path) -> None:
    random = np.random.default_rng(0)
    for name in (checkpoint.CONFIG, checkpoint.MODEL, checkpoint.ITEM_IDS):
        content = (saved / name).read_bytes()
        places = {
            *range(0, min(400, len(content)), 3),
            *random.integers(0, len(content), 60).tolist(),
            len(content) - 1,
        }
        for place in sorted(places):
            altered = bytearray(content)
            altered[place] ^= 1 << int(random.integers(8))
            (saved / name).write_bytes(altered)
            with pytest.raises(ValueError, match=r"config\.json|model\.safetensors|item_ids\.npy"):
                CFSFL.from_pretrained(saved)
        (saved / name).write_bytes(content)
    CFSFL.from_pretrained(saved)


def test_a_file_of_another_model_is_refused(saved: Path, tmp_path: Path) -> None:
    other = build(top_k=9)
    other.save_pretrained(tmp_path / "other")
    shutil.copy(tmp_path / "other" / checkpoint.CONFIG, saved)
    with pytest.raises(ValueError, match=r"config\.json does not belong to model\.safetensors"):
        CFSFL.from_pretrained(saved)


def test_a_newer_format_is_refused(saved: Path) -> None:
    config = json.loads((saved / checkpoint.CONFIG).read_text())
    config["format_version"] = 2
    (saved / checkpoint.CONFIG).write_text(json.dumps(config))
    with pytest.raises(ValueError, match="format version 2; this library reads 1 to 1"):
        CFSFL.from_pretrained(saved)


def _written_unchecked(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    digest = checkpoint._file_digest(folder / checkpoint.CONFIG)
    checkpoint.write_tensors(folder / checkpoint.MODEL, tensors, {"files": json.dumps({checkpoint.CONFIG: digest})})


def test_tensors_that_do_not_fit_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    tensors = dict(model.state_dict())
    folder = tmp_path / "model"
    cases = {
        "tensor 'lookup.weight' is missing": {k: v for k, v in tensors.items() if k != "lookup.weight"},
        "tensor 'extra' is unknown": {**tensors, "extra": torch.zeros(1)},
        r"lookup.weight has shape \(3, 8\), its config says": {**tensors, "lookup.weight": torch.zeros(3, 8)},
        "lookup.weight holds torch.int64, expected": {**tensors, "lookup.weight": torch.zeros(M, 8).long()},
        "lookup.weight holds NaN": {**tensors, "lookup.weight": torch.full((M, 8), torch.nan)},
    }
    monkeypatch.setattr(checkpoint, "write_model", _written_unchecked)
    for words, found in cases.items():
        checkpoint.save_model(folder, M, model.config, found, None)
        with pytest.raises(ValueError, match=words):
            CFSFL.from_pretrained(folder)


def test_a_model_that_is_nan_is_not_saved(saved: Path) -> None:
    model = build()
    with torch.no_grad():
        model.lookup.weight[3, 1] = torch.inf
    with pytest.raises(ValueError, match=r"lookup\.weight holds NaN or infinite values"):
        model.save_pretrained(saved)
    assert torch.equal(CFSFL.from_pretrained(saved).lookup.weight, build().lookup.weight)


def test_item_ids_must_be_one_per_item(tmp_path: Path) -> None:
    model = build()
    model.item_ids = np.arange(3)
    with pytest.raises(ValueError, match=f"one id per item, {M}; got 3"):
        model.save_pretrained(tmp_path / "model")
