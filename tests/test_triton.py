"""The Triton kernels in Triton's interpreter, each file in a process of its own: the files `triton_*`, and what
`test_compiling` asks of every backend.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

HERE = Path(__file__).parent
FILES = *sorted(path.stem for path in HERE.glob("triton_*.py")), "test_compiling"

OLD_INTERPRETER = importlib.util.find_spec("triton") is not None and (
    importlib.metadata.version("triton").startswith("3.6.") and np.lib.NumpyVersion(np.__version__) >= "2.4.0"
)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.skipif(OLD_INTERPRETER, reason="the interpreter of Triton 3.6 needs NumPy before 2.4")
@pytest.mark.parametrize("file", FILES)
def test_kernels_in_the_interpreter(file: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--durations=5", "-k", "triton",
         f"tests/{file}.py"],
        env={**os.environ, "TRITON_INTERPRET": "1"}, cwd=HERE.parent, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
