"""What strangers send: bodies of requests to the server, batches to the scorer. The model's answer, or words.

make fuzz     # thousands of each, and a table of what came of them
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cfsfl_fast.scoring import Scorer
from tests.conftest import tally
from tests.test_fuzz import REFUSED, RIGHT, anything, attempt, edits, fuzzed, mutated
from tests.test_model import M, build

ids_of_items = st.one_of(
    st.integers(-2, M + 2),
    st.integers(),
    st.integers(0, M - 1).map(str),
    st.text(st.characters(), max_size=3),
    st.sampled_from(["\ud800", "\0", "1e2", " 1", "\u0661", 10**4000]),
)
histories = st.lists(st.one_of(ids_of_items, st.none(), st.floats(), st.lists(st.integers(), max_size=2)), max_size=6)
bodies = st.one_of(
    st.fixed_dictionaries({"items": st.lists(ids_of_items, max_size=8)}, optional={"n": st.integers(-1, M + 3)}),
    st.fixed_dictionaries({"items": histories}, optional={"n": st.one_of(st.floats(), st.integers(), anything)}),
    st.dictionaries(st.sampled_from(["items", "n", "k", "\ud800"]), st.one_of(histories, anything)),
    anything,
)


def as_json(body: Any) -> bytes:
    """What json can say of a body."""
    try:
        return json.dumps(body).encode()
    except (TypeError, ValueError):
        return repr(body).encode(errors="surrogatepass")


requests = st.one_of(
    bodies.map(as_json),
    st.tuples(bodies, edits).map(lambda drawn: mutated(as_json(drawn[0]), drawn[1])),
    st.binary(max_size=40),
)


@fuzzed(0.3)
@given(st.lists(requests, min_size=1, max_size=40))
def test_bodies_of_requests(contents: list[bytes]) -> None:
    """Answered as the model answers, or refused in json with a status below 500; the server answers the next one."""
    pytest.importorskip("httpx", reason="pip install httpx")
    pytest.importorskip("starlette", reason="pip install 'cfsfl-fast[serve]'")
    from cfsfl_fast.serving import Limits, Server
    from tests.test_serving import model, served

    made = model()
    n_items = made.n_items

    async def talk(client: Any) -> None:
        for content in contents:
            answer = await client.post("/recommend", content=content)
            if answer.status_code != 200:
                tally["bodies of requests", REFUSED] += 1
                assert 400 <= answer.status_code < 500, (content, answer.text)
                assert answer.json()["error"]
                continue
            tally["bodies of requests", RIGHT] += 1
            asked, found = json.loads(content), answer.json()
            known = sorted({int(i) for i in asked["items"] if str(i) in map(str, range(n_items))})
            wanted, scores = made.recommend((np.array(known, np.int64), np.array([0, len(known)])), asked.get("n", 10))
            listed = int((wanted >= 0).sum())
            assert found["items"] == wanted[0, :listed].tolist()
            assert found["scores"] == scores[0, :listed].tolist()
            assert {str(i) for i in found["unknown"]} == {str(i) for i in asked["items"]} - {str(i) for i in known}
        assert (await client.post("/recommend", json={"items": [1, 2]})).status_code == 200

    served(Server(made, Limits(n=50, items=100)), talk)


@pytest.fixture(scope="module")
def scorers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Scorer]:
    """Of models whose items have numbers, and texts."""
    folder = tmp_path_factory.mktemp("scorers")
    found = {}
    for kind, item_ids in (("numbers", np.arange(M) * 3), ("texts", np.array([f"i{i}" for i in range(M)]))):
        model = build(steps=1)
        model.item_ids = item_ids
        model.save_pretrained(folder / kind)
        found[kind] = Scorer(Path(folder / kind), 5)
    return found


own = st.one_of(st.integers(0, M - 1).map(lambda i: 3 * i), st.integers(0, M - 1).map(lambda i: f"i{i}"))
batches = st.lists(
    st.one_of(
        st.lists(own, max_size=5),
        st.lists(st.one_of(own, anything), max_size=3),
        st.lists(own, max_size=5).map(lambda ids: np.array(ids) if len({type(i) for i in ids}) == 1 else ids),
        anything,
    ),
    max_size=4,
)


@fuzzed(1)
@given(st.sampled_from(["numbers", "texts"]), batches)
def test_batches_of_the_scorer(scorers: dict[str, Scorer], kind: str, batch: list[Any]) -> None:
    scorer = scorers[kind]
    places = {str(item): place for place, item in enumerate(scorer.item_ids.tolist())}

    def check(found: dict[str, Any]) -> None:
        for history, best in zip(batch, found["items"], strict=True):
            texts = np.asarray(history).ravel().astype(np.str_).tolist()
            seen = sorted({places[text] for text in texts if text in places})
            ids, _ = scorer.model.recommend((np.array(seen, np.int64), np.array([0, len(seen)])), 5)
            assert best.tolist() == scorer.item_ids[ids[0].numpy()].tolist()

    attempt("batches of the scorer", lambda: scorer({"items": batch}), check)
