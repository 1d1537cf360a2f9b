"""Which implementation of the operations runs on a device, and who says so."""

from __future__ import annotations

import contextlib
import contextvars
import importlib
import logging
import os
from collections.abc import Iterator
from typing import Any

import torch

from cfsfl_fast import library, reference
from cfsfl_fast.sharded import Shard, Sharded

log = logging.getLogger(__name__)

BACKENDS = ("auto", "triton", "cpp", "torch", "reference")

OLDEST = (8, 0)
"""Compute capability from which on the Triton kernels run: earlier GPUs have neither bf16 nor the shared memory."""

_shard: contextvars.ContextVar[Shard | None] = contextvars.ContextVar("cfsfl_shard", default=None)
_chosen: contextvars.ContextVar[str | None] = contextvars.ContextVar("cfsfl_backend", default=None)

_traced: list[str] = []
"""Backends of the `use_backend`s that torch.compile is tracing through: it cannot trace a context variable."""


class BackendError(RuntimeError):
    """A backend was asked for by name and cannot run."""


def why_not(backend: str, device: torch.device) -> str | None:
    """Why a backend cannot run on a device, or None where it can."""
    if backend in ("torch", "reference"):
        return None
    if backend == "cpp":
        if device.type != "cpu":
            return f"the C++ kernels run on the CPU, the tensors are on {device}"
        return _load("cfsfl_fast.cpp")[1]
    if backend == "triton":
        if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
            return f"the Triton kernels run on a CUDA device, the tensors are on {device}"
        if device.type == "cuda" and torch.version.hip:
            return "the Triton kernels hold instructions of NVIDIA GPUs, this torch is built for AMD's"
        if device.type == "cuda" and torch.cuda.get_device_capability(device) < OLDEST:
            found = ".".join(map(str, torch.cuda.get_device_capability(device)))
            return f"the Triton kernels need compute capability {OLDEST[0]}.{OLDEST[1]}, {device} has {found}"
        return _load("cfsfl_fast.kernels")[1]
    raise ValueError(f"backend must be one of {', '.join(BACKENDS)}; got {backend!r}")


_loaded: dict[str, tuple[Any, str | None]] = {}


def _load(name: str) -> tuple[Any, str | None]:
    if name not in _loaded:
        try:
            _loaded[name] = importlib.import_module(name), None
        except ImportError as error:
            _loaded[name] = None, str(error)
    return _loaded[name]


_announced: set[tuple[str, str]] = set()


def resolve(device: torch.device, backend: str | None = None) -> str:
    """The backend that runs on a device: the one asked for, or the best that can.

    Asked for, first to last: the argument, `use_backend`, the environment variable CFSFL_BACKEND, "auto".

    Raises:
        BackendError: a backend was named and cannot run; the message says why.
    """
    for asked in (backend, _chosen.get(), os.environ.get("CFSFL_BACKEND")):
        if asked and asked != "auto":
            reason = why_not(asked, device)
            if reason:
                raise BackendError(f"backend {asked!r} cannot run: {reason}")
            return asked
    best = next(b for b in ("triton" if device.type == "cuda" else "cpp", "torch") if why_not(b, device) is None)
    if (best, device.type) not in _announced:
        _announced.add((best, device.type))
        log.info("backend %r on %s", best, device.type)
        wanted = "triton" if device.type == "cuda" else "cpp"
        if best != wanted:
            log.warning("the %s kernels are missing (%s): library calls instead", wanted, why_not(wanted, device))
    return best


def implementation(name: str) -> Any:
    """The functions of a backend that can run; `reference` runs without bindings of ours."""
    modules = {"cpp": "cfsfl_fast.cpp", "triton": "cfsfl_fast.kernels"}
    impl = _load(modules[name])[0] if name in modules else reference if name == "reference" else library
    shard = _shard.get()
    return impl if shard is None else Sharded(impl, shard)


@contextlib.contextmanager
def use_shard(shard: Shard | None) -> Iterator[None]:
    """Inside, every table is the part of a table that `shard` says; None leaves it to those around."""
    if shard is None:  # nothing to set, which torch.compile could not trace
        yield
        return
    token = _shard.set(shard)
    try:
        yield
    finally:
        _shard.reset(token)


def traced() -> str | None:
    """The backend that torch.compile's trace is inside `use_backend` of."""
    return _traced[-1] if _traced else None


@contextlib.contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Runs every operation inside with one backend; "auto" leaves the choice to those around."""
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}; got {backend!r}")
    if torch.compiler.is_compiling():
        if backend != "auto":
            _traced.append(backend)
        try:
            yield
        finally:
            if backend != "auto":
                _traced.pop()
        return
    token = _chosen.set(_chosen.get() if backend == "auto" else backend)
    try:
        yield
    finally:
        _chosen.reset(token)


@contextlib.contextmanager
def flushed_denormals() -> Iterator[None]:
    """Denormal numbers count as zero inside: softmax gradients of wide catalogues underflow, and a CPU computes with
    denormals many times slower. Set before the first parallel region of a process, it reaches every thread of the pool
    also where the C++ kernels are missing.
    """
    cpp = _load("cfsfl_fast.cpp")[0]
    torch.set_flush_denormal(True)
    try:
        with cpp.flush_denormals() if cpp else contextlib.nullcontext():
            yield
    finally:
        torch.set_flush_denormal(False)
