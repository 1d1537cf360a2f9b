"""The paper's tables and figures and the ablations as experiments, and its published figures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from cfsfl_fast.baselines import BASELINES
from cfsfl_fast.config import LATER_FIELDS, PRESETS, RECOMMENDER_NAMES, CFSFLConfig
from cfsfl_fast.datasets import Dataset
from cfsfl_fast.experiments import Experiment, Row
from cfsfl_fast.tables import Published

QUICK: dict[str, Any] = {"epochs": (60, 3, 10), "steps": 2}
"""A reduced schedule. Fields that are given win over it."""

FIGURE3_STEPS = (1, 2, 4, 8)
FIGURE4_STEPS = (1, 2, 4, 8, 12)
FIGURE4_RANGE = range(13)

LEARN_ON: dict[str, Any] = {"steps": 0, "joint": "always", "reward_weight": 0.0}
"""The control of every row with a loop: the same recommender, epochs and rates of stage 3, no loop and no reward."""


def loop(fields: Mapping[str, Any]) -> int:
    """T of the rows with a loop."""
    return CFSFLConfig.from_dict(dict(fields)).steps


def _name(fields: Mapping[str, Any]) -> str:
    recommender = CFSFLConfig.from_dict(dict(fields)).recommender
    named = {found["recommender"]: name for name, found in RECOMMENDERS.items() if len(found) == 1}
    return named.get(recommender) or LABELS[recommender]


LABELS = {
    "slim": "SLIM",
    "wmf": "WMF",
    "ease": "EASE",
    "edlae": "EDLAE",
    "cdae": "CDAE",
    "awae": "aWAE",
    "recvae": "RecVAE",
}
"""Baselines, and recommenders that Table 3 has alone, by the names of the published table."""


def table3(fields: Mapping[str, Any]) -> Experiment:
    """The recommender with the reward estimator and in the loop, and the best preset, beside baselines."""
    name, steps = _name(fields), loop(fields)
    on = f"{name}, trained on"
    rows = [
        Row(LABELS.get(baseline, baseline), baseline=baseline, controls=(on,), published=LABELS.get(baseline, ""))
        for baseline in BASELINES
    ]
    preset = {field: value for field, value in PRESETS["best"].items() if field != "control"}
    best = {field: preset.pop(field) for field in ("recommender", "feedback", "steps")}
    stage1 = {best["recommender"]: {field: value for field, value in preset.items() if field not in LATER_FIELDS}}
    rows += [
        Row(
            LABELS[other],
            {"recommender": other, "steps": 0},
            stage1.get(other, {}),
            controls=(on,),
            published=LABELS[other],
        )
        for other in RECOMMENDER_NAMES
        if other in LABELS
    ]
    rows += [
        Row(name, {"steps": 0}, controls=(on,), published=name),
        Row(on, LEARN_ON),
        Row(f"{name}+R", {"steps": 0, "joint": "always"}, controls=(on,), published=f"{name}+R"),
        Row(f"CF-SFL, T = {steps}", {}, controls=(on,), published="CF-SFL" if name == "VAE" else ""),
    ]
    base = f"{_name(best)} + memory"
    rows += [
        Row(f"{base}, preset best at T = 0", best, preset, part=base, controls=(on,)),
        Row("CF-SFL, preset best", best, preset, controls=(f"{base}, preset best at T = 0",)),
    ]
    return Experiment("table3", "Table 3: CF-SFL and other systems", tuple(rows), (on,))


def table4(fields: Mapping[str, Any]) -> Experiment:
    """Recommenders without and with the loop."""
    steps, rows = loop(fields), list[Row]()
    for name, changes in RECOMMENDERS.items():
        on = f"{name}, trained on"
        rows += [
            Row(name, {**changes, "steps": 0}, controls=(on,), published=f"{name} without"),
            Row(on, {**changes, **LEARN_ON}),
            Row(f"{name} in CF-SFL, T = {steps}", changes, controls=(on,), published=f"{name} with"),
        ]
    return Experiment("table4", "Table 4: recommenders in the loop", tuple(rows), ("the same, trained on",))


RECOMMENDERS: dict[str, dict[str, Any]] = {
    "WARP": {"recommender": "warp"},
    "MF": {"recommender": "mf"},
    "DAE": {"recommender": "dae"},
    "VAE": {"recommender": "vae"},
    "VAE-Gaussian": {"recommender": "vae-gaussian"},
    "VAE-(beta=0)": {"recommender": "vae", "kl": "none"},
    "VAE-Linear": {"recommender": "vae-linear"},
}
"""Table 4's, by the paper's names."""


def figure3(fields: Mapping[str, Any]) -> Experiment:
    """Learning curves: the recommender trained on, with the reward estimator, and in the loop with several T."""
    name = _name(fields)
    on = f"{name}, trained on"
    rows = [Row(on, LEARN_ON), Row(f"{name}+R", {"steps": 0, "joint": "always"}, controls=(on,))]
    rows += [Row(f"CF-SFL, T = {t}", {"steps": t}, controls=(on,)) for t in FIGURE3_STEPS]
    return Experiment("figure3", "Figure 3: validation NDCG@100 over epochs", tuple(rows), (on,))


def figure4(fields: Mapping[str, Any]) -> Experiment:
    """Accuracy and cost over T."""
    on = f"{_name(fields)}, trained on"
    rows = [Row(on, LEARN_ON), *(Row(f"CF-SFL, T = {t}", {"steps": t}, controls=(on,)) for t in FIGURE4_STEPS)]
    return Experiment("figure4", "Figure 4: accuracy and time over T", tuple(rows), (on,))


def ablations(fields: Mapping[str, Any]) -> Experiment:
    """What stage 3 is made of, one change at a time; all from the same stage 1."""
    config = CFSFLConfig.from_dict(dict(fields))
    name, steps = _name(fields), config.steps
    on, base = f"{name}, trained on", f"CF-SFL, T = {steps}"
    rows = [
        Row(f"{name} (stage 1)", {"steps": 0}, controls=(on,)),
        Row(on, LEARN_ON),
        Row(base, {}, controls=(on,)),
        Row(f"{name}+R (T = 0)", {"steps": 0, "joint": "always"}, controls=(on, base)),
    ]
    changes: dict[str, dict[str, Any]] = {f"T = {t}": {"steps": t} for t in (1, 2, 4, 8) if t != steps}
    changes |= {
        "no adversarial term": {"reward_weight": 0.0},
        **{f"adversarial weight {weight:g}": {"reward_weight": weight} for weight in (0.01, 0.1, 1.0)},
        "generator without R": {"feedback_inputs": "history,list"},
        "generator without a (v from x only)": {"feedback_inputs": "history"},
        "generator without x": {"feedback_inputs": "list,reward"},
        **{f"action {a}": {"action": a} for a in ("topk_softmax", "softmax", "hard", "straight_through")},
        **{f"K = {k}": {"top_k": k} for k in (10, 20, 50, 100)},
        "no gradient through time": {"gradient_through_time": False},
        "loss of all steps": {"loss_steps": "all"},
        "reward loss as printed (8)": {"reward_loss": "literal"},
        "reward loss of imitation": {"reward_loss": "imitation"},
    }
    for label, change in changes.items():
        if any(getattr(config, field) != value for field, value in change.items()):
            rows.append(Row(label, change, controls=(on, base)))
    return Experiment("ablations", f"Ablations of stage 3, from {base}", tuple(rows), (on, base))


EXPERIMENTS: dict[str, Callable[[Mapping[str, Any]], Experiment]] = {
    "table3": table3,
    "table4": table4,
    "figure3": figure3,
    "figure4": figure4,
    "ablations": ablations,
}

PUBLISHED: dict[str, dict[str, Published]] = {
    "ML-20M": {
        "SLIM": (0.370, 0.495, 0.401),
        "WMF": (0.360, 0.498, 0.386),
        "CDAE": (0.391, 0.523, 0.418),
        "aWAE": (0.391, 0.532, 0.424),
        "VAE": (0.395, 0.537, 0.426),
        "VAE+R": (0.396, 0.536, 0.426),
        "CF-SFL": (0.404, 0.542, 0.435),
        "RecVAE": (0.414, 0.553, 0.442),
        "EASE": (0.391, 0.521, 0.420),
        "WARP without": (None, None, 0.312),
        "WARP with": (None, None, 0.340),
        "MF without": (None, None, 0.416),
        "MF with": (None, None, 0.419),
        "DAE without": (None, None, 0.421),
        "DAE with": (None, None, 0.423),
        "VAE without": (None, None, 0.425),
        "VAE with": (None, None, 0.435),
        "VAE-Gaussian without": (None, None, 0.420),
        "VAE-Gaussian with": (None, None, 0.428),
        "VAE-(beta=0) without": (None, None, 0.420),
        "VAE-(beta=0) with": (None, None, 0.425),
        "VAE-Linear without": (None, None, 0.416),
        "VAE-Linear with": (None, None, 0.416),
    },
    "Netflix": {
        "SLIM": (0.347, 0.428, 0.379),
        "WMF": (0.316, 0.404, 0.351),
        "CDAE": (0.343, 0.428, 0.376),
        "aWAE": (0.354, 0.441, 0.381),
        "VAE": (0.351, 0.444, 0.386),
        "VAE+R": (0.352, 0.445, 0.387),
        "CF-SFL": (0.355, 0.449, 0.394),
        "RecVAE": (0.361, 0.452, 0.394),
        "EASE": (0.362, 0.445, 0.393),
    },
    "MSD": {
        "WMF": (0.211, 0.312, 0.257),
        "CDAE": (0.188, 0.283, 0.237),
        "VAE": (0.266, 0.364, 0.316),
        "VAE+R": (0.263, 0.360, 0.314),
        "CF-SFL": (0.273, 0.369, 0.323),
        "RecVAE": (0.276, 0.374, 0.326),
        "EASE": (0.333, 0.428, 0.389),
    },
}
"""Recall@20, Recall@50 and NDCG@100 by data set and system: the paper's Tables 3 and 4, and later papers' records."""

_TRAINING_USERS = {116_677: "ML-20M", 383_435: "Netflix", 471_355: "MSD"}
"""The published splits by their size."""


def published(data: Dataset) -> tuple[dict[str, Published], str]:
    """The figures to stand beside a data set's, and what they are of: ML-20M where it is none of the published."""
    name = _TRAINING_USERS.get(data.n_users)
    return (PUBLISHED[name], name) if name else (PUBLISHED["ML-20M"], "ML-20M (another data set)")
