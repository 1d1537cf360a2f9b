"""CF-SFL as a scorer of LensKit, to stand in a pipeline.

from cfsfl_fast.adapters.lenskit import CFSFLScorer
from lenskit.pipeline import topn_pipeline

pipeline = topn_pipeline(CFSFLScorer(steps=4))
pipeline.train(dataset)
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from cfsfl_fast.config import CFSFLConfig
from cfsfl_fast.interactions import Interactions, as_interactions
from cfsfl_fast.model import CFSFL
from cfsfl_fast.stages import Trainer, fresh_model

try:
    from lenskit.data import Dataset, ItemList, RecQuery, Vocabulary
    from lenskit.pipeline import Component
    from lenskit.training import Trainable, TrainingOptions
except ImportError as error:
    raise ImportError(f"LensKit is missing ({error}): pip install 'cfsfl-fast[lenskit]'") from error


class CFSFLScorer(Component[ItemList], Trainable):
    """Scores items for the history of a query; users need not have been trained on.

    Its configuration is `CFSFLConfig`: `CFSFLScorer(steps=4, epochs=(50, 5, 20))`. The seed is the config's unless the
    training options bring random numbers of their own.
    """

    config: CFSFLConfig
    items: Vocabulary
    model: CFSFL

    def train(self, data: Dataset, options: TrainingOptions | None = None) -> None:
        """Trains by Algorithm 1 on every interaction of a data set."""
        options = options or TrainingOptions()
        if hasattr(self, "model") and not options.retrain:
            return
        rows = as_interactions(data.interactions().matrix().scipy(layout="csr"), data.item_count)
        config = dataclasses.replace(self.config, control=False).resolved(len(rows))
        if options.rng is not None:
            config = dataclasses.replace(config, seed=int(options.random_generator().integers(2**31)))
        model = fresh_model(data.item_count, config, device=options.configured_device(gpu_default=True), backend="auto")
        Trainer(model, rows.to(model.device), None, show_progress=False).run()
        self.items, self.model = data.items, model

    def __call__(self, query: RecQuery, items: ItemList) -> ItemList:
        """The items with a score each; NaN for items that training did not know, and where the query has no history."""
        if query.query_items is None:
            return ItemList(items, scores=np.nan)
        known = query.query_items.numbers(vocabulary=self.items, missing="negative")
        history = torch.from_numpy(np.unique(known[known >= 0]).astype(np.int64))
        if len(history) == 0:
            return ItemList(items, scores=np.nan)
        row = Interactions(history, torch.tensor([0, len(history)]), len(self.items))
        with torch.no_grad():
            scored = self.model(row)[0].float().cpu().numpy()
        asked = items.numbers(vocabulary=self.items, missing="negative")
        return ItemList(items, scores=np.where(asked >= 0, scored[asked.clip(0)], np.nan))
