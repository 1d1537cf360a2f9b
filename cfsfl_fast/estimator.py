"""CFSFLRecommender: CF-SFL behind the signatures of `implicit`, and the parameters of a scikit-learn estimator."""

from __future__ import annotations

import dataclasses
import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from cfsfl_fast import ops
from cfsfl_fast.config import CFSFLConfig
from cfsfl_fast.evaluation import evaluate
from cfsfl_fast.holdout import held_out, hide, set_aside
from cfsfl_fast.interactions import Interactions, as_interactions
from cfsfl_fast.metrics import Mean
from cfsfl_fast.model import CFSFL
from cfsfl_fast.stages import Epoch, OnEpoch, Trainer, fresh_model
from cfsfl_fast.updates import Optimisers

_RUN_TIME = {"backend": "auto", "precision": "fp32", "deterministic": False, "graphs": "auto"}
_CHOICES = {f.name: f.default for f in dataclasses.fields(CFSFLConfig) if f.name not in ("seed", "control")}
_DEFAULTS: dict[str, Any] = {**_CHOICES, "random_state": None, "device": "auto", **_RUN_TIME}


class Explanation(NamedTuple):
    """Why an item has its score."""

    total_score: float
    top_contributions: list[tuple[int, float]]  # (item of the history, what the score loses without it), best first
    user_weights: None  # `implicit` hands a factorisation back here; there is none


class Turns(NamedTuple):
    """The loop at t = 0 .. T."""

    ids: NDArray[np.int32]  # a^t, the list that the virtual user sees, -1 where it ends. [T + 1, B, N]
    rewards: NDArray[np.float32]  # R(x, a^t), the estimated chance that the list is an expert's. [T + 1, B]


