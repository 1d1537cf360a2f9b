"""Adam that moves only the rows of a table that have a gradient (Kingma and Ba 2015, row by row)."""

from __future__ import annotations

import mmap
from typing import Any

import torch
from torch import Tensor

from cfsfl_fast import noise

ROUNDING = 5
"""Stream of random numbers."""


class RowAdam(torch.optim.Adam):
    """`torch.optim.Adam`, but a parameter whose gradient is sparse in its rows is updated in these rows alone.

    A row that no update touches keeps its weights and its moments: nothing of it is read or written. Its bias
    correction counts its own updates, so a row moves as it would if the updates without it had not been. (Dense Adam
    would let it coast on its old moments, and pull it to zero by the l2 penalty.) Parameters with dense gradients are
    updated as ever.

    A bfloat16 parameter is moved in float32 and rounded up or down at random, the nearer the likelier, so that moves of
    less than half a step add up to what they should (stochastic rounding). The random numbers depend on the row, its
    updates and the column. Its moments are float32.

    State of such a parameter: exp_avg and exp_avg_sq of its shape, of which a CPU only has the pages that were touched,
    and row_steps [M] int32.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        assert closure is None
        by_rows = [
            (group, parameter, parameter.grad)
            for group in self.param_groups
            for parameter in group["params"]
            if parameter.grad is not None and parameter.grad.is_sparse
        ]
        for _, parameter, _ in by_rows:
            parameter.grad = None
        super().step()
        for group, parameter, gradient in by_rows:
            self._step_rows(parameter, gradient.coalesce(), group)

    def _step_rows(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            for moment in ("exp_avg", "exp_avg_sq"):
                state[moment] = _zeros_like(parameter)
            state["row_steps"] = torch.zeros(len(parameter), dtype=torch.int32, device=parameter.device)
        rows, narrow = gradient.indices()[0], parameter.dtype == torch.bfloat16
        found, weights = gradient.values(), parameter[rows]
        if narrow:
            found, weights = found.float(), weights.float()
        beta1, beta2 = group["betas"]
        if group["weight_decay"]:
            found = found.add(weights, alpha=group["weight_decay"])
        steps = state["row_steps"][rows] + 1
        mean = state["exp_avg"][rows].lerp_(found, 1 - beta1)
        square = state["exp_avg_sq"][rows].mul_(beta2).addcmul_(found, found, value=1 - beta2)
        n = steps.double()
        first, second = (1 - beta**n for beta in (beta1, beta2))
        rate = (group["lr"] / first).float()[:, None]
        spread = square.div(second.float()[:, None]).sqrt_().add_(group["eps"])
        moved = weights - rate * mean / spread
        parameter.index_copy_(0, rows, rounded(moved, rows, steps) if narrow else moved)
        state["row_steps"].index_copy_(0, rows, steps)
        state["exp_avg"].index_copy_(0, rows, mean)
        state["exp_avg_sq"].index_copy_(0, rows, square)


def _zeros_like(parameter: Tensor) -> Tensor:
    """Zeros of a parameter's shape, float32 or wider. A CPU takes memory where they are written first, 4 kB at a time:
    torch writes all of them at once, and NumPy asks for pages of 2 MB.
    """
    dtype = torch.promote_types(parameter.dtype, torch.float32)
    if parameter.device.type != "cpu" or parameter.numel() == 0:
        return torch.zeros_like(parameter, dtype=dtype)
    pages = mmap.mmap(-1, parameter.numel() * dtype.itemsize, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=dtype).view(parameter.shape)


def rounded(values: Tensor, *keys: Tensor) -> Tensor:
    """Rows [n, D] of float32 as bfloat16, up or down at random, so that the values are the means; keys [n] each."""
    column = torch.arange(values.shape[1], device=values.device)
    drawn = noise.bits(ROUNDING, *(key.long()[:, None] for key in keys), column) & 0xFFFF
    bits = values.view(torch.int32) + drawn.int()  # carries into the upper half as often as the lower says
    return (bits & -0x10000).view(torch.float32).bfloat16()
