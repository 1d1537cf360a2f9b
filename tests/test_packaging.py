"""What is shipped is whole: the sdist builds, the wheel runs from anywhere, a machine without a compiler too."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from cfsfl_fast import __version__
from tests.conftest import ROOT

PROGRAM = """
import sys
from pathlib import Path
# An editable install of the checkout must not lend the wheel what it lacks.
sys.meta_path = [finder for finder in sys.meta_path if "__editable__" not in getattr(finder, "__module__", "")]
import numpy as np
import cfsfl_fast, cfsfl_fast.datasets, cfsfl_fast.cli
from cfsfl_fast import backends
assert (Path(cfsfl_fast.__file__).parent / "kernels" / "feedback_step.py").exists()
model = cfsfl_fast.CFSFL(30, steps=2, top_k=5)
ids, scores = model.recommend(np.eye(4, 30), n=3)
assert ids.shape == (4, 3)
print(cfsfl_fast.__file__, backends.resolve(model.device))
"""


def run(command: list[str], folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sdist, unpacked."""
    folder = tmp_path_factory.mktemp("sdist")
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if files.returncode or not files.stdout:
        pytest.skip("the sdist is made from a git checkout")
    copy = folder / "checkout"
    for name in files.stdout.splitlines():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_symlink():
            (copy / name).symlink_to(os.readlink(ROOT / name))
        elif (ROOT / name).exists():
            (copy / name).write_bytes((ROOT / name).read_bytes())
    run([sys.executable, "setup.py", "--quiet", "sdist", "--dist-dir", str(folder)], copy)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return folder / archive.name.removesuffix(".tar.gz")


def test_the_sdist_is_whole(source: Path) -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    missing = [name for name in tracked if not (source / name).exists()]
    assert missing == ["cfsfl_fast/kernels"], "all but the link of a checkout, for which package-dir stands"


def wheel(source: Path, out: Path, **environment: str) -> tuple[Path, str]:
    """A wheel of the sdist, unpacked, and what its build said."""
    source = Path(shutil.copytree(source, out / "source"))
    command = [sys.executable, "-m", "pip", "wheel", "-v", ".", "--no-deps", "--no-build-isolation", "-w", str(out)]
    done = run(command, source, **environment)
    (archive,) = out.glob("*.whl")
    assert f"-{__version__}-" in archive.name
    with zipfile.ZipFile(archive) as zipped:
        zipped.extractall(out / "site")
    return out / "site", done.stdout + done.stderr


def test_a_wheel_runs_from_anywhere_with_its_kernels(source: Path, tmp_path: Path) -> None:
    site, _ = wheel(source, tmp_path)
    assert list((site / "cfsfl_fast").glob("_cpp*.so"))
    assert (site / "cfsfl_fast" / "py.typed").exists()
    done = run([sys.executable, "-c", PROGRAM], tmp_path, PYTHONPATH=str(site))
    assert done.stdout.split() == [str(site / "cfsfl_fast" / "__init__.py"), "cpp"]


def test_a_machine_without_a_compiler_installs_and_works(source: Path, tmp_path: Path) -> None:
    site, said = wheel(source, tmp_path, CC="/nowhere/cc", CXX="/nowhere/c++")
    assert not list((site / "cfsfl_fast").glob("_cpp*.so"))
    assert said.count("the C++ kernels were not built") == 1
    done = run([sys.executable, "-c", PROGRAM], tmp_path, PYTHONPATH=str(site))
    assert done.stdout.split()[1] == "torch"
    assert done.stderr.count("the cpp kernels are missing") == 1
    assert len(done.stderr.strip().splitlines()) == 1