class CFSFLRecommender:
    """Collaborative filtering with a synthetic feedback loop, for code that knows `implicit` or scikit-learn.

    Nothing is kept per user: a recommendation is computed from the history that is handed in, so that users who came
    after training are served like all others.

    Args:
        random_state: seed of weights, batches, dropout and noise: an int, a NumPy `RandomState` or `Generator` to draw
            it from, or None for another one at every `fit` (then `model_.config.seed` tells it).
        device: "auto", "cpu", "cuda" or "cuda:N".
        **choices: the fields of `CFSFLConfig`, as `steps`, `top_k`, `epochs`, with its defaults; and what `CFSFL` takes
            for running: backend, precision, deterministic, graphs.

    Attributes:
        model_: the trained `CFSFL`.
        history_: what every epoch of `fit` and `partial_fit` came to.

    Raises:
        ValueError: a parameter is unknown. Values are checked by `fit`.
    """

    __signature__ = inspect.Signature(
        [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=value) for name, value in _DEFAULTS.items()]
    )

    random_state: Any
    device: str
    model_: CFSFL
    history_: list[Epoch]

    def __init__(self, *, random_state: Any = None, device: str = "auto", **choices: Any) -> None:
        self.set_params(**{**_DEFAULTS, **choices, "random_state": random_state, "device": device})
        self._learning: Optimisers | None = None

    @classmethod
    def from_config(cls, config: CFSFLConfig, *, device: str = "auto", **run_time: Any) -> CFSFLRecommender:
        """An estimator with every choice of a config, as `CFSFLConfig.preset("paper")`; its seed is `random_state`.

        run_time: backend, precision, deterministic and graphs.
        """
        choices = {name: getattr(config, name) for name in _CHOICES}
        return cls(random_state=config.seed, device=device, **choices, **run_time)

    def __repr__(self) -> str:
        changed = [f"{n}={v!r}" for n, v in self.get_params().items() if v is not _DEFAULTS[n] and v != _DEFAULTS[n]]
        return f"{type(self).__name__}({', '.join(changed)})"

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """Every parameter by name; deep is scikit-learn's and changes nothing."""
        return {name: getattr(self, name) for name in _DEFAULTS}

    def set_params(self, **params: Any) -> CFSFLRecommender:
        """Changes parameters, for the next `fit`.

        Raises:
            ValueError: a name is unknown.
        """
        if unknown := sorted(set(params) - set(_DEFAULTS)):
            raise ValueError(f"no parameter {unknown[0]!r}; there are {', '.join(sorted(_DEFAULTS))}")
        for name, value in params.items():
            setattr(self, name, value)
        return self

    def __sklearn_tags__(self) -> Any:
        """What scikit-learn asks of an estimator; only it calls this."""
        from sklearn.utils import InputTags, Tags, TargetTags

        tags = Tags(estimator_type=None, target_tags=TargetTags(required=False), input_tags=InputTags(sparse=True))
        tags.non_deterministic = self.random_state is None
        return tags

    # Learning

    def fit(
        self,
        user_items: Any,
        show_progress: bool = True,
        callback: Callable[[int, float, float], Any] | None = None,
        *,
        validation: Any = None,
        on_epoch: OnEpoch | None = None,
    ) -> CFSFLRecommender:
        """Trains by Algorithm 1, from fresh weights.

        Args:
            user_items: users x items [U, M], in any form that `as_interactions` takes; an entry > 0 means that the user
                has the item. Its width is the number of items.
            show_progress: a bar per epoch, where stderr is a terminal.
            callback: `implicit`'s: called after every epoch with its number from 0 over all stages, seconds and loss.
            validation: users by whose NDCG@100 the best epoch of a stage is chosen and its end is noticed (`patience`):
                a pair (fold-in, targets) of matrices [N, M], a `HeldOut`, or how many users of user_items, as a share
                below 1 or a count, are set aside (they do not train). None: every stage runs all its epochs.
            on_epoch: called with the whole of an epoch's figures.

        Raises:
            TypeError: user_items is no matrix.
            ValueError: a parameter is out of range; user_items is empty or holds negative or NaN values; validation
                has another width (both are named).
            FloatingPointError: the loss is NaN or infinite.
        """
        if not isinstance(show_progress, (bool, int, np.bool_)):
            raise TypeError(f"show_progress must be a bool (fit takes no targets); got {type(show_progress).__name__}")
        rows = as_interactions(user_items, _width(user_items))
        seed = _seed(self.random_state)
        rows, judges = set_aside(rows, validation, seed)
        if len(rows.items) == 0:
            raise ValueError(f"user_items [{len(rows)}, {rows.n_items}] holds no interaction to learn from")
        choices = {name: getattr(self, name) for name in _CHOICES}
        config = CFSFLConfig(**choices, seed=seed, control=False).resolved(len(rows))
        run_time = {name: getattr(self, name) for name in _RUN_TIME}
        model = fresh_model(rows.n_items, config, device=_device(self.device), **run_time)
        history: list[Epoch] = []
        trainer = Trainer(
            model,
            rows.to(model.device),
            judges,
            show_progress=bool(show_progress),
            on_epoch=_told(history, callback, on_epoch),
        )
        trainer.run()
        self.model_, self.history_, self._learning = model, history, None
        return self

    def partial_fit(
        self,
        user_items: Any,
        *,
        epochs: int = 1,
        show_progress: bool = False,
        callback: Callable[[int, float, float], Any] | None = None,
        on_epoch: OnEpoch | None = None,
    ) -> CFSFLRecommender:
        """Trains the fitted model on, by the last stage at its learning rates, on old or new users of the same items.

        Args:
            user_items: users x items [U, M], every user's whole history.
            epochs: passes over them.
            show_progress, callback, on_epoch: as in `fit`.

        Raises:
            ValueError: nothing is fitted yet, or the width is not M (both are named), or the model has an item memory,
                which is of the users it was fitted on.
        """
        model = self._fitted()
        rows = as_interactions(user_items, model.n_items, model.device)
        if model.memory is not None:
            raise ValueError('partial_fit: with feedback="scores" a model is fitted as a whole; use fit')
        stage = "joint" if model.config.steps else "control"
        trainer = Trainer(
            model, rows, None, show_progress=show_progress, on_epoch=_told(self.history_, callback, on_epoch)
        )
        trainer.go_on(stage, self._learning or Optimisers(model, stage), self._passes(stage), epochs)
        self._learning = trainer.optimisers
        return self

    def _passes(self, stage: str) -> int:
        """Epochs of a stage so far: they key its random numbers."""
        return max([self.model_.config.epochs[2], *(e.epoch for e in self.history_ if e.stage == stage)])

    # Recommending

    def recommend(
        self,
        userid: Any,
        user_items: Any,
        N: int = 10,
        filter_already_liked_items: bool = True,
        filter_items: Any = None,
        recalculate_user: bool = False,
        items: Any = None,
    ) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """The N best items of users, computed from their histories.

        Args:
            userid: a number, or a vector of them: which users the rows of user_items are.
            user_items: their histories, one row for each [B, M].
            N: items per user.
            filter_already_liked_items: leave out what user_items holds.
            filter_items: ids to leave out for everyone.
            recalculate_user: `implicit`'s; users are always computed from user_items.
            items: ids that may be recommended; not together with filter_items.

        Returns:
            ids int32 and scores float32, best first, ties to the smaller id: [N] for one number, [B, N] for a vector; N
            is at most len(items). Where a user has fewer items left, -1 and -inf.

        Raises:
            ValueError: nothing is fitted; user_items has another width or number of rows (both are named); an id is out
                of range.
        """
        history, scalar = self._histories(userid, user_items)
        model = self._fitted()
        listed, left_out = _choice(items, filter_items, model.n_items)
        if listed is not None:
            N = min(N, len(listed))
        ids, scores = model.recommend(
            history, N, exclude_seen=filter_already_liked_items, exclude=left_out, candidates=listed
        )
        return _answer(ids, scores, scalar)

    def similar_items(
        self,
        itemid: Any,
        N: int = 10,
        recalculate_item: bool = False,
        item_users: Any = None,
        filter_items: Any = None,
        items: Any = None,
    ) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """The N items whose rows of the output layer have the greatest cosine with an item's; itself comes first.

        Args:
            itemid: a number, or a vector of them.
            N: how many.
            recalculate_item, item_users: `implicit`'s; not supported, as in its models without item factors to solve.
            filter_items: ids to leave out.
            items: ids to choose from; not together with filter_items.

        Returns:
            ids int32 and cosines float32: [N], or [B, N] for a vector.

        Raises:
            NotImplementedError: recalculate_item is set.
            ValueError: nothing is fitted, or an id is out of range.
        """
        if recalculate_item:
            raise NotImplementedError("recalculate_item: this model has no closed form for an item")
        if N < 0:
            raise ValueError(f"N must be at least 0; got {N}")
        model = self._fitted()
        asked = _checked(np.atleast_1d(_vector(itemid)), model.n_items, "itemid")
        listed, row = _choice(items, filter_items, model.n_items)
        if listed is not None:
            listed = listed.to(model.device)
            N = min(N, len(listed))
        left_out = None
        if row is not None:
            lists = row.repeat(len(asked)), torch.arange(len(asked) + 1) * len(row)
            left_out = lists[0].to(model.device), lists[1].to(model.device)
        with torch.no_grad(), model.running():
            rows = F.normalize(model.recommender.output.weight.float(), dim=1)
            table = rows if listed is None else rows[listed]
            output = ops.Table(table, table.new_zeros(len(table)))
            ids, scores = ops.linear_topk(rows[asked.to(model.device)], output, min(N, len(table)), left_out)
        if listed is not None and len(listed):
            ids = listed[ids]
        more = (0, N - ids.shape[1])
        return _answer(F.pad(ids, more, value=-1), F.pad(scores, more, value=-np.inf), np.ndim(itemid) == 0)

    def explain(self, userid: int, user_items: Any, itemid: int, N: int = 10) -> Explanation:
        """What an item's score owes to each item of a user's history: the score with all of it, minus that without one.

        One call of the model with a row for every item left out. The changes need not add up to the score.

        Args:
            userid: which row of user_items it is, where that has more than one.
            user_items: the user's history [1, M], or those of all users.
            itemid: the item to explain.
            N: how many of the history's items to give.

        Raises:
            ValueError: as in `recommend`.
        """
        model = self._fitted()
        rows = as_interactions(_as_row(user_items), model.n_items, "cpu")
        if len(rows) != 1:
            rows = rows.take(_checked(np.array([userid]), len(rows), "userid"))
        (item,) = _checked(np.array([itemid]), model.n_items, "itemid").tolist()
        own = rows.items
        kept = torch.ones(len(own) + 1, len(own), dtype=torch.bool)
        kept[1:].fill_diagonal_(False)
        without = Interactions(own.repeat(len(own) + 1), torch.arange(len(own) + 2) * len(own), model.n_items)
        _, scores = model.recommend(without.where(kept.flatten()), 1, exclude_seen=False, candidates=[item])
        total, *others = scores[:, 0].tolist()
        changes = [(j, total - score) for j, score in zip(own.tolist(), others, strict=True)]
        return Explanation(total, sorted(changes, key=lambda c: (-c[1], c[0]))[:N], None)

    def trace(self, user_items: Any, N: int = 10) -> Turns:
        """The loop made visible: at every t = 0 .. T the list that the virtual user sees, and how it rewards it.

        Args:
            user_items: histories [B, M].
            N: how much of each list; it has `top_k` items.

        Raises:
            ValueError: nothing is fitted, or the width is not M.
        """
        if N < 0:
            raise ValueError(f"N must be at least 0; got {N}")
        model = self._fitted()
        with torch.no_grad():
            turns = model.unroll(_as_row(user_items), steps=model.config.steps + 1)
        return Turns(turns.ids[:, :, :N].cpu().numpy().astype(np.int32), turns.rewards.float().cpu().numpy())

    # Judging

    def evaluate(
        self, fold_in: Any, targets: Any, *, steps: int | None = None, batch_size: int = 512
    ) -> dict[str, Mean]:
        """Recall@20, Recall@50 and NDCG@100 on users: mean and standard error by name.

        Args:
            fold_in, targets: what the model sees of N users, and what it should find [N, M].
            steps: T; the model's own by default.
            batch_size: users at once; it changes no figure.

        Raises:
            ValueError: shapes differ (both are named), or nothing is fitted.
        """
        model = self._fitted()
        judged = held_out(fold_in, targets, model.n_items)
        return evaluate(
            lambda x, n: model.recommend(x, n, steps=steps),
            judged.fold_in,
            judged.targets,
            device=model.device,
            batch_size=batch_size,
        ).summary()

    def score(self, user_items: Any, targets: Any = None) -> float:
        """NDCG@100 on users, as scikit-learn's searches want it.

        Args:
            user_items: histories [N, M].
            targets: what to find for them; where None, a fifth of every history of at least 5 items is hidden from the
                model and becomes the target, the same at every call.

        Raises:
            ValueError: nobody has a target, shapes differ, or nothing is fitted.
        """
        if targets is None:
            hidden = hide(as_interactions(user_items, self._fitted().n_items), seed=0)
            user_items, targets = hidden.fold_in, hidden.targets
        found = self.evaluate(user_items, targets)["NDCG@100"].value
        if np.isnan(found):
            raise ValueError(f"no user of {targets.shape[0]} has a target: nobody can be judged")
        return found

    # Keeping

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes the model to a folder, whole or not at all: config.json and model.safetensors, no pickle."""
        self._fitted().save_pretrained(os.fspath(folder))

    @classmethod
    def load(cls, folder: str | os.PathLike[str], *, device: str = "auto", **run_time: Any) -> CFSFLRecommender:
        """The estimator of a folder that `save`, `CFSFL.save_pretrained` or `cfsfl train` wrote.

        Its parameters are those that the model was trained with, every "auto" replaced by what it came to; run_time
        (backend, precision, deterministic, graphs) a folder does not hold.

        Raises:
            FileNotFoundError: the folder or one of its files is missing.
            ValueError: a file is truncated, altered or of a newer format; the message names it.
        """
        model = CFSFL.from_pretrained(Path(folder), _device(device), **run_time)
        estimator = cls.from_config(model.config, device=device, **run_time)
        estimator.model_, estimator.history_ = model, []
        return estimator

    def _fitted(self) -> CFSFL:
        if not hasattr(self, "model_"):
            raise ValueError(f"this {type(self).__name__} is not fitted yet: call fit or load first")
        return self.model_

    def _histories(self, userid: Any, user_items: Any) -> tuple[Interactions, bool]:
        """The rows of the users asked for, and whether that is one number."""
        model = self._fitted()
        users = np.asarray(userid)
        if users.ndim > 1 or (users.size and users.dtype.kind not in "iu"):
            raise ValueError(
                f"userid must be a whole number or a vector of them; got {users.dtype} of shape {users.shape}"
            )
        if user_items is None:
            raise ValueError("user_items must hold the histories of the users of userid: nothing is kept per user")
        rows = as_interactions(_as_row(user_items) if users.ndim == 0 else user_items, model.n_items, model.device)
        if len(rows) != users.size:
            raise ValueError(
                f"user_items must have one row for every user of userid, [{users.size}, {model.n_items}]; got "
                f"[{len(rows)}, {model.n_items}]: hand in user_items[userid]"
            )
        return rows, users.ndim == 0


def _told(
    history: list[Epoch], callback: Callable[[int, float, float], Any] | None, on_epoch: OnEpoch | None
) -> OnEpoch:
    """Notes epochs and tells both kinds of callback."""
    number = 0

    def tell(record: Epoch) -> None:
        nonlocal number
        history.append(record)
        if on_epoch is not None:
            on_epoch(record)
        if callback is not None and record.epoch:
            loss = record.figures.get("loss", record.figures.get("reward_loss", np.nan))
            callback(number, record.figures["seconds"], loss)
            number += 1

    return tell


def _width(user_items: Any) -> int:
    """M of the matrix that `fit` was given."""
    if isinstance(user_items, Interactions):
        return user_items.n_items
    shape = getattr(user_items, "shape", None)
    if shape is None:
        raise TypeError(f"user_items must be a matrix users x items; got {type(user_items).__name__}")
    if len(shape) != 2 or 0 in shape:
        raise ValueError(f"user_items must be users x items, at least [1, 1]; got shape {tuple(shape)}")
    return int(shape[1])


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.device(name)
    except RuntimeError:
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N; got {name!r}") from None


def _seed(random_state: Any) -> int:
    """The seed that scikit-learn's forms of it name."""
    if random_state is None:
        return int(np.random.default_rng().integers(2**31))
    if isinstance(random_state, np.random.RandomState):
        return int(random_state.randint(2**31 - 1))
    if isinstance(random_state, np.random.Generator):
        return int(random_state.integers(2**31))
    if isinstance(random_state, (int, np.integer)):
        return int(random_state)
    raise ValueError(f"random_state must be an int, a RandomState, a Generator or None; got {random_state!r}")


