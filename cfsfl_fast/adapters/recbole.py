"""CF-SFL as a model of RecBole, to be handed to its `Config` as a class.

from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.utils import get_trainer
from cfsfl_fast.adapters.recbole import CFSFLModel

config = Config(model=CFSFLModel, dataset="ml-100k", config_dict={"cfsfl": {"steps": 4}, ...})
train, valid, test = data_preparation(config, create_dataset(config))
model = CFSFLModel(config, train.dataset).to(config["device"])
trainer = get_trainer(config["MODEL_TYPE"], config["model"])(config, model)
trainer.fit(train, valid)
trainer.evaluate(test)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cfsfl_fast.config import CFSFLConfig
from cfsfl_fast.interactions import as_interactions
from cfsfl_fast.stages import Epoch, Trainer, fresh_model

try:
    from recbole.model.abstract_recommender import GeneralRecommender
    from recbole.utils import InputType, ModelType
except ImportError as error:
    raise ImportError(f"RecBole is missing ({error}): pip install 'cfsfl-fast[recbole]'") from error


class CFSFLModel(GeneralRecommender):
    """CF-SFL for RecBole: a "traditional" model, that trains itself, by Algorithm 1, when the trainer asks for a loss.

    RecBole's options cfsfl (a dict of the fields of `CFSFLConfig`), seed, device and show_progress count; its epochs,
    batch size and learning rate do not.

    Args:
        config: RecBole's.
        dataset: of the training interactions.
    """

    type = ModelType.TRADITIONAL
    input_type = InputType.POINTWISE

    def __init__(self, config: Any, dataset: Any) -> None:
        super().__init__(config, dataset)
        choices = {"seed": config["seed"], **(config["cfsfl"] or {}), "control": False}
        self.histories = as_interactions(dataset.inter_matrix(form="csr"), self.n_items, self.device)
        chosen = CFSFLConfig.from_dict(choices).resolved(self.n_users)
        self.network = fresh_model(self.n_items, chosen, device=self.device, backend="auto")
        self.learned = torch.nn.Parameter(torch.zeros(()))  # RecBole's optimiser wants a gradient of something
        self.show_progress = bool(config["show_progress"])
        self.trained = False

    def calculate_loss(self, interaction: Any) -> Tensor:
        """The loss of the last epoch the first time, when it trains; then 0."""
        if self.trained:
            return 0 * self.learned
        losses: list[Epoch] = []
        histories = self.histories.to(self.device)
        Trainer(self.network, histories, None, show_progress=self.show_progress, on_epoch=losses.append).run()
        self.trained = True
        return 0 * self.learned + losses[-1].figures["loss"]

    def predict(self, interaction: Any) -> Tensor:
        """Scores of (user, item) pairs. [B]"""
        items = interaction[self.ITEM_ID]
        return self._scores(interaction).gather(1, items[:, None]).squeeze(1)

    def full_sort_predict(self, interaction: Any) -> Tensor:
        """Scores of every item for every user, one user after the other. [B M]"""
        return self._scores(interaction).flatten()

    @torch.no_grad()
    def _scores(self, interaction: Any) -> Tensor:
        scores: Tensor = self.network.eval()(self.histories.take(interaction[self.USER_ID]))
        return scores
