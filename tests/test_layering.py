"""The arrows between modules point down, read off the syntax trees."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from tests.conftest import ROOT

PACKAGE = ROOT / "cfsfl_fast"
ALLOWED = {
    "cli": {"baselines", "checkpoint", "files", "backends", "config", "datasets", "distributed", "evaluation", "model"}
    | {"callbacks", "numerics", "runs", "experiments", "export", "plan", "plots", "reproduce", "scarcity", "serving"}
    | {"sweep", "tables"},
    "plan": {"config", "item_item", "library", "model"},
    "reproduce": {"baselines", "config", "datasets", "experiments", "tables"},
    "tables": {"experiments"},
    "experiments": {
        "arrays",
        "backends",
        "baselines",
        "checkpoint",
        "config",
        "datasets",
        "evaluation",
        "files",
        "runs",
    }
    | {"model", "progress"},
    "sweep": {"backends", "datasets", "evaluation", "model"},
    "plots": {"files"},
    "callbacks": {"stages"},
    "scoring": {"datasets", "interactions", "model"},
    "serving": {"backends", "interactions", "model"},
    "export": {"backends", "files", "interactions", "model", "ops"},
    "runs": {"checkpoint", "files", "backends", "baselines", "config", "datasets", "distributed", "evaluation"}
    | {"interactions", "metrics", "model", "plan", "resharding", "scarcity", "sharded", "stages", "updates"},
    "stages": {"backends", "config", "datasets", "distributed", "evaluation", "interactions", "metrics", "model"}
    | {"folds", "progress", "scarcity", "sharded", "training", "updates"},
    "row_adam": {"noise"},
    "updates": {"backends", "distributed", "graphs", "interactions", "losses", "model"}
    | {"folds", "lookups", "noise", "recommenders", "row_adam", "training"},
    "training": {"config", "distributed", "interactions", "judging", "losses", "model"}
    | {"folds", "noise", "ops", "recommenders", "virtual_user"},
    "estimator": {"ops", "config", "evaluation", "holdout", "interactions", "metrics", "model", "stages"} | {"updates"},
    "holdout": {"datasets", "interactions"},
    "evaluation": {"distributed", "metrics", "interactions", "progress", "scarcity"},
    "baselines": {"progress", "datasets", "evaluation", "interactions", "item_item", "ops"},
    "model": {"backends", "checkpoint", "graphs", "judging", "ops", "config", "interactions", "loop", "memory"}
    | {"distributed", "item_rows", "numerics", "recommenders", "resharding", "scarcity", "sharded", "virtual_user"},
    "resharding": {"checkpoint", "distributed", "files", "sharded"},
    "folds": {"interactions", "model", "noise"},
    "judging": {"distributed", "interactions", "losses", "memory", "ops"},
    "memory": {"interactions", "item_item", "ops"},
    "item_item": {"progress", "scarcity"},
    "loop": {"ops", "recommenders", "virtual_user"},
    "losses": set(),
    "recommenders": {"item_rows", "ops"},
    "virtual_user": {"item_rows"},
    "ops": {"compiling", "library", "lookups", "reference"},
    "lookups": {"compiling", "library", "sharded"},
    "sharded": {"distributed", "library"},
    "compiling": {"backends", "operators"},
    "operators": {"backends", "library"},
    "backends": {"cpp", "kernels", "library", "reference", "sharded"},
    "cpp": {"library", "_cpp"},
    "metrics": {"interactions"},
    "checkpoint": {"arrays", "config", "files"},
    "testing": {"backends", "library", "reference", "ops", "interactions"},
    "adapters": {"config", "estimator", "interactions", "model", "stages"},
    "__init__": {"config", "estimator", "model"},
    "__main__": {"cli"},
}


def imports(path: Path) -> set[str]:
    """The modules of the package that a file imports, by their first name."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            if node.module == "cfsfl_fast":
                found |= {alias.name for alias in node.names}
            elif node.module.startswith("cfsfl_fast."):
                found.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("cfsfl_fast.")}
    return found


FILES = {path.stem: path for path in PACKAGE.glob("*.py")}
MEMBERS = [
    path
    for package in ("adapters", "baselines", "cli", "ops", "recommenders")
    for path in sorted((PACKAGE / package).glob("*.py"))
]


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_module_imports_what_stands_below_it(name: str) -> None:
    assert imports(FILES[name]) <= ALLOWED.get(name, set()), f"{name} may import {sorted(ALLOWED.get(name, set()))}"


@pytest.mark.parametrize("path", MEMBERS, ids=lambda path: f"{path.parent.name}.{path.stem}")
def test_a_member_of_a_package_imports_what_stands_below_the_package(path: Path) -> None:
    assert imports(path) <= ALLOWED[path.parent.name] | {path.parent.name}


def test_there_is_no_circle() -> None:
    graph = {name: imports(path) for name, path in FILES.items() if name != "__init__"}
    for path in MEMBERS:
        graph[path.parent.name] = graph.get(path.parent.name, set()) | (imports(path) - {path.parent.name})
    list(TopologicalSorter(graph).static_order())


@pytest.mark.parametrize("folder", ["datasets", "kernels"])
def test_packages_stand_alone(folder: str) -> None:
    for path in (PACKAGE / folder).glob("*.py"):
        assert imports(path) <= {folder, "arrays", "library", "files"}, path.name


def test_only_ops_knows_the_specification() -> None:
    users = {name for name, path in FILES.items() if "reference" in imports(path)}
    assert users <= {"backends", "ops", "testing"}


def test_no_pickle_anywhere() -> None:
    for path in [*PACKAGE.rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]:
        text = path.read_text()
        assert "import pickle" not in text, path
        assert "torch.load(" not in text, path
        assert "allow_pickle=True" not in text, path
