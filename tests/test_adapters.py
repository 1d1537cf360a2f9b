"""CF-SFL inside other libraries, as their users call it. `make adapters` runs each with its library."""

from __future__ import annotations

import importlib
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cfsfl_fast import CFSFLRecommender
from tests.conftest import ROOT, clusters
from tests.test_estimator import SMALL

X = clusters()
PAIRS = np.argwhere(X.toarray() > 0)
CONFIG = {name: value for name, value in SMALL.items() if name != "random_state"}


def needs(library: str) -> Any:
    return pytest.importorskip(library, reason=f"pip install 'cfsfl-fast[{library}]' (own environment: make adapters)")


def own_cluster(user: int, items: Any) -> float:
    """Share of items of a user's own cluster."""
    return float(np.mean([int(item) % 4 == user % 4 for item in items]))


@pytest.mark.parametrize("library", ["rectools", "recbole", "lenskit"])
def test_without_its_library_an_adapter_says_what_to_install(library: str) -> None:
    if importlib.util.find_spec(library):
        pytest.skip(f"{library} is here")
    with pytest.raises(ImportError, match=rf"pip install 'cfsfl-fast\[{library}\]'"):
        importlib.import_module(f"cfsfl_fast.adapters.{library}")


@pytest.mark.parametrize("name", ["rectools", "recbole", "lenskit"])
def test_an_adapter_is_thin(name: str) -> None:
    assert len((ROOT / "cfsfl_fast" / "adapters" / f"{name}.py").read_text().splitlines()) <= 150


def test_rectools() -> None:
    needs("rectools")
    import pandas as pd
    from rectools import Columns
    from rectools.dataset import Dataset

    from cfsfl_fast.adapters.rectools import CFSFLModel

    table = pd.DataFrame(PAIRS, columns=[Columns.User, Columns.Item])
    table[Columns.User] += 1000
    table[Columns.Weight], table[Columns.Datetime] = 1.0, "2024-01-01"
    dataset = Dataset.construct(table)
    estimator = CFSFLRecommender(**SMALL)
    model = CFSFLModel(estimator).fit(dataset)
    assert not hasattr(estimator, "model_"), "the estimator handed in stays as it was"

    found = model.recommend([1003, 1008], dataset, k=3, filter_viewed=True)
    assert found[Columns.Rank].tolist() == [1, 2, 3, 1, 2, 3]
    matrix = dataset.get_user_item_matrix(include_weights=False)
    for user, rows in found.groupby(Columns.User):
        number = dataset.user_id_map.convert_to_internal([user])[0]
        ids, scores = model.model.recommend(number, matrix[number], 3)
        assert dataset.item_id_map.convert_to_external(ids).tolist() == rows[Columns.Item].tolist()
        assert scores.tolist() == rows[Columns.Score].tolist()
        assert own_cluster(user - 1000, rows[Columns.Item][:2]) == 1
        assert not set(rows[Columns.Item]) & set(table[table[Columns.User] == user][Columns.Item])
    listed = model.recommend([1003], dataset, k=3, filter_viewed=False, items_to_recommend=[5, 7, 9])
    assert set(listed[Columns.Item]) == {5, 7, 9}
    short = model.recommend([1003], dataset, k=40, filter_viewed=True)
    assert len(short) == 40 - (table[Columns.User] == 1003).sum()
    neighbours = model.recommend_to_items([7], dataset, k=3)
    assert own_cluster(3, neighbours[Columns.Item]) == 1
    assert 7 not in set(neighbours[Columns.Item])

    again = CFSFLModel.from_config(model.get_config()).fit(dataset)
    assert again.recommend([1003], dataset, 3, True).equals(model.recommend([1003], dataset, 3, True))
    loaded = CFSFLModel.loads(model.dumps())
    assert loaded.recommend([1003], dataset, 3, True).equals(model.recommend([1003], dataset, 3, True))
    before = len(model.model.history_)
    model.fit_partial(dataset, epochs=2)
    assert len(model.model.history_) == before + 2
    with pytest.raises(ValueError, match="cold"):
        model.recommend([5], dataset, k=3, filter_viewed=True)


