"""What `torch.compile` sees of the border: every operation as one call, and in its traces operators instead of kernels.

The border's functions of plain tensors are marked `whole`. torch.compile puts a call of one into its graph as it is,
without looking inside; what traces that graph with autograd runs it in Python, where the bindings and the look-ups that
tables collect work as ever, and meets `torch.ops.cfsfl_fast.*` (`operators`) where eager calls meet a backend. Which
backend that is, is settled when a trace is made. Eager calls pay one look at a flag.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from cfsfl_fast import backends

OPERATORS = "operators of "
"""Before a backend's name: reach it through torch.ops.cfsfl_fast."""

_whole: list[Callable[..., Any]] = []

F = TypeVar("F", bound=Callable[..., Any])


def whole(function: F) -> F:
    """Marks a function of tensors, None, numbers and strings, and of tuples and lists of them, which returns tensors.

    It asks a tensor for its `shape`: `len` would fix a size that a trace leaves open.
    """
    _whole.append(function)
    return function


def selected(device: torch.device) -> str:
    """The name under which `implementation` gives what runs on a device here."""
    if torch.compiler.is_compiling():
        return _while_compiling(device, backends.traced())
    return backends.resolve(device)


def _while_compiling(device: torch.device, asked: str | None) -> str:
    """Run as it is while a trace is made, and a constant of it."""
    for function in _whole:  # here, for it takes a second to import what keeps these marks
        torch.compiler.allow_in_graph(function)
    backend = backends.resolve(device, asked)
    return backend if backend == "reference" else OPERATORS + backend


_while_compiling._dynamo_marked_constant = True  # type: ignore[attr-defined]  # as torch.compiler.assume_constant_result


def implementation(name: str) -> Any:
    """The functions of a backend by a name of `selected`."""
    if name.startswith(OPERATORS):
        from cfsfl_fast.operators import Operators  # here, for eager calls need not register them

        return Operators(name[len(OPERATORS) :])
    return backends.implementation(name)


def through_operators(name: str) -> bool:
    """Whether tensors may be without data: a trace is being made."""
    return name.startswith(OPERATORS)
