"""What the kernels cost, read off their machine code: `python -m cfsfl_fast.kernels.report`. Needs no GPU.

The column instructions/elements has one entry per loop that reads whole vectors: the instructions of one turn in the
machine code (branches that are seldom taken included, inner loops not) and the elements that a thread gets in it.

The column floor estimates the share of its floor that a kernel can reach with enough programs at work: the time of the
compulsory bytes or flops at the rates of a data sheet, over what the instructions (or, of a product, the tiles from
cache) take. Latency, and what is done once per user, are not in it.

Every case runs a launcher on tensors without storage, records what it would launch (dtypes, alignments, constexprs,
warps), and compiles exactly that ahead of time for a GPU that need not exist. The disassembler and the resource reader
come with Triton.
"""

from __future__ import annotations

import argparse
import collections
import json
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from cfsfl_fast import kernels
from cfsfl_fast.kernels import resting, tile
from cfsfl_fast.kernels.races import races

BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
SHAPES = {"ml-20m": 20_108, "msd": 41_140, "wide": 1_000_000}
TARGETS = (80, 90, 100)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
B, H, D, V, F, K = 500, 600, 64, 128, 128, 50


class Rates(NamedTuple):
    """Of one multiprocessor in one cycle."""

    flops: float  # tensor cores, 16-bit
    memory: float  # bytes
    cache: float  # bytes from the second-level cache


RATES = {  # NVIDIA's data sheets: A100 40 GB, H100 SXM, B200; of caches only A100's has one, 5120 bytes a cycle
    80: Rates(2048, 1555e9 / (108 * 1.41e9), 5120 / 108),
    90: Rates(4096, 3350e9 / (132 * 1.83e9), 5120 / 132),
    100: Rates(8192, 8000e9 / (148 * 1.85e9), 5120 / 148),
}
ISSUE = 128
"""Instructions of a thread that a multiprocessor issues in a cycle."""

PASSES = {"feedback_step_fwd_kernel": 2, "linear_topk_fwd_kernel": 2, "linear_nll_fwd_kernel": 2}
"""Kernels that read a row of scores so many times, by their first loops; the loops of others follow one another."""

OF_SCORES = {*PASSES, "linear_nll_bwd_kernel"}
"""Kernels that read scores, from cache; the others' rows come from memory."""

OPTIONS: tuple[str, ...] = ("num_warps", "num_stages", "maxnreg")


class Launch(NamedTuple):
    """One recorded launch: the kernel, its arguments by name, the compiler's options."""

    kernel: Any
    arguments: dict[str, Any]
    options: dict[str, int]


@contextmanager
def fixed(cc: int) -> Iterator[None]:
    """Launchers believe that every device has this compute capability."""
    with (
        mock.patch.object(tile, "capability", return_value=cc),
        mock.patch.object(resting, "capability", return_value=cc),
    ):
        yield


def record(call: Callable[[], object], cc: int) -> list[Launch]:
    """What a launcher launches on a device of this compute capability."""
    found = []

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        options: dict[str, int] = {name: kwargs.pop(name) for name in OPTIONS if name in kwargs}
        found.append(Launch(self, {**dict(zip(self.arg_names, args, strict=False)), **kwargs}, options))

    with mock.patch.object(JITFunction, "run", run), fixed(cc):
        call()
    return found


@dataclass
class Resources:
    """What one compiled kernel takes."""

    registers: int
    spills: int  # loads and stores of local memory
    shared: int  # bytes
    warps: int
    races: list[tuple[str, str]]  # of a program with itself, see `races`
    instructions: collections.Counter[str] = field(repr=False)
    sass: str = field(repr=False)

    @property
    def programs(self) -> int:
        """Programs that one multiprocessor holds at once: 64 K registers, 64 warps, 227 KB of shared memory."""
        by_registers = 65536 // (-(-self.registers // 8) * 8 * 32 * self.warps)
        by_shared = 227 * 1024 // (self.shared + 1024)
        return min(by_registers, by_shared, 64 // self.warps, 32)

    @property
    def streams(self) -> list[tuple[int, int]]:
        """(instructions, loads of 128 bits) of each loop that reads whole vectors, less the loops inside it."""
        lines = [line.strip() for line in self.sass.splitlines()]
        labels = {line[:-1]: n for n, line in enumerate(lines) if re.fullmatch(r"\.L_x_\d+:", line)}
        ends: dict[int, int] = {}
        for n, line in enumerate(lines):
            target = re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", line)
            if target and labels.get(target[1], n) < n:
                ends[labels[target[1]]] = n
        found = []
        for first, last in sorted(ends.items()):
            inner = {m for start, stop in ends.items() if first < start and stop < last for m in range(start, stop + 1)}
            own = [lines[n] for n in range(first, last + 1) if n not in inner and re.match(r"(/\*|@|[A-Z])", lines[n])]
            vectors = sum(bool(re.search(r"\bLDG\.E(\.\w+)*\.128\b", line)) for line in own)
            if vectors:
                found.append((len(own), vectors))
        return found

    def loads(self, width: str) -> int:
        """Loads from global memory of a width: "128", "64"."""
        return len(re.findall(rf"\bLDG\.E(?:\.\w+)*?\.{width}\b", self.sass))


_TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int32: "i32", torch.int64: "i64"}


