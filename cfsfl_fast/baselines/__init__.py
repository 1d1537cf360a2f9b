"""What a recommender has to beat, each fitted by one call and asked by another:

    fitted = BASELINES[name](train, **choices)              train: histories [U, M], scipy sparse
    ids, scores = fitted.recommend(histories, n)            as `evaluation.evaluate` takes it

Autoencoders that are trained by gradients are no baselines here but recommenders (`--recommender NAME --steps 0`).
"""

from __future__ import annotations

from cfsfl_fast.baselines.ease import EASE, EDLAE
from cfsfl_fast.baselines.fitted import Fitted
from cfsfl_fast.baselines.popular import MostPopular
from cfsfl_fast.baselines.selection import Selection, select
from cfsfl_fast.baselines.slim import SLIM
from cfsfl_fast.baselines.wmf import WMF

__all__ = ["BASELINES", "EASE", "EDLAE", "SEEDED", "SLIM", "WMF", "Fitted", "MostPopular", "Selection", "select"]

BASELINES: dict[str, type[Fitted]] = {
    "most popular": MostPopular,
    "wmf": WMF,
    "slim": SLIM,
    "ease": EASE,
    "edlae": EDLAE,
}
"""By name; each is fitted to training histories [U, M] and then recommends."""

SEEDED = frozenset({"wmf"})
"""Those that draw random numbers: they take a `seed`."""
