"""Races of a program with itself: accesses of its threads to global memory that no barrier orders.

Triton lets every thread load a scalar and one of them store it, and hands the elements of a tensor to threads as it
sees fit. So where a program

    loads p, then stores p        a late warp may load what an early one has stored
    stores p, then loads q        the element may be another thread's                       (p and q of one argument)
    stores p, then takes a ticket the one thread that takes it publishes what itself has stored, not what others have

a barrier must lie between. Nothing else looks for that: the interpreter has one thread, and compute-sanitizer's
racecheck watches shared memory. Here the code is read as Triton lays it out for threads (TTGIR), along every path: both
sides of a branch, loops twice. A barrier is one that is written, a reduction across warps, or a scalar atomic whose
result all threads get. A tensor's load and store through the same pointers are each thread's own affair.
"""

from __future__ import annotations

import math
import re
from typing import NamedTuple

_NAME = re.compile(r"%[\w$.-]+")
_LOCATION = re.compile(r" loc\((?:[^()]|\((?:[^()]|\([^()]*\))*\))*\)")
_TENSOR = re.compile(r"tensor<((?:\d+x)+)[^,<>]*(?:<[^<>]*>)?, (.*)>$")


class Access(NamedTuple):
    """A load or a store of global memory."""

    stores: bool
    pointer: str  # its name in the code
    arguments: frozenset[str]  # of the kernel, that it may point into
    scalar: bool


Pending = frozenset[Access]


