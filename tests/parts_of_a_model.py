"""Run in several processes by test_sharded: a model in parts beside the whole one, and how far they are apart."""

from __future__ import annotations

import json
import sys

import torch
from torch import Tensor

from cfsfl_fast import CFSFL, CFSFLConfig, ops
from cfsfl_fast.distributed import processes
from cfsfl_fast.interactions import from_pairs
from cfsfl_fast.model import ITEM_TABLES
from cfsfl_fast.sharded import Shard
from cfsfl_fast.training import Noise, joint_step, reward_step, view

USERS, ITEMS = 60, 203


def far(found: Tensor | None, expected: Tensor | None) -> float:
    """The greatest difference, relative to the greatest expected value."""
    if found is None or expected is None:
        return 0.0 if found is expected else float("inf")
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-30))


def losses(model: CFSFL, x: object, users: Tensor) -> tuple[list[float], dict[str, Tensor | None], Tensor]:
    """L_C and L_R, their gradients by name, and the lists."""
    batch = view(x, users, model.config, 5)
    with model.running():
        loss, lists = joint_step(model, batch, Noise(users, 8, False, (5,)), 1)
        of_reward, _, _ = reward_step(model, batch, lists)
    named = dict(model.named_parameters())
    found = {}
    for which, value in (("joint", loss), ("reward", of_reward)):
        gradients = torch.autograd.grad(value, list(named.values()), allow_unused=True)
        found |= {f"{which} {name}": g for name, g in zip(named, gradients, strict=True)}
    return [float(loss), float(of_reward)], found, lists.ids


def main(backend: str, **choices: object) -> None:
    """Prints what the first process finds."""
    config = CFSFLConfig.from_dict(
        {
            "steps": 3,
            "top_k": 7,
            "hidden_dim": 24,
            "latent_dim": 8,
            "lookup_dim": 8,
            "feedback_dim": 8,
            "batch_size": 30,
        }
        | {"anneal_steps": 100, **choices}
    )
    generator = torch.Generator().manual_seed(1)
    rows = torch.arange(USERS).repeat_interleave(9)
    items = (torch.rand(len(rows), generator=generator).square() * ITEMS).long()  # the first part has most
    x, users = from_pairs(rows, items, USERS, ITEMS), torch.arange(USERS)
    with processes(torch.device("cpu")) as mesh:
        group = mesh.everyone
        models, after = [], []
        for made in (
            lambda: CFSFL.from_config(ITEMS, config, backend=backend),
            lambda: CFSFL.part(ITEMS, config, Shard(group, ITEMS), backend=backend),
        ):
            torch.manual_seed(3)
            models.append(made())
            after.append(torch.rand(3))
            torch.manual_seed(4)
            torch.nn.init.normal_(models[-1].recommender.input.feedback)
        whole, part = models
        first, last = part.shard.span
        mine = {
            name: (t[first:last] if name in ITEM_TABLES else t, part.state_dict()[name])
            for name, t in whole.state_dict().items()
        }
        asked = {"n": 20}, {"n": ITEMS, "exclude_seen": False, "steps": 0}, {"n": 5, "exclude": [0, 1, 150]}
        answers = [(whole.recommend(x, **a), part.recommend(x, **a)) for a in asked]
        u, code_lists = torch.randn(USERS, 24, generator=generator), []
        for model in models:
            with model.running(), torch.no_grad():
                code_lists.append(ops.linear_topk(u, model.output_table(), 50, x.csr))
        (expected, gradients, ids), (found, parts, part_ids) = (losses(m, x, users) for m in models)
        apart = {}
        for name, gradient in gradients.items():
            cut = name.split()[1] in ITEM_TABLES and gradient is not None
            apart[name] = far(parts[name], gradient[first:last] if cut else gradient)
        worst = group.gathered(torch.tensor([max(apart.values())])).max()
        same = group.gathered(torch.tensor([all(torch.equal(*pair) for pair in mine.values())])).all()
        told = {
            "same weights": bool(same),
            "same numbers after": torch.equal(*after),
            "same list of a code": [torch.equal(*pair) for pair in zip(*code_lists, strict=True)],
            "same ids": [torch.equal(a[0], b[0]) for a, b in answers],
            "same scores": [torch.equal(a[1], b[1]) for a, b in answers],
            "same lists": torch.equal(ids, part_ids),
            "losses": [found, expected],
            "gradients": float(worst),
            "gradient of": max(apart, key=lambda name: apart[name]),
            "rows": last - first,
        }
        if group.is_first:
            print(json.dumps(told))


if __name__ == "__main__":
    main(sys.argv[1], **json.loads(sys.argv[2]))
