"""The kernels as machine code at production sizes, without a GPU: no spills, room for enough programs, wide loads,
tensor cores.

CFSFL_ALL_TARGETS=1 compiles the full product of sizes, dtypes and architectures instead of the covering choice below.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

ALL = os.environ.get("CFSFL_ALL_TARGETS") == "1"
COVERING = [  # every size, dtype and architecture, and every pair of dtype and architecture
    ("ml-20m", "bf16", 90), ("ml-20m", "fp32", 80), ("msd", "fp32", 90), ("wide", "bf16", 80), ("wide", "bf16", 90),
    ("msd", "bf16", 100), ("wide", "fp32", 100),
]  # fmt: skip
COMBINATIONS = list(itertools.product(("ml-20m", "msd", "wide"), ("fp32", "bf16"), (80, 90, 100))) if ALL else COVERING


class Limit(NamedTuple):
    """What a kernel must leave room for."""

    programs: int  # per multiprocessor
    vectors: int  # loads of 128 bits
    why: str


LIMITS = {
    "feedback_step_fwd_kernel": Limit(4, 4, "500 users are 3.8 programs per multiprocessor of an H100: one wave"),
    "linear_topk_fwd_kernel": Limit(4, 2, "as above: every user of a batch of 500 at once"),
    "linear_nll_fwd_kernel": Limit(8, 2, "streams a row twice: latency is hidden by other programs"),
    "linear_nll_bwd_kernel": Limit(8, 2, "streams a row"),
    "row_bag_fwd_kernel": Limit(8, 2, "gathers rows: latency is hidden by other programs"),
    "row_bag_split_bwd_kernel": Limit(8, 2, "as above"),
    "row_bag_bwd_kernel": Limit(8, 2, "as above, and most programs only write zeros"),
    "row_dot_fwd_kernel": Limit(6, 2, "gathers rows of 64"),
    "fuse_fwd_kernel": Limit(6, 2, "gathers rows of 64"),
    "look_fwd_kernel": Limit(4, 0, "one program per user, most of which compare two rows and stop"),
    "linear_scores_fwd_kernel": Limit(1, 0, "as the filter's product"),
    "linear_filter_fwd_kernel": Limit(1, 0, "one program of eight warps owns a multiprocessor's tensor cores"),
    "linear_filter_check_kernel": Limit(4, 0, "runs once per user"),
    "linear_filter_rescue_kernel": Limit(3, 2, "nearly every program stops at once"),
}


def said_by(*program: str) -> str:
    """What a program of Python prints, in a process without the interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, *program],
        env={**environment, "PYTHONPATH": str(root)},
        cwd=root,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    """The resource report of every combination, made in processes without the interpreter."""
    found = []
    for shape, dtype, target in COMBINATIONS:
        found += json.loads(said_by(
            "-m", "cfsfl_fast.kernels.report", "--json", "--shape", shape, "--dtype", dtype, "--target", str(target)
        ))  # fmt: skip
    return found


def label(row: dict[str, Any]) -> str:
    return " ".join(str(row[name]) for name in ("kernel", "shape", "dtype", "target"))


def test_every_kernel_has_a_limit(rows: list[dict[str, Any]]) -> None:
    assert {row["kernel"] for row in rows} == set(LIMITS)


def test_nothing_spills(rows: list[dict[str, Any]]) -> None:
    assert not [(label(row), row["spills"]) for row in rows if row["spills"]]


def test_enough_programs_fit(rows: list[dict[str, Any]]) -> None:
    short = [(label(row), row["programs"]) for row in rows if row["programs"] < LIMITS[row["kernel"]].programs]
    assert not short
    assert not [label(row) for row in rows if row["shared"] > 227 * 1024]


def test_loads_are_wide(rows: list[dict[str, Any]]) -> None:
    reading = [row for row in rows if not row["filtered"]]  # survivors come one key at a time
    assert not [(label(row), row["vectors"]) for row in reading if row["vectors"] < LIMITS[row["kernel"]].vectors]


