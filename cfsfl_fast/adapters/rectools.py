"""CF-SFL as a model of RecTools: `fit(dataset)`, `recommend(users, dataset, k, filter_viewed)`, `recommend_to_items`.

from cfsfl_fast import CFSFLRecommender
from cfsfl_fast.adapters.rectools import CFSFLModel

model = CFSFLModel(CFSFLRecommender(steps=4, random_state=0)).fit(dataset)
table = model.recommend(users, dataset, k=10, filter_viewed=True)
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cfsfl_fast.estimator import CFSFLRecommender

try:
    from rectools.dataset import Dataset
    from rectools.models.base import ModelBase, ModelConfig
except ImportError as error:
    raise ImportError(f"RecTools is missing ({error}): pip install 'cfsfl-fast[rectools]'") from error

Triplet = tuple[NDArray[Any], NDArray[Any], NDArray[Any]]
"""Users or items asked for, items recommended, scores: one entry for each recommendation."""


class CFSFLModelConfig(ModelConfig):
    """RecTools' description of the model: `params` of the estimator."""

    params: dict[str, Any]


class CFSFLModel(ModelBase[CFSFLModelConfig]):
    """CF-SFL for RecTools. Users need interactions in the dataset that is handed in, not in the one it was fitted to.

    Args:
        model: the estimator; a copy of it is fitted. None takes its defaults.
        verbose: 0 shows no progress.
    """

    recommends_for_warm = False
    recommends_for_cold = False
    config_class = CFSFLModelConfig

    def __init__(self, model: CFSFLRecommender | None = None, verbose: int = 0) -> None:
        super().__init__(verbose=verbose)
        self._unfitted = model or CFSFLRecommender()
        self.model = self._unfitted

    def _get_config(self) -> CFSFLModelConfig:
        return CFSFLModelConfig(cls=type(self), params=self._unfitted.get_params(), verbose=self.verbose)

    @classmethod
    def _from_config(cls, config: CFSFLModelConfig) -> CFSFLModel:
        return cls(CFSFLRecommender(**config.params), config.verbose)

    def _fit(self, dataset: Dataset) -> None:
        self.model = copy.deepcopy(self._unfitted)
        self.model.fit(dataset.get_user_item_matrix(include_weights=False), show_progress=self.verbose > 0)

    def _fit_partial(self, dataset: Dataset, *, epochs: int = 1) -> None:
        if not self.is_fitted:
            self._fit(dataset)
        else:
            rows = dataset.get_user_item_matrix(include_weights=False)
            self.model.partial_fit(rows, epochs=epochs, show_progress=self.verbose > 0)

    def _recommend_u2i(
        self,
        user_ids: NDArray[Any],
        dataset: Dataset,
        k: int,
        filter_viewed: bool,
        sorted_item_ids_to_recommend: NDArray[Any] | None,
    ) -> Triplet:
        rows = dataset.get_user_item_matrix(include_weights=False)[user_ids]
        found = self.model.recommend(user_ids, rows, k, filter_viewed, items=sorted_item_ids_to_recommend)
        return _flat(user_ids, *found)

    def _recommend_i2i(
        self,
        target_ids: NDArray[Any],
        dataset: Dataset,
        k: int,
        sorted_item_ids_to_recommend: NDArray[Any] | None,
    ) -> Triplet:
        return _flat(target_ids, *self.model.similar_items(target_ids, k, items=sorted_item_ids_to_recommend))


def _flat(asked: NDArray[Any], ids: NDArray[Any], scores: NDArray[Any]) -> Triplet:
    """Lists [B, k] as RecTools' columns, without the padding of short ones."""
    listed = ids >= 0
    return np.repeat(asked, listed.sum(1)), ids[listed], scores[listed]
