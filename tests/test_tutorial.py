"""The tutorial works as it is printed: its blocks run one after the other in an empty folder."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

BLOCK = re.compile(r"^```(python|sh)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def test_the_tutorial_runs(tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="pip install scikit-learn")
    blocks = BLOCK.findall((ROOT / "docs" / "tutorial.md").read_text())
    assert len(blocks) >= 12
    lines = ["import subprocess"]
    for language, text in blocks:
        lines.append(text if language == "python" else f"subprocess.run(['sh', '-ec', {text!r}], check=True)")
    (tmp_path / "tutorial.py").write_text("\n".join(lines))
    commands = tmp_path / "bin"
    commands.mkdir()
    (commands / "cfsfl").write_text(f'#!/bin/sh\nexec {sys.executable} -m cfsfl_fast "$@"\n')
    (commands / "cfsfl").chmod(0o755)
    environment = {**os.environ, "PATH": f"{commands}:{os.environ['PATH']}"}
    done = subprocess.run(
        [sys.executable, "tutorial.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for said in ("CF-SFL minus", "NDCG@100", "ann,i", "because of item", "kl_gamma", "model.pt2"):
        assert said in done.stdout, said
    assert "Warning" not in done.stderr


def test_the_readmes_examples_run(tmp_path: Path) -> None:
    blocks = [text for language, text in BLOCK.findall((ROOT / "README.md").read_text()) if language == "python"]
    assert len(blocks) == 2
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(blocks)], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "model.safetensors").exists()


def test_links_of_the_documentation_lead_somewhere() -> None:
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "kernels").glob("*.md")]
    links = [(page, link) for page in pages for link in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text())]
    assert len(links) > 5
    for page, link in links:
        assert link.startswith("https://") or (page.parent / link).exists(), f"{page.name}: {link}"


def test_every_variable_is_documented() -> None:
    documented = (ROOT / "docs" / "environment.md").read_text()
    files = [f for folder in ("cfsfl_fast", "kernels", "csrc", "tests", "benches") for f in (ROOT / folder).rglob("*")]
    files = [f for f in files if f.suffix in (".py", ".cpp", ".h", ".sh")]
    named = {name for f in files for name in re.findall(r"\"(CFSFL_[A-Z_]+)\"", f.read_text())}
    assert len(named) >= 5
    for name in sorted(named):
        assert f"`{name}`" in documented, name
