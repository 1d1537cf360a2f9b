"""Every choice of the model and its training, in one frozen dataclass."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from dataclasses import dataclass
from typing import Any

import numpy as np

FORMAT_VERSION = 1
"""Of config.json and model.safetensors; a newer format is refused."""


@dataclass(frozen=True)
class CFSFLConfig:
    """What CF-SFL computes and how it is trained; the defaults are the best that was measured.

    Model
        recommender: "vae" (Mult-VAE), "dae", "vae-gaussian", "vae-linear", "mf", "warp", "recvae",
            "cdae" or "awae".
        steps: T, feedback steps; T = 0 is the plain recommender.
        top_k: K, items of the list that the virtual user sees.
        action: how the list enters h(x, a), forward and backward.
        hidden_dim, latent_dim, lookup_dim, feedback_dim: H, Z, D, V.
        dropout: share of the history that training hides from the encoder.
        reading: "heldout": training targets and expert list are the hidden items, h and the encoder see the others, and
            lists leave out what was seen. "full": the paper's autoencoder, everything sees all of x.
        feedback: the virtual user's answer. "embedding": v, which the recommender takes in (the paper). "scores": the
            T K best items of recommender and item memory, K at a step, are judged one by one (`judging`); then
            epochs[1] are the passes in which the item reward learns, there is no stage 3, and T = 0 is recommender and
            memory.
        memory_ridge: c of the item memory's ridge (`memory`), for feedback="scores".
        folds: parts of the training users, for feedback="scores": the item reward learns from scores of recommenders
            that have not seen a user's part (`folds`), which takes folds - 1 more times stage 1.
        feedback_inputs: what the feedback generator sees, of "history" (the mean row of x), "list" (the rows of a) and
            "reward" (R); what is left out is 0. R itself always sees history and list.

    Losses
        mask_kept: in the "heldout" reading, what was seen leaves the softmax.
        kl: "annealed" weighs the KL term by beta = min(kl_cap, step / anneal_steps); "per_user" weighs user u's by
            kl_gamma |x_u| beta / kl_cap, the same ramp. "none" leaves it out (the paper's VAE-(beta = 0)).
        kl_gamma: "auto" is 0.005 for "recvae", else 0.0025.
        kl_cap: greatest beta; "auto" is 0.05 for "vae-gaussian" and "vae-linear", else 0.2.
        anneal_steps: steps in which beta would reach 1; "auto" reaches the cap after 85 % of all updates.
        mmd_weight: of the divergence of "awae", between the codes of a batch and the prior, in place of a KL term's.
        code_l1: of the l1 norm of the latent mean; "auto" is 0.1 for "awae", else 0.
        reward_weight: lambda_adv of the adversarial term in (7): 1 as printed, which harms validation.
        reward_loss: "imitation" (the bounded form), or "literal", (8) as printed.
        l2: penalty l2 / batch_size ||W||^2 on the recommender's weights; "auto" is 0.05 for "mf" and "warp", 0 for
            "recvae", else 0.01.
        noise: one draw of the latent noise for all steps of an update ("shared") or one per step ("fresh").
        loss_steps: stage 3's supervised loss is that of s^T ("last"), or the mean over s^0 to s^T ("all").
        gradient_through_time: gradients run through the whole loop; if not, no pass of the recommender but the last has
            one, and the feedback generator learns from the last feedback alone.

    Training
        epochs: of the three stages of Algorithm 1.
        joint: stage 3 runs where there is a loop ("auto"), or with T = 0 too ("always"): the recommender trained on
            with the adversarial term (the paper's VAE+R), or where reward_weight = 0 without it.
        batch_size: users of an update; "auto" by the number of training users.
        learning_rate: stage 1; "auto" is 1e-2 for "cdae", else 1e-3. joint_learning_rate: the recommender in stage 3.
            feedback_learning_rate: feedback generator and lookup table. reward_learning_rate: reward estimator.
        reward_batch: the reward estimator of stage 3 learns from the lists of the update before it ("shared"), or from
            a batch of its own ("fresh").
        softmax: "full", or "sampled": the multinomial loss is estimated from the user's targets and `negatives` items,
            drawn anew for every update (`ops.sampled_nll` states the bias). For catalogues of millions.
        table_updates: "dense", or "rows": item tables move only in the rows that an update looked up (`row_adam`). With
            the full softmax every row of the output layer is looked up.
        table_dtype: of the rows of input and output tables, "fp32", or "bf16": half the memory. What is looked up is
            widened, products and sums are float32 (of lists as with precision="bf16"), moments too, and a moved row is
            rounded at random so that small moves add up. For "vae" and "dae" with softmax="sampled" and
            table_updates="rows".
        patience: a stage ends after so many epochs without a better validation score; 0 never.
        control: also train the recommender alone for stage 3's epochs and rate, so that a gain can be told from that.
        seed: of initial weights, batches, dropout and noise.
    """

    recommender: str = "vae"
    steps: int = 8
    top_k: int = 50
    action: str = "straight_through"
    hidden_dim: int = 600
    latent_dim: int = 200
    lookup_dim: int = 64
    feedback_dim: int = 128
    dropout: float = 0.5
    reading: str = "heldout"
    feedback: str = "embedding"
    memory_ridge: float = 3.0
    folds: int = 2
    feedback_inputs: str = "history,list,reward"

    mask_kept: bool = True
    kl: str = "per_user"
    kl_gamma: float | str = "auto"
    kl_cap: float | str = "auto"
    anneal_steps: int | str = "auto"
    mmd_weight: float = 100.0
    code_l1: float | str = "auto"
    reward_weight: float = 0.1
    reward_loss: str = "imitation"
    l2: float | str = "auto"
    noise: str = "shared"
    loss_steps: str = "last"
    gradient_through_time: bool = True

    epochs: tuple[int, int, int] = (100, 5, 25)
    joint: str = "auto"
    batch_size: int | str = "auto"
    learning_rate: float | str = "auto"
    joint_learning_rate: float = 1e-4
    feedback_learning_rate: float = 1e-3
    reward_learning_rate: float = 1e-3
    reward_batch: str = "shared"
    softmax: str = "full"
    negatives: int = 4096
    table_updates: str = "dense"
    table_dtype: str = "fp32"
    patience: int = 20
    control: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        for name, kind in typing.get_type_hints(type(self)).items():
            object.__setattr__(self, name, _typed(name, getattr(self, name), kind))
        if len(self.epochs) != 3 or min(self.epochs) < 0:
            raise ValueError(f"epochs must be three counts >= 0, one per stage; got {self.epochs}")
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}; got {getattr(self, name)!r}")
        for name, (of, others) in _OF_RECOMMENDER.items():
            if getattr(self, name) == "auto":
                object.__setattr__(self, name, of.get(self.recommender, others))
            elif isinstance(getattr(self, name), str):
                raise ValueError(f'{name} must be "auto" or a number; got {getattr(self, name)!r}')
        for name, least in _LEAST.items():
            if not getattr(self, name) >= least:
                raise ValueError(f"{name} must be at least {least}; got {getattr(self, name)}")
        whole("steps", self.steps, 0, MOST_STEPS)
        for name in ("anneal_steps", "batch_size"):
            value = getattr(self, name)
            if value != "auto" and (isinstance(value, str) or value < 1):
                raise ValueError(f'{name} must be "auto" or at least 1; got {value!r}')
        if self.softmax == "sampled" and self.recommender not in MULTINOMIAL:
            raise ValueError(
                f'softmax="sampled" estimates the multinomial loss of {", ".join(MULTINOMIAL)}; '
                f"got recommender={self.recommender!r}"
            )
        if self.table_dtype == "bf16":
            for name, needed in _OF_NARROW_TABLES.items():
                if getattr(self, name) not in needed:
                    wanted = " or ".join(map(repr, needed))
                    raise ValueError(f'table_dtype="bf16" needs {name} = {wanted}; got {getattr(self, name)!r}')
        inputs = self.feedback_inputs.split(",")
        if not set(inputs) <= set(FEEDBACK_INPUTS) or len(set(inputs)) < len(inputs):
            expected = ",".join(FEEDBACK_INPUTS)
            raise ValueError(f"feedback_inputs must be {expected} or some of these; got {self.feedback_inputs!r}")
        if not self.memory_ridge > 0:
            raise ValueError(f"memory_ridge must be above 0; got {self.memory_ridge}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1); got {self.dropout}")
        if self.reading == "heldout" and self.dropout == 0:
            raise ValueError(
                'reading="heldout" learns from the items that dropout hides, so dropout must be above 0; got 0'
            )

    @classmethod
    def preset(cls, name: str, **changes: Any) -> CFSFLConfig:
        """ "default"; "paper": the paper's literal reading where it is known; "best": what won on validation users.

        Raises:
            ValueError: there is no such preset.
        """
        if name not in PRESETS:
            raise ValueError(f"preset must be one of {', '.join(PRESETS)}; got {name!r}")
        return cls(**{**PRESETS[name], **changes})

    @property
    def has_joint_stage(self) -> bool:
        """Whether Algorithm 1 has its third stage."""
        return self.feedback == "embedding" and self.epochs[2] > 0 and (self.steps > 0 or self.joint == "always")

    @property
    def judges_items(self) -> bool:
        """Whether the virtual user answers with scores of items."""
        return self.feedback == "scores"

    @property
    def uses_reward(self) -> bool:
        """Whether a loss of stage 3 or the loop looks at the reward estimator."""
        return self.reward_weight > 0 or (self.steps > 0 and "reward" in self.feedback_inputs)

    def resolved(self, n_users: int) -> CFSFLConfig:
        """The same with every "auto" replaced, for a number of training users."""
        batch_size = self.batch_size
        if batch_size == "auto":
            batch_size = 500 if n_users >= 20_000 else 250 if n_users >= 2_000 else 100
        updates = -(-n_users // int(batch_size)) * (self.epochs[0] + self.epochs[2])
        anneal = self.anneal_steps
        if anneal == "auto":
            anneal = min(LARGEST, max(1, round(0.85 * updates / max(float(self.kl_cap), 1e-9))))
        return dataclasses.replace(self, batch_size=batch_size, anneal_steps=anneal)

    def to_dict(self) -> dict[str, Any]:
        """Every field, as json holds it."""
        return {**dataclasses.asdict(self), "epochs": list(self.epochs)}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> CFSFLConfig:
        """The config of such a dict.

        Raises:
            ValueError: a field is unknown or has a value out of range.
        """
        known = {f.name for f in dataclasses.fields(cls)}
        if unknown := sorted(set(fields) - known):
            raise ValueError(f"unknown config field {unknown[0]!r}; known: {', '.join(sorted(known))}")
        try:
            return cls(**fields)
        except TypeError as error:
            raise ValueError(f"a config field has a value of the wrong type: {error}") from None


LARGEST = 2**31 - 1
"""Of every integer in a config, and of the items of a catalogue: the kernels count with 32 bits."""


def whole(name: str, value: Any, least: int, most: int = LARGEST) -> int:
    """A whole number, Python's or NumPy's, between two others.

    Raises:
        ValueError: it is none, or outside; names it.
    """
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise ValueError(f"{name} must be a whole number; got {value!r}")
    if not least <= value <= most:
        raise ValueError(f"{name} must be at {f'least {least}' if value < least else f'most {most}'}; got {value}")
    return int(value)


def _typed(name: str, value: Any, kind: Any) -> Any:
    """A field's value as its type; numbers of NumPy and integers for floats are taken.

    Raises:
        ValueError: it is of another type, not finite, or beyond LARGEST.
    """
    kinds = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if str in kinds and isinstance(value, str):
        return str(value)
    if bool in kinds and isinstance(value, (bool, np.bool_)):
        return bool(value)
    if kind == tuple[int, int, int] and isinstance(value, (tuple, list)):
        return tuple(_typed(name, one, int) for one in value)
    if int in kinds:
        return whole(name, value, -LARGEST, 2**63 - 1 if name == "seed" else LARGEST)
    number = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    if float in kinds and number and math.isfinite(value):
        return float(value)
    wanted = {bool: "True or False", str: "a text", float: "a finite number"}.get(kinds[0], "three whole numbers")
    raise ValueError(f"{name} must be {wanted}; got {value!r}")


LATER_FIELDS = frozenset(
    {
        "steps",
        "top_k",
        "action",
        "feedback",
        "memory_ridge",
        "folds",
        "feedback_inputs",
        "reward_weight",
        "reward_loss",
        "noise",
        "loss_steps",
        "gradient_through_time",
        "joint",
        "joint_learning_rate",
        "feedback_learning_rate",
        "reward_learning_rate",
        "reward_batch",
        "control",
    }
)
"""Fields that stage 1 does not depend on: runs that differ in these alone may share it."""

MOST_STEPS = 10_000
"""T beyond this is a mistake: nothing would ever come of it."""

FEEDBACK_INPUTS = ("history", "list", "reward")

MULTINOMIAL = ("vae", "dae", "recvae", "awae")
"""Recommenders of the multinomial likelihood."""

RECOMMENDER_NAMES = ("vae", "dae", "vae-gaussian", "vae-linear", "mf", "warp", "recvae", "cdae", "awae")

CHOICES = {
    "recommender": RECOMMENDER_NAMES,
    "action": ("straight_through", "topk_softmax", "softmax", "hard"),
    "reading": ("heldout", "full"),
    "feedback": ("embedding", "scores"),
    "kl": ("per_user", "annealed", "none"),
    "reward_loss": ("imitation", "literal"),
    "noise": ("shared", "fresh"),
    "loss_steps": ("last", "all"),
    "joint": ("auto", "always"),
    "reward_batch": ("shared", "fresh"),
    "softmax": ("full", "sampled"),
    "table_updates": ("dense", "rows"),
    "table_dtype": ("fp32", "bf16"),
}
"""What fields that are names may be."""

_OF_NARROW_TABLES = {
    "recommender": ("vae", "dae"),
    "feedback": ("embedding",),
    "softmax": ("sampled",),
    "table_updates": ("rows",),
}
_OF_RECOMMENDER = {
    "kl_cap": ({"vae-gaussian": 0.05, "vae-linear": 0.05}, 0.2),
    "learning_rate": ({"cdae": 1e-2}, 1e-3),
    "kl_gamma": ({"recvae": 0.005}, 0.0025),
    "code_l1": ({"awae": 0.1}, 0.0),
    "l2": ({"mf": 0.05, "warp": 0.05, "recvae": 0.0}, 0.01),
}
"""What "auto" is for some recommenders, and for all others."""

_LEAST = {
    "negatives": 1,
    "folds": 2,
    "steps": 0,
    "top_k": 1,
    "hidden_dim": 1,
    "latent_dim": 1,
    "lookup_dim": 1,
    "feedback_dim": 1,
    "kl_gamma": 0,
    "kl_cap": 0,
    "mmd_weight": 0,
    "code_l1": 0,
    "reward_weight": 0,
    "l2": 0,
    "learning_rate": 0,
    "joint_learning_rate": 0,
    "feedback_learning_rate": 0,
    "reward_learning_rate": 0,
    "patience": 0,
    "seed": 0,
}

PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "paper": {
        "reading": "full",
        "mask_kept": False,
        "kl": "annealed",
        "reward_weight": 1.0,
        "noise": "fresh",
        "epochs": (150, 5, 50),
        "batch_size": 500,
        "joint_learning_rate": 1e-3,
        "reward_batch": "fresh",
        "patience": 0,
    },
    "best": {
        "recommender": "recvae",
        "feedback": "scores",
        "steps": 4,
        "reading": "full",
        "mask_kept": False,
        "anneal_steps": 1,
        "learning_rate": 5e-4,
        "epochs": (120, 16, 0),
        "patience": 40,
        "reward_learning_rate": 3e-3,
        "control": False,
    },
}
