"""The feedback loop, equation (1): a^t = topK(s^t), v^(t+1) = F(h(x, a^t), R). Knows no kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from cfsfl_fast import ops
from cfsfl_fast.recommenders import Code, MultVAE
from cfsfl_fast.virtual_user import VirtualUser, weights


class Unrolled(NamedTuple):
    """T turns of the loop and the recommender's pass after the last."""

    code: Code  # of pass T
    turns: list[ops.FeedbackStep]  # t = 0 .. T - 1
    state: Any  # of ops.loop_state, for operations on the last code


def unroll(
    recommender: MultVAE,
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
) -> Unrolled:
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
        noise: eps of pass t, [B, Z]; None takes z = mu.
    """
    state = ops.loop_state(hoisted.device)
    reward, feedback = weights(user.reward), weights(user.feedback)
    turns: list[ops.FeedbackStep] = []
    code = recommender(hoisted, None, noise and noise(0))
    for t in range(steps):
        turn = ops.feedback_step(code.u, output, hx, lookup, reward, feedback, k, action, exclude, state)
        code = recommender(hoisted, turn.feedback, noise and noise(t + 1))
        turns.append(turn)
    return Unrolled(code, turns, state)