@pytest.mark.parametrize(("target", "instruction"), [(80, "HMMA"), (90, "HGMMA"), (100, "UTCHMMA")])
def test_products_run_on_tensor_cores(rows: list[dict[str, Any]], target: int, instruction: str) -> None:
    """The products on each architecture's own instruction, but for scores exact in float32; the small layers, 16 users
    high, on the common one."""
    products = {
        "linear_filter_fwd_kernel": ("bf16", "fp32"),
        "linear_scores_fwd_kernel": ("bf16",),
    }
    of_products = [row for row in rows if row["dtype"] in products.get(row["kernel"], ()) and row["target"] == target]
    assert of_products
    assert all(row["instructions"].get(instruction) for row in of_products)
    steps = [row for row in rows if row["kernel"] == "feedback_step_fwd_kernel" and row["target"] == target]
    assert all(row["instructions"].get("HMMA") for row in steps if row["dtype"] == "bf16")


def test_the_floor_is_in_reach(rows: list[dict[str, Any]]) -> None:
    """Of what streams or multiplies, a third of it: two passes over scores, of which the second compares and keeps."""
    rated = [row for row in rows if row["floor"] is not None]
    assert {row["kernel"] for row in rated} >= {
        "feedback_step_fwd_kernel", "linear_scores_fwd_kernel", "linear_nll_fwd_kernel", "row_bag_fwd_kernel",
    }  # fmt: skip
    assert not [(label(row), row["floor"]) for row in rated if not 0.33 <= row["floor"] <= 1]


def test_no_program_races_with_itself(rows: list[dict[str, Any]]) -> None:
    """Neither the interpreter nor a sanitizer looks for this one; it is read off the code."""
    assert not [(label(row), row["races"]) for row in rows if row["races"]]


LAYOUTS = """#wide = #ttg.blocked<{sizePerThread = [1], threadsPerWarp = [32], warpsPerCTA = [4], order = [0]}>
#tile = #ttg.blocked<{sizePerThread = [1, 1], threadsPerWarp = [1, 32], warpsPerCTA = [4, 1], order = [1, 0]}>
module {
tt.func public @kernel(%p_ptr: !tt.ptr<i32> loc("p_ptr"(#loc)), %q_ptr: !tt.ptr<i32> loc("q_ptr"(#loc)), %n: i32) {
"""
LOAD, STORE = "%x = tt.load %p_ptr : !tt.ptr<i32>\n", "tt.store %p_ptr, %n : !tt.ptr<i32>\n"
PLACES = """%s = tt.splat %p_ptr : !tt.ptr<i32> -> tensor<256x!tt.ptr<i32>, #wide>
%a = tt.addptr %s, %i : tensor<256x!tt.ptr<i32>, #wide>, tensor<256xi32, #wide>
%b = tt.addptr %s, %j : tensor<256x!tt.ptr<i32>, #wide>, tensor<256xi32, #wide>
"""
READ_B = "%z = tt.load %b : tensor<256x!tt.ptr<i32>, #wide>\n"
WRITE_A = "tt.store %a, %v : tensor<256x!tt.ptr<i32>, #wide>\n"


def reduction(of: str, to: str, axis: int) -> str:
    return (
        f'%r = "tt.reduce"(%v) <{{axis = {axis} : i32}}> ({{\n^bb0(%c: i32, %d: i32):\n}}) : ({of}) -> {to} loc(#l)\n'
    )


ACROSS = reduction("tensor<256xi32, #wide>", "i32", 0)
WITHIN = reduction("tensor<4x32xi32, #tile>", "tensor<4xi32, #ttg.slice<{dim = 1, parent = #tile}>>", 1)
TICKET = "%t = tt.atomic_rmw add, acq_rel, gpu, %q_ptr, %n, %true : (!tt.ptr<i32>, i32, i1) -> i32\n"


def maybe(body: str) -> str:
    return f"scf.if %n {{\n{body}}} loc(#l)\n"