def _as_row(user_items: Any) -> Any:
    """A matrix; one history [M] becomes [1, M]."""
    is_row = getattr(user_items, "ndim", 2) == 1 and hasattr(user_items, "reshape")
    return user_items.reshape((1, -1)) if is_row else user_items


def _choice(items: Any, filter_items: Any, n_items: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The ids to choose from, and the ids to leave out, ascending; at most one of them is given."""
    listed = None if items is None else _checked(np.unique(_vector(items)), n_items, "items")
    left_out = None if filter_items is None else _checked(np.unique(_vector(filter_items)), n_items, "filter_items")
    if listed is not None and left_out is not None and len(left_out):
        raise ValueError("items and filter_items cannot both be set")
    return listed, left_out


def _vector(ids: Any) -> NDArray[Any]:
    return np.asarray(sorted(ids) if isinstance(ids, (set, frozenset)) else ids)


def _checked(ids: NDArray[Any], n: int, name: str) -> torch.Tensor:
    """Ids 0 to n - 1 as int64. [.]"""
    if ids.size == 0:
        return torch.empty(0, dtype=torch.int64)
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise ValueError(f"{name} must be a whole number or a vector of them; got {ids.dtype} of shape {ids.shape}")
    if ids.min() < 0 or ids.max() >= n:
        worst = ids.min() if ids.min() < 0 else ids.max()
        raise ValueError(f"{name} must be 0 to {n - 1}; got {worst}")
    return torch.from_numpy(ids.astype(np.int64))


def _answer(ids: torch.Tensor, scores: torch.Tensor, scalar: bool) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """As `implicit` gives them: arrays, one row less for one user."""
    found = ids.cpu().numpy().astype(np.int32), scores.cpu().numpy().astype(np.float32, copy=False)
    return (found[0][0], found[1][0]) if scalar else found
