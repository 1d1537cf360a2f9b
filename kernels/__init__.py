"""Hand-written Triton kernels: importing them needs Triton, using them a CUDA device or Triton's interpreter."""

from __future__ import annotations

import sys

from triton.runtime.jit import JITFunction

from cfsfl_fast.kernels.feedback_step import feedback_step, fuse, row_dot
from cfsfl_fast.kernels.linear_nll import linear_nll, linear_nll_backward
from cfsfl_fast.kernels.linear_topk import linear_topk
from cfsfl_fast.kernels.row_bag import row_bag, row_bag_backward
from cfsfl_fast.kernels.scores import loop_state

__all__ = [
    "feedback_step",
    "fuse",
    "linear_nll",
    "linear_nll_backward",
    "linear_topk",
    "loop_state",
    "row_bag",
    "row_bag_backward",
    "row_dot",
]


def _settle_keys() -> None:
    """Asks every function for its key in one order. Triton (3.6 to 3.9) leaves out of a kernel's key the globals of
    functions that have no key of their own yet: one kernel would have several, by what was launched before it, and a
    process would not find on the disk what another compiled.
    """
    for name in ("tile", "resting", "linear_filter", "linear_topk", "linear_nll", "row_bag", "feedback_step"):
        for function in vars(sys.modules[f"{__name__}.{name}"]).values():
            if isinstance(function, JITFunction):
                _ = function.cache_key


_settle_keys()