@pytest.mark.parametrize(
    ("code", "races"),
    [
        (LOAD + STORE, True),
        (LOAD + "ttg.barrier all\n" + STORE, False),
        (LOAD + "gpu.barrier\n" + maybe(STORE), False),
        (LOAD + maybe("ttg.barrier all\n") + STORE, True),  # a branch that not every program takes
        (LOAD + "scf.if %n {\nttg.barrier all\n} else {\ngpu.barrier\n}\n" + STORE, False),
        (LOAD + STORE.replace("p_ptr", "q_ptr"), False),
        (LOAD + ACROSS + STORE, False),
        (LOAD + WITHIN + STORE, True),  # each warp by itself
        (LOAD + TICKET + STORE, True),  # nobody waits for the result
        (LOAD + TICKET + "tt.store %q_ptr, %t : !tt.ptr<i32>\n" + STORE, False),
        (PLACES + WRITE_A + TICKET, True),
        (PLACES + WRITE_A + "ttg.barrier all\n" + TICKET, False),
        (PLACES + WRITE_A + TICKET.replace("acq_rel", "relaxed"), False),
        (PLACES + WRITE_A + READ_B, True),
        (PLACES + READ_B.replace("%b", "%a") + WRITE_A, False),  # each thread its own
        ("scf.for %i = %n to %n step %n {\n" + PLACES + READ_B + "ttg.barrier all\n" + WRITE_A + "}\n", True),
        ("scf.for %i = %n to %n step %n {\n" + PLACES + READ_B + ACROSS + WRITE_A + "ttg.barrier all\n}\n", False),
    ],
)
def test_races_are_found(code: str, races: bool) -> None:
    found = runpy.run_path(str(Path(__file__).parent.parent / "kernels" / "races.py"))["races"]
    assert bool(found(LAYOUTS + code + "tt.return\n}\n}\n")) == races


def test_a_fault_is_seen(tmp_path: Path) -> None:
    """A kernel that keeps too much in registers is reported as spilling, one with odd strides as loading narrowly, and
    those without their barriers as racing.
    """
    pytest.importorskip("triton")
    code = tmp_path / "fault.py"
    code.write_text(
        "from unittest import mock\n"
        "import re\n"
        "from cfsfl_fast.kernels import report\n"
        "import importlib\n"
        "topk = importlib.import_module('cfsfl_fast.kernels.linear_topk')\n"
        "real = topk.selection\n"
        "wide = lambda k: {**real(k), 'LANES': 1 << 14, 'CAPACITY': 1 << 16}\n"
        "with mock.patch.object(topk, 'selection', wide):\n"
        "    row, = report.rows(['ml-20m'], ['bf16'], [90], ['linear_topk'])\n"
        "assert row.resources.spills > 0\n"
        "bag = importlib.import_module('cfsfl_fast.kernels.row_bag')\n"
        "with mock.patch.object(bag, 'vector', lambda *sizes: 1):\n"
        "    row, = report.rows(['ml-20m'], ['bf16'], [90], ['row_bag'])\n"
        "assert row.resources.loads('128') < 2\n"
        "real = report.races\n"
        "without = lambda code: real(re.sub(r'.*(ttg|gpu)[.]barrier.*', '', code))\n"
        "ops = [('ml-20m', 'fuse'), ('ml-20m', 'linear_nll'), ('ml-20m', 'linear_nll_backward'),\n"
        "       ('wide', 'linear_topk')]\n"
        "with mock.patch.object(report, 'races', without):\n"
        "    found = [row for shape, op in ops for row in report.rows([shape], ['bf16'], [90], [op])]\n"
        "racing = {row.kernel for row in found if row.resources.races}\n"
        "assert racing == {'fuse_fwd_kernel', 'linear_nll_fwd_kernel', 'linear_nll_bwd_kernel',\n"
        "                  'linear_topk_fwd_kernel', 'linear_filter_check_kernel'}, racing\n"
    )
    said_by(str(code))


def test_sizes_of_one_compile(tmp_path: Path) -> None:
    """What is 1 is a constant to the compiler, which refuses more then than the interpreter."""
    code = tmp_path / "ones.py"
    code.write_text(
        "import os, triton\n"
        "from unittest import mock\n"
        "from triton.backends.compiler import GPUTarget\n"
        "from cfsfl_fast.kernels import report\n"
        "one = dict.fromkeys('BHDVFK', 1)\n"
        "found = {}\n"
        "for dtype, filter_from in (('fp32', '2'), ('bf16', '1')):\n"
        "    os.environ['CFSFL_FILTER_FROM'] = filter_from\n"
        "    with mock.patch.multiple(report, **one):\n"
        "        for call in report.cases(1, report.DTYPES[dtype], 1).values():\n"
        "            for launch in report.record(call, 90):\n"
        "                source = report.source_of(launch)\n"
        "                found[source.hash()] = launch.kernel.fn.__name__, source, dict(launch.options)\n"
        "for name, source, options in found.values():\n"
        "    triton.compile(source, target=GPUTarget('cuda', 90, 32), options=options)\n"
        "print(*sorted({name for name, _, _ in found.values()}))\n"
    )
    assert set(said_by(str(code)).split()) == set(LIMITS)