def test_lenskit() -> None:
    needs("lenskit")
    import pandas as pd
    from lenskit import recommend, score
    from lenskit.data import ItemList, from_interactions_df
    from lenskit.pipeline import topn_pipeline
    from lenskit.training import TrainingOptions

    from cfsfl_fast.adapters.lenskit import CFSFLScorer

    dataset = from_interactions_df(pd.DataFrame(PAIRS, columns=["user_id", "item_id"]))
    scorer = CFSFLScorer(**CONFIG)
    assert scorer.dump_config()["steps"] == 2
    pipeline = topn_pipeline(scorer)
    pipeline.train(dataset)
    matrix = dataset.interactions().matrix().scipy(layout="csr")
    for user in (3, 8):
        found = recommend(pipeline, user, n=3)
        row = dataset.users.number(user)
        ids, values = scorer.model.recommend(matrix[[row]], 3)
        assert dataset.items.ids(ids[0].numpy()).tolist() == found.ids().tolist()
        assert found.scores().tolist() == pytest.approx(values[0].tolist(), rel=1e-5)
        assert own_cluster(user, found.ids()[:2]) == 1
    new = recommend(pipeline, ItemList(item_ids=[0, 4, 8]), n=3)
    assert own_cluster(0, new.ids()) == 1, "a user whom training did not know"
    scores = score(pipeline, 3, [7, 999]).scores()
    assert np.isfinite(scores[0])
    assert np.isnan(scores[1]), "an item that training did not know"
    assert np.isnan(score(pipeline, ItemList(item_ids=[999]), [7]).scores()).all()

    copy = pickle.loads(pickle.dumps(scorer))
    kept = scorer.model
    scorer.train(dataset, TrainingOptions(retrain=False))
    assert scorer.model is kept
    scorer.train(dataset, TrainingOptions(rng=7))
    assert scorer.model.config.seed != 0
    copy.train(dataset, TrainingOptions(rng=7))
    for a, b in zip(copy.model.parameters(), scorer.model.parameters(), strict=True):
        assert a.equal(b)


def test_recbole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs("recbole")
    import torch
    from recbole.config import Config
    from recbole.data import create_dataset, data_preparation
    from recbole.utils import get_trainer, init_seed

    from cfsfl_fast.adapters.recbole import CFSFLModel

    monkeypatch.chdir(tmp_path)  # RecBole writes logs where it stands
    (tmp_path / "toy").mkdir()
    rows = "\n".join(f"u{user}\ti{item}" for user, item in PAIRS)
    (tmp_path / "toy" / "toy.inter").write_text(f"user_id:token\titem_id:token\n{rows}\n")
    options = {
        "data_path": str(tmp_path), "USER_ID_FIELD": "user_id", "ITEM_ID_FIELD": "item_id", "show_progress": False,
        "load_col": {"inter": ["user_id", "item_id"]}, "topk": [5], "metrics": ["Recall", "NDCG"], "seed": 3,
        "valid_metric": "NDCG@5", "eval_args": {"split": {"RS": [0.8, 0.1, 0.1]}, "mode": "full"}, "use_gpu": False,
        "cfsfl": CONFIG,
    }  # fmt: skip
    monkeypatch.setattr("sys.argv", ["test"])  # which RecBole reads
    config = Config(model=CFSFLModel, dataset="toy", config_dict=options)
    init_seed(config["seed"], config["reproducibility"])
    train, valid, test = data_preparation(config, create_dataset(config))
    model = CFSFLModel(config, train.dataset).to(config["device"])
    assert model.network.config.seed == 3
    trainer = get_trainer(config["MODEL_TYPE"], config["model"])(config, model)
    untrained = trainer.evaluate(test, load_best_model=False)
    trainer.fit(train, valid, saved=False, verbose=False)
    found = trainer.evaluate(test, load_best_model=False)
    assert found["recall@5"] > 0.5 > untrained["recall@5"]

    users = torch.tensor([1, 5])
    scores = model.full_sort_predict({"user_id": users}).view(2, -1)
    ids, best = model.network.recommend(train.dataset.inter_matrix(form="csr")[[1, 5]], 3)
    assert torch.allclose(scores.gather(1, ids), best, atol=1e-5)
    items = torch.tensor([4, 9])
    assert model.predict({"user_id": users, "item_id": items}).equal(scores[[0, 1], items])
    other = CFSFLModel(config, train.dataset)
    other.load_state_dict(model.state_dict())
    assert other.full_sort_predict({"user_id": users}).equal(scores.flatten())
