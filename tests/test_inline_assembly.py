"""The kernels' inline assembly, which Triton's interpreter cannot run, by a small machine of its own."""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


class Machine:
    """Runs one thread's PTX: 32-bit registers, 64-bit addresses, a memory of (address, size) -> value."""

    def __init__(self, source: str, operands: dict[str, Any]) -> None:
        self.registers: dict[str, Any] = dict(operands)
        self.memory: dict[tuple[int, int], int] = {}
        self.lines = [line.strip().rstrip(";") for line in source.strip("{} \n").splitlines()]

    def value(self, name: str) -> Any:
        if name.startswith("0f"):
            return np.uint32(int(name[2:], 16)).view(np.float32)
        return int(name, 0) if re.fullmatch(r"-?\d\w*", name) else self.registers[name]

    def bits(self, name: str) -> int:
        found = self.value(name)
        return int(np.float32(found).view(np.uint32)) if isinstance(found, np.float32) else int(found) & 0xFFFFFFFF

    def signed(self, name: str) -> int:
        found = self.bits(name)
        return found - (1 << 32) if found >> 31 else found

    def run(self) -> None:
        labels = {line[:-1]: n for n, line in enumerate(self.lines) if line.endswith(":")}
        n = 0
        while n < len(self.lines):
            line = self.lines[n]
            n += 1
            if not line or line.startswith(".reg") or line.endswith(":"):
                continue
            guard = re.match(r"@(!?)(\w+) ", line)
            if guard:
                line = line[guard.end() :]
                if bool(self.registers[guard[2]]) == bool(guard[1]):
                    continue
            name, _, rest = line.partition(" ")
            if name == "bra":
                n = labels[rest]
            else:
                self.step(name, re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+", rest))

    def step(self, name: str, a: list[str]) -> None:
        simple: dict[str, Callable[[], Any]] = {
            "setp.ge.f32": lambda: self.value(a[1]) >= self.value(a[2]),
            "setp.eq.f32": lambda: self.value(a[1]) == self.value(a[2]),
            "setp.lt.u32": lambda: self.bits(a[1]) < self.bits(a[2]),
            "setp.lt.and.s32": lambda: self.signed(a[1]) < self.signed(a[2]) and self.registers[a[3]],
            "mov.b32": lambda: self.bits(a[1]),
            "selp.b32": lambda: self.bits(a[1] if self.registers[a[3]] else a[2]),
            "add.s32": lambda: self.bits(a[1]) + self.bits(a[2]) & 0xFFFFFFFF,
            "sub.u32": lambda: self.bits(a[1]) - self.bits(a[2]) & 0xFFFFFFFF,
            "and.b32": lambda: self.bits(a[1]) & self.bits(a[2]),
            "xor.b32": lambda: self.bits(a[1]) ^ self.bits(a[2]),
            "shr.s32": lambda: self.signed(a[1]) >> int(a[2]) & 0xFFFFFFFF,
            "mad.wide.u32": lambda: self.bits(a[1]) * self.bits(a[2]) + self.value(a[3]),
            "mad.wide.s32": lambda: self.signed(a[1]) * self.signed(a[2]) + self.value(a[3]),
        }
        if name in simple:
            self.registers[a[0]] = simple[name]()
        elif name == "mov.b64":
            low, high = a[1].strip("{}").split(", ")
            self.registers[a[0]] = self.bits(high) << 32 | self.bits(low)
        elif name.startswith("st.global.b"):
            size = int(name[11:]) // 8
            stored = self.value(a[1])
            self.memory[self.value(a[0].strip("[]")), size] = stored if size == 8 else self.bits(a[1])
        elif name == "atom.relaxed.gpu.global.add.u32":
            key = self.value(a[1].strip("[]")), 4
            self.registers[a[0]] = self.memory.get(key, 0)
            self.memory[key] = self.registers[a[0]] + self.bits(a[2])
        else:
            raise NotImplementedError(name)


def scores() -> np.ndarray:
    special = [-0.0, 0.0, np.inf, -np.inf, np.nan, 1e-45, -1e-45, np.finfo(np.float32).max, np.finfo(np.float32).min]
    return np.concatenate([np.float32(special), np.random.default_rng(0).normal(size=200).astype(np.float32)])


def key_of(s: np.float32, item: int) -> int:
    """`tile.pack`, as an unsigned number."""
    bits = 0 if s == 0 else int(s.view(np.int32))
    bits ^= (bits >> 31) & 0x7FFFFFFF
    return (bits << 32 | 0x7FFFFFFF - item) & (1 << 64) - 1


def test_the_filter_appends_what_reaches_the_threshold() -> None:
    filters = importlib.import_module("cfsfl_fast.kernels.linear_filter")
    source = filters.APPEND.value.replace("${:uid}", "0")
    capacity, counter, buffer, tau = 40, 1 << 40, 1 << 41, np.float32(0.25)
    memory: dict[tuple[int, int], int] = {}
    for item, s in enumerate(scores()):
        machine = Machine(source, {"$1": s, "$2": tau, "$3": counter, "$4": buffer, "$5": item, "$6": capacity})
        machine.memory = memory
        machine.run()
        assert machine.registers["$0"] == 0
    wanted = [key_of(s, item) for item, s in enumerate(scores()) if s >= tau]
    assert len(wanted) > capacity
    assert memory.pop((counter, 4)) == len(wanted)
    assert memory == {(buffer + 8 * slot, 8): key for slot, key in enumerate(wanted[:capacity])}


def test_keys_order_as_lists_do() -> None:
    """By score, descending, -0 and 0 one value; by item among equals."""
    filters = importlib.import_module("cfsfl_fast.kernels.linear_filter")
    found = []
    for item, s in enumerate(scores()):
        operands = {"$1": s, "$2": np.float32(-np.inf), "$3": 0, "$4": 8, "$5": item, "$6": 9}
        machine = Machine(filters.APPEND.value.replace("${:uid}", "0"), operands)
        machine.run()
        found += [(key - (key >> 63 << 64), s, item) for (_, size), key in machine.memory.items() if size == 8]
    order = [(s, item) for _, s, item in sorted(found, reverse=True)]
    assert order == sorted(order, key=lambda pair: (-pair[0], pair[1]))
    assert len(order) == len(scores()) - 1


def test_a_lane_notes_what_reaches_the_threshold() -> None:
    tile = importlib.import_module("cfsfl_fast.kernels.tile")
    lanes, depth, lane, tau = 1024, 4, 77, np.float32(1.0)
    base = (1 << 40) + 4 * lane
    count, memory = 0, {}
    for n0, s in enumerate(scores()):
        operands = {"$1": s, "$2": tau, "$3": count, "$4": base, "$5": n0, "$6": depth, "$7": 4 * lanes}
        machine = Machine(tile.NOTE.value, operands)
        machine.memory = memory
        machine.run()
        count = machine.registers["$0"]
    wanted = [n0 for n0, s in enumerate(scores()) if s >= tau]
    assert count == len(wanted) > depth
    assert memory == {(base + 4 * lanes * d, 4): n0 for d, n0 in enumerate(wanted[:depth])}


def test_a_wrong_instruction_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    tile = importlib.import_module("cfsfl_fast.kernels.tile")
    filters = importlib.import_module("cfsfl_fast.kernels.linear_filter")
    for module, name, right, wrong, check in (
        (tile, "NOTE", "@room st", "@hit st", test_a_lane_notes_what_reaches_the_threshold),
        (tile, "NOTE", "@hit add", "@room add", test_a_lane_notes_what_reaches_the_threshold),
        (filters, "APPEND", "selp.b32 bits, 0, bits, zero;", "", test_keys_order_as_lists_do),
        (filters, "APPEND", "0x7fffffff, $5", "0x7ffffffe, $5", test_the_filter_appends_what_reaches_the_threshold),
    ):
        real = getattr(module, name)
        assert right in real.value
        monkeypatch.setattr(module, name, type(real)(real.value.replace(right, wrong)))
        with pytest.raises(AssertionError):
            check()
        monkeypatch.setattr(module, name, real)
