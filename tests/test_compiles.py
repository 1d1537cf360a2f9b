"""The kernels as machine code at production sizes, without a GPU: no spills, room for enough programs, wide loads,
tensor cores.

CFSFL_ALL_TARGETS=1 compiles the full product of sizes, dtypes and architectures instead of the covering choice below.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
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


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    """The resource report of every combination, made in processes without the interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    found = []
    for shape, dtype, target in COMBINATIONS:
        done = subprocess.run(
            [sys.executable, "-m", "cfsfl_fast.kernels.report", "--json",
             "--shape", shape, "--dtype", dtype, "--target", str(target)],
            env=environment, cwd=Path(__file__).parent.parent, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-4000:]
        found += json.loads(done.stdout)
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


def test_a_fault_is_seen(tmp_path: Path) -> None:
    """A kernel that keeps too much in registers is reported as spilling; one with odd strides as loading narrowly."""
    pytest.importorskip("triton")
    code = tmp_path / "fault.py"
    code.write_text(
        "from unittest import mock\n"
        "import sys\n"
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
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(code)], env={**environment, "PYTHONPATH": str(Path(__file__).parent.parent)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
