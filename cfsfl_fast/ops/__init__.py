"""The border between models and kernels: checks and autograd bindings.

Every operation is one function here, in a file of its name, and one of the same name in each implementation:
`reference` (the specification), `library` (backend "torch"), `cpp` (backend "cpp") and `kernels` (backend "triton").
`backends` chooses among them.

Gradients of looked-up rows are sparse (`lookups`). The functions marked `whole` are what `torch.compile` sees
(`compiling`).

The code u is rounded to the dtype of its output layer, in which the two are multiplied; scores, losses and all that
follows are float32 or wider.
"""

from cfsfl_fast.library import exact_topk, follow, mlp
from cfsfl_fast.lookups import Table
from cfsfl_fast.ops.csr import CSR
from cfsfl_fast.ops.feedback_step import ACTIONS, FeedbackStep, Layers, feedback_step
from cfsfl_fast.ops.fuse import fuse, fuse_softmax
from cfsfl_fast.ops.linear_logistic import linear_logistic
from cfsfl_fast.ops.linear_nll import linear_nll
from cfsfl_fast.ops.linear_squares import linear_squares
from cfsfl_fast.ops.linear_topk import linear_topk, loop_state, pair_scores, topk
from cfsfl_fast.ops.linear_warp import linear_warp
from cfsfl_fast.ops.row_bag import row_bag
from cfsfl_fast.ops.sampled_nll import sampled_nll
from cfsfl_fast.ops.slim import slim

__all__ = [
    "ACTIONS",
    "CSR",
    "FeedbackStep",
    "Layers",
    "Table",
    "exact_topk",
    "feedback_step",
    "follow",
    "fuse",
    "fuse_softmax",
    "linear_logistic",
    "linear_nll",
    "linear_squares",
    "linear_topk",
    "linear_warp",
    "loop_state",
    "mlp",
    "pair_scores",
    "row_bag",
    "sampled_nll",
    "slim",
    "topk",
]