def source_of(launch: Launch) -> ASTSource:
    """The specialisation that the just-in-time compiler would choose: divisibility by 16, and integers that are 1."""
    signature, constexprs, attributes = {}, {}, {}
    for i, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
            signature[parameter.name], constexprs[(i,)] = "constexpr", value
            continue
        if isinstance(value, Tensor):
            signature[parameter.name] = "*" + _TYPES[value.dtype]
            aligned = value.storage_offset() * value.element_size() % 16 == 0
        else:
            signature[parameter.name] = (
                "fp32" if isinstance(value, float) else "i64" if abs(value) >= 1 << 31 else "i32"
            )
            aligned = isinstance(value, int) and value % 16 == 0
        if aligned:
            attributes[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(fn=launch.kernel, signature=signature, constexprs=constexprs, attrs=attributes)


def compiled(launch: Launch, cc: int) -> Resources:
    """Machine code of a launch for one compute capability, and what it takes."""
    built = triton.compile(source_of(launch), target=GPUTarget("cuda", cc, 32), options=dict(launch.options))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
        sass = _tool("nvdisasm", "-c", file.name)
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())  # type: ignore[union-attr]
    names = re.findall(r"^\s*(?:/\*[0-9a-f]+\*/\s+)?(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)[.\s;]", sass, re.MULTILINE)
    counts = collections.Counter(names)
    spills = counts["LDL"] + counts["STL"]
    shared, warps, found = built.metadata.shared, built.metadata.num_warps, races(built.asm["ttgir"])
    return Resources(registers, max(spills, stack), shared, warps, found, counts, sass)


