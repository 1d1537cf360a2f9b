"""How products are multiplied, and whether a run repeats to the bit: torch's process-wide switches, set for a while."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch
import torch.utils.deterministic

filling: Any = torch.utils.deterministic

PRECISIONS = ("fp32", "tf32", "bf16")
"""Of the decoder's product u O^T:

"fp32"  everything in float32.
"tf32"  products of float32 tensors on the tensor cores of a CUDA device, operands rounded to 10 bits.
"bf16"  u, O and o rounded to bfloat16 for the product; on a CUDA device the other products are as in "tf32".

Weights and optimisers, sums, softmax, losses and metrics are float32 in each.
"""

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
"""Environment variable that cuBLAS asks for before it promises the same bits on every run."""


@contextlib.contextmanager
def numerics(precision: str, deterministic: bool, device: torch.device) -> Iterator[None]:
    """Sets torch's switches for what runs inside, in every thread of the process, and puts them back. While
    torch.compile traces they stay as they are: what is compiled runs with those of its caller.

    Raises:
        ValueError: the device cannot multiply so.
    """
    if precision == "tf32" and device.type != "cuda":
        raise ValueError(f'precision="tf32" is a mode of a CUDA device\'s tensor cores; the model is on {device}')
    if torch.compiler.is_compiling():
        yield
        return
    with contextlib.ExitStack() as switched:
        if deterministic:
            switched.enter_context(_deterministic())
        multiply = "high" if precision != "fp32" and device.type == "cuda" else "highest"
        before = torch.get_float32_matmul_precision()
        if multiply != before:
            torch.set_float32_matmul_precision(multiply)
            switched.callback(torch.set_float32_matmul_precision, before)
        yield


@contextlib.contextmanager
def _deterministic() -> Iterator[None]:
    strict, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    if strict and not warns:
        yield
        return
    os.environ.setdefault(WORKSPACE, ":4096:8")
    fills = filling.fill_uninitialized_memory  # costs time, and changes no result
    torch.use_deterministic_algorithms(True)
    filling.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(strict, warn_only=warns)
        filling.fill_uninitialized_memory = fills