class Races:
    """Walks one kernel's TTGIR; `found` has the pairs of accesses, as (argument, what and what).

    Args:
        ttgir: the module's text.
    """

    def __init__(self, ttgir: str) -> None:
        self.found: set[tuple[str, str]] = set()
        self._layouts = dict(re.findall(r"^(#\w+) = (.*)$", ttgir, re.MULTILINE))
        lines = [_LOCATION.sub("", line).strip() for line in ttgir.splitlines()]
        self._lines = [line for line in lines if line and not line.startswith("#")]
        self._points: dict[str, frozenset[str]] = {}
        self._yields: list[frozenset[str]] = [frozenset()]
        self._at = next(n for n, line in enumerate(self._lines) if line.startswith("tt.func"))
        while not self._lines[self._at].endswith("{"):
            self._parameters()
        self._parameters()
        self._block(frozenset())

    def _parameters(self) -> None:
        for name in re.findall(r"(%\w+): !tt\.ptr", self._lines[self._at]):
            self._points[name] = frozenset([name[1:]])
        self._at += 1

    def _block(self, pending: Pending) -> Pending:
        """Walks to the end of the region; accesses since the last barrier, on any path."""
        while not self._lines[self._at].startswith("}"):
            pending = self._operation(self._lines[self._at], pending)
        return pending

    def _operation(self, line: str, pending: Pending) -> Pending:
        given = re.match(r"(%[\w-]+)(?::\d+)? = (.*)", line)
        results, code = given.groups() if given else ("", line)
        self._at += 1
        if code.startswith(("scf.for", "scf.while", "scf.if")):
            pending = self._flow(results, code, pending)
        elif code.startswith(('"tt.reduce"', '"tt.scan"')):
            while not self._lines[self._at].startswith("})"):
                self._at += 1
            if self._crosses_warps(self._lines[self._at], int(re.search(r"axis = (\d+)", code)[1])):  # type: ignore[index]
                pending = frozenset()
            self._at += 1
        elif re.match(r"(ttg|gpu)\.barrier", code):
            pending = frozenset()
        elif code.startswith(("scf.yield", "scf.condition")):
            self._yields[-1] |= self._of(code)
        elif code.startswith(
            ("tt.load", "tt.store", "tt.atomic", "ttg.async_copy_global", "tt.elementwise_inline_asm")
        ):
            pending = self._access(results, code, pending)
        elif results:
            self._points[results] = self._of(code)
        return pending

    def _of(self, code: str) -> frozenset[str]:
        """What the operands of an operation may point into."""
        return frozenset[str]().union(*(self._points.get(name, ()) for name in _NAME.findall(code)))

    def _flow(self, results: str, code: str, pending: Pending) -> Pending:
        for name, start in re.findall(r"(%[\w-]+) = (%[\w-]+)", code):
            self._points[name] = self._points.get(start, frozenset())
        self._yields.append(self._of(code))
        begin, after = self._at, pending
        for _ in range(1 if code.startswith("scf.if") else 2):
            self._at = begin
            after = self._block(after)
            other = pending
            while self._lines[self._at].endswith("{"):
                divided = self._lines[self._at]  # "} else {", "} do {"
                self._at += 1
                if "do" in divided and self._lines[self._at].startswith("^"):
                    self._at += 1
                other = self._block(after if "do" in divided else pending)
            after |= other
        self._at += 1
        self._points[results] = self._yields.pop()
        return after

    def _access(self, results: str, code: str, pending: Pending) -> Pending:
        operands = _NAME.findall(re.sub(r'"[^"]*"', "", code.partition(" : ")[0]))
        copies = code.startswith("ttg.async")
        pointer = operands[0] if operands else ""
        asm = code.startswith("tt.elementwise")
        arguments = self._of(" ".join(operands)) if asm else self._points.get(pointer, frozenset())
        self._points[results] = frozenset()
        if not arguments:
            return pending
        stores = not (copies or code.startswith("tt.load"))
        new = Access(stores, pointer, arguments, "tensor<" not in code)
        for old in pending:
            shared = old.arguments & new.arguments
            own = old.pointer == new.pointer and not (old.scalar and new.scalar)
            if shared and old.stores != new.stores and not own:
                what = "stored, then loaded" if old.stores else "loaded, then stored"
                self.found.add((",".join(sorted(shared)), what))
        if code.startswith("tt.atomic") and re.search(r"\b(acq_)?rel(ease)?,", code):  # release, acq_rel
            self.found |= {(",".join(sorted(old.arguments)), "stored, then published") for old in pending if old.stores}
        if code.startswith("tt.atomic") and new.scalar and self._used(results):
            return frozenset()  # all threads wait for the result
        return pending | {new}

    def _used(self, name: str) -> bool:
        return any(name in _NAME.findall(line) for line in self._lines[self._at :])

    def _crosses_warps(self, signature: str, axis: int) -> bool:
        """Whether a reduction of this type exchanges values between warps."""
        found = _TENSOR.match(signature[signature.index("(") + 1 : signature.index(") ->")])
        if not found:
            return False
        sizes = [int(n) for n in found[1].split("x") if n]
        return self._spread(found[2], axis, sizes[axis])

    def _spread(self, layout: str, axis: int, size: int) -> bool:
        """Whether an axis of so many elements lies in several warps."""
        layout = self._layouts.get(layout, layout)
        sliced = re.match(r"#ttg\.slice<\{dim = (\d+), parent = (.*)\}>$", layout)
        if sliced:
            return self._spread(sliced[2], axis + (axis >= int(sliced[1])), size)
        if layout.startswith("#ttg.linear"):
            warps = re.search(r"warp = \[(.*?)\], block", layout)
            bases = re.findall(r"\[([\d, ]+)\]", warps[1]) if warps else []
            return any(int(basis.split(",")[axis]) for basis in bases)
        parts = [
            re.search(rf"{name} = \[([\d, ]+)\]", layout) for name in ("sizePerThread", "threadsPerWarp", "warpsPerCTA")
        ]
        if not all(parts):
            return False  # a product's layout: not taken for a barrier
        thread, lanes, warps_of = ([int(n) for n in part[1].split(",")][axis] for part in parts if part)
        return warps_of > 1 and size > math.prod((thread, lanes))


def races(ttgir: str) -> list[tuple[str, str]]:
    """(arguments, "loaded, then stored", "stored, then loaded" or "stored, then published") where no barrier orders."""
    return sorted(Races(ttgir).found)
