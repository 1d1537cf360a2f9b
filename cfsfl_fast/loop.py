"""The feedback loop, equation (1): a^t = topK(s^t), v^(t+1) = F(h(x, a^t), R). Knows no kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cfsfl_fast import ops
from cfsfl_fast.recommenders import Code, Recommender
from cfsfl_fast.virtual_user import VirtualUser, weights

ALL_INPUTS = "history,list,reward"
"""Of the feedback generator."""


class Loop(NamedTuple):
    """What a pass through the loop gives, and the tables it looked up."""

    codes: list[Code]  # of the recommender's passes t = 0 .. T
    turns: list[ops.FeedbackStep]  # t = 0 .. T - 1
    state: Any  # of ops.loop_state, for operations on the code with the same output layer and exclude
    output: ops.Table
    lookup: ops.Table
    hx: Tensor  # [B, D]

    @property
    def code(self) -> Code:
        """Of the pass after the last step."""
        return self.codes[-1]


def unroll(
    recommender: Recommender,
    user: VirtualUser,
    hoisted: Tensor,
    hx: Tensor,
    output: ops.Table,
    lookup: ops.Table,
    *,
    steps: int,
    k: int,
    action: str,
    exclude: tuple[Tensor, Tensor] | None = None,
    noise: Callable[[int], Tensor] | None = None,
    through_time: bool = True,
    inputs: str = ALL_INPUTS,
) -> Loop:
    """T steps of recommender and virtual user, T + 1 passes of the recommender; v^0 = 0.

    Args:
        recommender, user: the two players; the same weights serve every step.
        hoisted: the recommender's part that does not depend on v. [B, H]
        hx: mean lookup row of the history. [B, D]
        output, lookup: the recommender's output layer and the lookup table.
        steps: T.
        k: length of the list that the virtual user sees.
        action: one of ops.ACTIONS.
        exclude: CSR rows of items that never enter the list.
        noise: eps of pass t, [B, Z], for a recommender that samples; None takes z = mu.
        through_time: gradients of a feedback reach the pass before it.
        inputs: what the feedback generator sees, of ALL_INPUTS; the rest is 0.
    """
    noise = noise if recommender.samples else None
    state = ops.loop_state(hoisted.device)
    following = hoisted, recommender.input.feedback
    reward, feedback = weights(user.reward), weights(user.feedback)
    turns: list[ops.FeedbackStep] = []
    codes = [recommender(hoisted, noise and noise(0))]
    listed_from = output if through_time else output.detached()
    for t in range(steps):
        u = codes[-1].u if through_time else codes[-1].u.detach()
        turn = ops.feedback_step(u, listed_from, hx, lookup, reward, feedback, *following, k, action, exclude, state)
        if inputs != ALL_INPUTS:
            h = _seen(inputs, turn, u, listed_from, hx, lookup, action, exclude)
            v = ops.mlp(h, feedback)
            turn = turn._replace(feedback=v, following=ops.follow(v, *following))
        codes.append(recommender(turn.following, noise and noise(t + 1)))
        turns.append(turn)
    return Loop(codes, turns, state, output, lookup, hx)


def _seen(
    inputs: str,
    turn: ops.FeedbackStep,
    u: Tensor,
    output: ops.Table,
    hx: Tensor,
    lookup: ops.Table,
    action: str,
    exclude: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """[h ; R] of (4) with 0 in place of what the generator does not see. [B, D + 1]"""
    h = hx if "history" in inputs else torch.zeros_like(hx)
    if "list" in inputs and action == "softmax":
        h = ops.fuse_softmax(u, output, h, lookup, exclude)
    elif "list" in inputs:
        h = ops.fuse(h, lookup, turn.ids, turn.scores, action)
    reward = turn.logit.sigmoid() if "reward" in inputs else torch.zeros_like(turn.logit)
    return torch.cat([h, reward[:, None]], 1)
