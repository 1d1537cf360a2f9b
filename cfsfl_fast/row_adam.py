"""Adam that moves only the rows of a table that have a gradient (Kingma and Ba 2015, row by row)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class RowAdam(torch.optim.Adam):
    """`torch.optim.Adam`, but a parameter whose gradient is sparse in its rows is updated in these rows alone.

    A row that no update touches keeps its weights and its moments: nothing of it is read or written. Its bias
    correction counts its own updates, so a row moves as it would if the updates without it had not been. (Dense Adam
    would let it coast on its old moments, and pull it to zero by the l2 penalty.) Parameters with dense gradients are
    updated as ever.

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
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
            state["row_steps"] = torch.zeros(len(parameter), dtype=torch.int32, device=parameter.device)
        rows, found = gradient.indices()[0], gradient.values()
        (beta1, beta2), weights = group["betas"], parameter[rows]
        if group["weight_decay"]:
            found = found.add(weights, alpha=group["weight_decay"])
        steps = state["row_steps"][rows] + 1
        mean = state["exp_avg"][rows].lerp_(found, 1 - beta1)
        square = state["exp_avg_sq"][rows].mul_(beta2).addcmul_(found, found, value=1 - beta2)
        n = steps.double()
        first, second = (1 - beta**n for beta in (beta1, beta2))
        rate = (group["lr"] / first).float()[:, None]
        spread = square.div(second.float()[:, None]).sqrt_().add_(group["eps"])
        parameter.index_copy_(0, rows, weights - rate * mean / spread)
        state["row_steps"].index_copy_(0, rows, steps)
        state["exp_avg"].index_copy_(0, rows, mean)
        state["exp_avg_sq"].index_copy_(0, rows, square)
