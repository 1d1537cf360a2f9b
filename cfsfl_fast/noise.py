"""Random numbers that are a function of their keys: the same for any batch, order, device or restart.

A counter-based generator (SplitMix64's finaliser over a chain of keys; Steele, Lea and Flood 2014), in int64 tensor
arithmetic, which wraps. Nothing is kept between calls, so a run that resumes repeats what it would have drawn.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def _shift(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(x: int) -> int:
    x &= (1 << 64) - 1
    return x - (1 << 64) if x >> 63 else x


_GOLDEN, _FIRST, _SECOND = (_signed(c) for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def _mix(x: Any) -> Any:
    """SplitMix64's finaliser of a tensor or of a number."""
    if isinstance(x, Tensor):
        x = (x ^ _shift(x, 30)) * _FIRST
        x = (x ^ _shift(x, 27)) * _SECOND
        return x ^ _shift(x, 31)
    x &= (1 << 64) - 1
    x = (x ^ (x >> 30)) * _FIRST & ((1 << 64) - 1)
    x = (x ^ (x >> 27)) * _SECOND & ((1 << 64) - 1)
    return _signed(x ^ (x >> 31))


def _stepped(x: Any) -> Any:
    return x + _GOLDEN if isinstance(x, Tensor) else _signed(x + _GOLDEN)


def _follow(state: Any, key: Any) -> Any:
    return _mix(_stepped(state) ^ _mix(_stepped(key)))


class Begun:
    """Numbers that come next to a stream's in the keys of many draws, mixed on the host once for all of them. What is
    drawn is what the numbers themselves would give. They can change where they are, under a captured graph.

    states: [S] int64, of each stream.
    """

    def __init__(self, streams: Sequence[int], device: torch.device | str = "cpu") -> None:
        self._place = {_follow(0, stream): i for i, stream in enumerate(streams)}
        self.states = torch.zeros(len(streams), dtype=torch.int64, device=device)

    def set(self, *numbers: int) -> None:
        """Begins with other numbers from here on."""
        states = [functools.reduce(_follow, numbers, state) for state in self._place]
        self.states.copy_(torch.tensor(states))

    def after(self, state: int) -> Tensor:
        """The state that follows the one of a stream."""
        return self.states[self._place[state]]


Key = int | Tensor | Begun


def bits(*keys: Key, device: torch.device | str = "cpu") -> Tensor:
    """64 random bits for every combination of keys, which broadcast. int64

    Numbers are mixed on the host, and tensors where they are: nothing is sent to a device.
    """
    state: Any = 0
    for key in keys:
        state = key.after(state) if isinstance(key, Begun) else _follow(state, key)
    return state if isinstance(state, Tensor) else torch.full((), state, dtype=torch.int64, device=device)


def uniform(*keys: Key, device: torch.device | str = "cpu") -> Tensor:
    """Uniform on (0, 1) for every combination of keys, which broadcast. float32"""
    return (_shift(bits(*keys, device=device), 40).float() + 0.5) * 2.0**-24


def normal(*keys: Key, device: torch.device | str = "cpu") -> Tensor:
    """Standard normal for every combination of keys (Box and Muller 1958). float32"""
    drawn = bits(*keys, device=device)
    radius = ((_shift(drawn, 40).float() + 0.5) * 2.0**-24).log_().mul_(-2).sqrt_()
    return radius * ((drawn & 0xFFFFFF).float() * (2 * math.pi * 2.0**-24)).cos_()
