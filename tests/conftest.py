"""Shared by all tests: poisoned memory, real data where it is, a small data set with a known answer."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from cfsfl_fast.datasets import Dataset, Protocol, save_dataset, split_events
from cfsfl_fast.datasets.matrices import matrix_events

if TYPE_CHECKING:  # the machine of `make gpu` has not what a run's files need
    from cfsfl_fast.runs import Run

ROOT = Path(__file__).resolve().parent.parent

try:
    from hypothesis import settings
except ImportError:  # on the machine of `make gpu`, whose tests need none
    settings = None
else:
    settings.register_profile("fuzz", max_examples=1000, deadline=20_000, print_blob=True)
    """What `make fuzz` takes, other inputs every time: for hours, `--hypothesis-profile` with another of one's own."""
    settings.register_profile("suite", derandomize=True)
    """The same inputs every time, or a run of the suite would fail by chance."""
    settings.load_profile("suite")

tally: Counter[tuple[str, str]] = Counter()
"""Bad inputs by (what was fed, what came of it); told at the end of `make fuzz`."""


def effort(share: float = 1.0) -> int:
    """How many inputs a test makes: a share of what hypothesis's profile says, 100 by default."""
    return max(1, round(share * (settings.default.max_examples if settings else 100)))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The tally, after more than the usual effort."""
    if effort() <= 100 or not tally:
        return
    terminalreporter.section("bad inputs")
    outcomes = sorted({outcome for _, outcome in tally})
    terminalreporter.write_line(f"{'':<36}{'inputs':>10}" + "".join(f"{outcome:>12}" for outcome in outcomes))
    for fed in (*dict.fromkeys(fed for fed, _ in tally), None):
        row = [sum(n for (f, o), n in tally.items() if fed in (f, None) and o == outcome) for outcome in outcomes]
        counts = "".join(f"{n:>12,}" for n in row)
        terminalreporter.write_line(f"{fed or 'together':<36}{sum(row):>10,}{counts}")


@pytest.fixture(scope="session", autouse=True)
def poisoned_memory() -> None:
    """torch.empty gives NaN, so that a result nobody wrote is seen."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what torch asks for on a GPU then
    torch.use_deterministic_algorithms(True)


@pytest.fixture(autouse=True)
def denormals() -> Iterator[None]:
    """A command that a test runs in this process flushes them from then on; the next test has them again."""
    yield
    torch.set_flush_denormal(False)


@pytest.fixture(scope="session")
def real_data() -> Callable[[str], Path]:
    """The path of a real data file; skips the test where the file is not."""

    def find(name: str) -> Path:
        folder = Path(os.environ.get("CFSFL_DATA", ROOT.parent / "shared" / "data"))
        if not (folder / name).exists():
            pytest.skip(f"{name} is not here; CFSFL_DATA names the folder that has it")
        return folder / name

    return find


def stop_at(run: Run, n: int) -> None:
    """Trains a run until it is interrupted, right after it saved its state for the n-th time."""
    done, save = [], run.save_state

    def save_and_stop() -> None:
        save()
        done.append(1)
        if len(done) == n:
            raise KeyboardInterrupt

    run.save_state = save_and_stop  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        run.train()


def clusters(n_users: int = 160, n_items: int = 40, n_clusters: int = 4, seed: int = 0) -> sp.csr_matrix:
    """Users who have most items of their own cluster and none of another: what they miss is the rest of it."""
    random = np.random.default_rng(seed)
    users = np.arange(n_users)[:, None] % n_clusters
    own = users == (np.arange(n_items) % n_clusters)[None, :]
    return sp.csr_matrix((own & (random.random((n_users, n_items)) < 0.7)).astype(np.float32))


@pytest.fixture(scope="session")
def toy() -> Dataset:
    """`clusters`, split by users."""
    return split_events(matrix_events(clusters(), "clusters"), Protocol(held_out=20))


@pytest.fixture(scope="session")
def toy_folder(toy: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`toy`, prepared on disk."""
    folder = tmp_path_factory.mktemp("toy") / "data"
    save_dataset(toy, folder)
    return folder
