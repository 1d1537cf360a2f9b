"""Hand-written Triton kernels: importing them needs Triton, using them a CUDA device or Triton's interpreter."""

from __future__ import annotations

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
