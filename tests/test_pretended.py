"""`pretended_cases`, in a process of its own."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest
from torch.utils import backend_registration

from tests.conftest import ROOT


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"), reason="needs PyTorch 2.10 or newer"
)
def test_graphs_stay_on_their_device() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/pretended_cases.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