def _tool(name: str, *arguments: str) -> str:
    done = subprocess.run([str(BIN / name), *arguments], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


# Cases: the launchers at production sizes


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _csr(rows: int, entries: int) -> tuple[Tensor, Tensor]:
    return _empty(entries, dtype=torch.int64), _empty(rows + 1, dtype=torch.int64)


def _layers() -> tuple[list[tuple[Tensor, Tensor]], list[tuple[Tensor, Tensor]]]:
    def linear(n_in: int, n_out: int) -> tuple[Tensor, Tensor]:
        return _empty(n_out, n_in), _empty(n_out)

    reward = [linear(D, F), linear(F, F), linear(F, F), linear(F, 1)]
    return reward, [linear(D + 1, F), linear(F, F), linear(F, V)]


def cases(M: int, dtype: torch.dtype, k: int = K) -> dict[str, Callable[[], object]]:
    """Launchers by name, as one step of training calls them for a catalogue of M items."""
    u, weight, bias = _empty(B, H, dtype=dtype), _empty(M, H, dtype=dtype), _empty(M, dtype=dtype)
    hx, lookup, lists = _empty(B, D), _empty(M, D), _empty(B, k, dtype=torch.int64)
    x, gone = _csr(B, 35_000), _csr(B, 35_000)
    hoisted, wv = _empty(B, H), _empty(V, H)

    layers = _layers()

    def step() -> object:
        """Three of one loop: the first, one that copies, and one that leaves users at rest out of the product."""
        state = kernels.loop_state()
        inputs = u, weight, bias, hx, lookup, *layers, hoisted, wv, k, "straight_through", gone, state
        return [kernels.feedback_step(*inputs) for _ in range(3)]

    return {
        "feedback_step": step,
        "linear_topk": lambda: kernels.linear_topk(u, weight, bias, k, gone, kernels.loop_state()),
        "linear_nll": lambda: kernels.linear_nll(u, weight, bias, *x, None, 0, kernels.loop_state()),
        "linear_nll_backward": lambda: kernels.linear_nll_backward(
            _empty(B, dtype=dtype), u, weight, bias, *x, None, _empty(B), None
        ),
        "row_bag": lambda: kernels.row_bag(_empty(M, H, dtype=dtype), *x, _empty(35_000)),
        "row_bag_backward": lambda: kernels.row_bag_backward(u, *x, _empty(35_000), M),
        "row_dot": lambda: kernels.row_dot(hx, lookup, lists),
        "fuse": lambda: kernels.fuse(hx, lookup, lists, _empty(B, k), "topk_softmax"),
    }


class Row(NamedTuple):
    """One line of the report."""

    op: str
    kernel: str
    shape: str
    dtype: str
    cc: int
    filtered: bool  # reads the filter's survivors instead of scores
    floor: float | None  # share of it, estimated; None of a kernel without a floor of that kind
    resources: Resources

    def plain(self) -> dict[str, Any]:
        """For json."""
        r = self.resources
        return {
            "op": self.op, "kernel": self.kernel, "filtered": self.filtered, "floor": self.floor,
            "shape": self.shape, "dtype": self.dtype, "target": self.cc,
            "registers": r.registers, "spills": r.spills, "shared": r.shared, "programs": r.programs,
            "vectors": r.loads("128") + r.instructions["LDGSTS"], "instructions": r.instructions, "races": r.races,
        }  # fmt: skip


def rows(
    shapes: list[str], dtypes: list[str], targets: list[int], ops: list[str] | None = None, k: int = K
) -> Iterator[Row]:
    """Compiles every kernel that the named launchers launch; one row per distinct specialisation."""
    jobs: dict[tuple[object, ...], tuple[str, Launch, str, str, int]] = {}
    for shape in shapes:
        for dtype in dtypes:
            for op, call in cases(SHAPES[shape], DTYPES[dtype], k).items():
                if ops and op not in ops:
                    continue
                for cc in targets:
                    for launch in record(call, cc):
                        source = source_of(launch)
                        key = (
                            launch.kernel.fn.__name__,
                            cc,
                            str(source.signature),
                            str(source.constants),
                            str(source.attrs),
                        )
                        jobs.setdefault(key, (op, launch, shape, dtype, cc))
    for op, launch, shape, dtype, cc in jobs.values():
        name, filtered, resources = (
            launch.kernel.fn.__name__,
            bool(launch.arguments.get("FILTERED")),
            compiled(launch, cc),
        )
        floor = None if filtered else share_of_floor(name, launch.arguments, resources, size(dtype), cc)
        yield Row(op, name, shape, dtype, cc, filtered, floor, resources)


def share_of_floor(name: str, arguments: dict[str, Any], built: Resources, itemsize: int, cc: int) -> float | None:
    """What the column floor says."""
    rates = RATES[cc]
    if "BLOCK_U" in arguments:  # a product, by its tile
        U, M = int(arguments["BLOCK_U"]), int(arguments["BLOCK_M"])
        flops = rates.flops if itemsize == 2 else rates.flops / 2 if arguments["PREC"] == "tf32" else 2 * ISSUE
        return min(1.0, 2 * U * M / flops / ((U + M) * itemsize / rates.cache))
    if not built.streams:
        return None
    byte = 1 / (rates.cache if name in OF_SCORES else rates.memory)
    if name == "linear_nll_bwd_kernel":
        byte *= 2  # it is written too
    times = [max(byte, count / (16 * vectors) / ISSUE) for count, vectors in built.streams]
    return byte / (sum(times[: PASSES[name]]) if name in PASSES else max(times))


WATCH = ("HGMMA", "HMMA", "UTCHMMA", "LDGSTS", "LDG", "STG", "ATOMG", "SHFL", "BAR")


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", action="append", choices=SHAPES)
    parser.add_argument("--dtype", action="append", choices=DTYPES)
    parser.add_argument("--target", action="append", type=int, choices=TARGETS)
    parser.add_argument("--op", action="append")
    parser.add_argument("-k", type=int, default=K)
    parser.add_argument("--json", action="store_true", help="one list of objects")
    asked = parser.parse_args()
    found = rows(asked.shape or ["ml-20m"], asked.dtype or ["bf16"], asked.target or [90], asked.op, asked.k)
    if asked.json:
        print(json.dumps([row.plain() for row in found]))
        return
    print(f"triton {triton.__version__}; B = {B}, H = {H}, D = {D}, V = {V}, K = {asked.k}")
    print(
        f"{'kernel':34} {'shape':7} dtype  sm  regs spills  shared warps programs/SM wide loads floor"
        " instructions/elements"
    )
    for row in found:
        r = row.resources
        watched = " ".join(f"{name}:{r.instructions[name]}" for name in WATCH if r.instructions[name])
        floor = "-" if row.floor is None else f"{row.floor:.0%}"
        streams = ", ".join(f"{count}/{vectors * 16 // size(row.dtype)}" for count, vectors in r.streams) or "-"
        print(
            f"{row.kernel + ' (filtered)' * row.filtered:34} {row.shape:7} {row.dtype:5} {row.cc:3} {r.registers:5}"
            f" {r.spills:6} {r.shared:7} {r.warps:5} {r.programs:11} {r.loads('128'):8} {floor:>7} {streams:>20}"
            f"  {watched}"
        )
        for argument, what in r.races:
            print(f"  race: {argument} is {what}, without a barrier between")


def size(dtype: str) -> int:
    """Bytes of an element."""
    return DTYPES[dtype].itemsize


if __name__ == "__main__":
    main()
