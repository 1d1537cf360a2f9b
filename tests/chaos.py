"""Kills prepare, save, recommend and train while they write; proves that nothing is lost and nothing half is read.

    make chaos                                      # python -m tests.chaos
    python -m tests.chaos --kills 5 --steps 5       # of every operation: a shorter one

Two kinds of kill -9: at random moments, and right before a step on the file system (an audit hook counts every open of
a staged file, rename, mkdir, remove, lock and fsync). While the operation runs, and after its death, a reader opens
what it writes, again and again: whatever it finds must be a version that was written whole. Then the operation runs to
its end: the files must be the bytes that it leaves when nobody kills it, with nothing beside them.

An operation runs in a fork of this process, so that a kill meets its work and not its imports; or in two forks that
share the users (-2) or the rows of item tables (-parts), of which one is killed, or both. Whoever is left must end by
itself and say that it lost the other.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # no pool of threads, which would not survive a fork

import hashlib
import json
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from cfsfl_fast import CFSFL, checkpoint, cli
from cfsfl_fast.datasets import open_dataset
from cfsfl_fast.runs import METRICS, REPORT, STATE
from tests.conftest import clusters
from tests.processes import environment, free_port

SIZES = {"steps": 2, "top_k": 6, "hidden_dim": 24, "latent_dim": 8, "lookup_dim": 8, "feedback_dim": 8}
TRAINING = {**SIZES, "batch_size": 32, "epochs": "3,2,2", "learning_rate": 1e-2, "joint_learning_rate": 3e-3}
PATIENCE = 300.0
"""Seconds after which a child hangs."""

Found = dict[str, str]
"""A digest of the content of each thing that can be opened alone."""


class WrongError(Exception):
    """What must never happen."""


# A process that lives as long as it may


class Child:
    """A fork that carries out an action.

    Args:
        act: the action.
        log: where its output goes.
        seconds: kill it after so long.
        step: it kills itself before this step on the file system.
        watch: called after every rename; what it finds is logged.
        environ: environment variables of its own.
    """

    def __init__(
        self,
        act: Callable[[], Any],
        log: Path,
        *,
        seconds: float | None = None,
        step: int | None = None,
        watch: Callable[[], Found] | None = None,
        environ: dict[str, str] | None = None,
    ) -> None:
        self.log, self.code = log, None
        self.pid = os.fork()
        if self.pid == 0:
            os.environ.update(environ or {})
            self._live(act, step, watch)
        self.handle = os.pidfd_open(self.pid)  # a number that is never another process's
        self.timer = threading.Timer(PATIENCE if seconds is None else seconds, self._kill)
        self.timer.start()

    def ended(self) -> bool:
        """Whether it is over."""
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
                self.timer.cancel()
                self.timer.join()
                os.close(self.handle)
        return self.code is not None

    def was_killed(self) -> bool:
        """False where it came to its end first. An end in an error is wrong."""
        while not self.ended():
            time.sleep(0.001)
        if self.code not in (0, -signal.SIGKILL):
            raise WrongError(f"exit code {self.code}: {self.log.read_text()[-600:]}")
        return self.code != 0

    def _kill(self) -> None:
        signal.pidfd_send_signal(self.handle, signal.SIGKILL)

    def _live(self, act: Callable[[], Any], step: int | None, watch: Callable[[], Found] | None) -> None:
        code = 1
        try:
            log = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 1)
            os.dup2(log, 2)
            steps = Steps(step)
            if watch is not None:
                steps.after_renames(lambda: os.write(1, f"\n{json.dumps(watch())}\n".encode()))
            act()
            sys.stdout.flush()
            os.write(1, f"\n{json.dumps(steps.taken)}\n".encode())
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        except BaseException:
            os.write(2, traceback.format_exc().encode())
        finally:
            os._exit(code)


class Pair:
    """Two children that work together; as a `Child`, but that `who` says which of them is killed: 0, 1, or both (2)."""

    LOST = ("lost the others", "did not find each other")

    def __init__(
        self,
        act: Callable[[], Any],
        log: Path,
        *,
        who: int = 2,
        watch: Callable[[], Found] | None = None,
        **moment: Any,
    ) -> None:
        port = free_port()
        self.doomed = [who in (rank, 2) and bool(moment) for rank in (0, 1)]
        self.children = [
            Child(
                act,
                log if rank == 0 else log.with_suffix(".1.log"),
                environ=environment(rank, 2, port, CFSFL_TIMEOUT="30"),
                watch=watch,
                **(moment if self.doomed[rank] else {}),
            )
            for rank in (0, 1)
        ]

    def ended(self) -> bool:
        """Whether both are over."""
        return all([child.ended() for child in self.children])

    def was_killed(self) -> bool:
        """False where both came to their end first."""
        while not self.ended():
            time.sleep(0.001)
        codes = [child.code for child in self.children]
        for child, doomed, other in zip(self.children, self.doomed, codes[::-1], strict=True):
            killed, said = child.code == -signal.SIGKILL, child.log.read_text()
            left = child.code == 2 and other != 0 and any(words in said for words in self.LOST)
            if not (child.code == 0 or left or (killed and doomed)):
                how = "hangs" if killed else f"ends with code {child.code}"
                raise WrongError(f"one {how} where the other ends with {other}: {said[-600:]}")
        return codes != [0, 0]


class Steps:
    """Counts this process's steps on the file system, and kills it before a given one."""

    EVENTS = ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.chmod", "os.scandir", "os.listdir", "fcntl.flock")

    def __init__(self, last: int | None) -> None:
        self.taken, self.last = 0, last
        sync = os.fsync

        def fsync(handle: int) -> None:
            self._step()
            sync(handle)

        os.fsync = fsync
        sys.addaudithook(self._hear)

    def after_renames(self, call: Callable[[], Any]) -> None:
        """Calls something after every os.replace."""
        replace = os.replace

        def replaced(source: Any, target: Any) -> None:
            replace(source, target)
            call()

        os.replace = replaced  # type: ignore[assignment]

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        staged = event == "open" and ".partial-" in str(arguments[0])
        if staged or event in self.EVENTS or (event == "ctypes.dlsym" and arguments[1] == "renameat2"):
            self._step()

    def _step(self) -> None:
        if self.taken == self.last:
            os.kill(os.getpid(), signal.SIGKILL)
        self.taken += 1


# What is killed


@dataclass
class Operation:
    """Writes version 0 or 1 to a place.

    Attributes:
        act: writes a version; called again after a kill, goes on or begins again.
        read: what a reader finds at the place, {} where nothing stands.
        resumes: it goes on.
        child: who carries it out.
        share: of the kills that others get; it takes longer.
        whole: what a reader may find of each version.
        bytes: the files of each version.
        seconds, n_steps: that it takes.
    """

    name: str
    place: Path
    act: Callable[[int], Any]
    read: Callable[[], Found]
    resumes: bool = False
    child: type[Child] | type[Pair] = Child
    share: float = 1.0
    whole: list[set[tuple[str, str]]] = field(default_factory=list)
    bytes: list[Found] = field(default_factory=list)
    seconds: float = 0.0
    n_steps: int = 0

    def learn(self) -> None:
        """Writes both versions, twice, with nobody killed."""
        for version in (0, 1):
            remove(self.place)
            self.child(lambda v=version: self.act(v), self.log, watch=self.read).was_killed()
            found = [json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{")]
            self.whole.append({item for each in (*found, self.read()) for item in each.items()})
            self.bytes.append(digests(self.place.parent))
            remove(self.place)
            began = time.perf_counter()
            self.child(lambda v=version: self.act(v), self.log).was_killed()
            self.seconds = time.perf_counter() - began
            self.compare(version)
        if self.whole[0] & self.whole[1] == self.whole[0]:
            raise WrongError("the two versions are one")
        self.n_steps = json.loads(self.log.read_text().splitlines()[-1])

    @property
    def log(self) -> Path:
        """The output of the last child."""
        return self.place.parent.with_suffix(".log")

    def look(self, allowed: set[tuple[str, str]], stood: bool) -> Found:
        """What a reader finds.

        Raises:
            WrongError: something that was never written whole, or nothing where something stood.
        """
        try:
            found = self.read()
        except Exception as error:
            raise WrongError(f"a reader fails: {error!r}") from error
        if stood and not found:
            raise WrongError("what stood there is gone")
        if strange := set(found.items()) - allowed:
            raise WrongError(f"a reader finds what nobody wrote: {sorted(strange)[0]}")
        return found

    def compare(self, version: int) -> None:
        """Compares the files with those of a version that nobody disturbed."""
        if (found := digests(self.place.parent)) != self.bytes[version]:
            names = sorted({name for name, _ in found.items() ^ self.bytes[version].items()})
            raise WrongError(f"after the end these files differ, are missing or left over: {', '.join(names)}")


def digests(folder: Path) -> Found:
    """The bytes of everything below a folder."""
    found = {}
    for path in sorted(folder.rglob("*")):
        content = b"" if path.is_dir() else path.read_bytes()
        if path.name == METRICS:
            content = json.dumps(_lines(path)).encode()
        found[str(path.relative_to(folder))] = digest(content)
    return found


def _lines(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without the times that they tell."""
    lines = [json.loads(line) for line in path.read_bytes().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "users_per_second")} for line in lines]


def digest(*contents: bytes | np.ndarray | torch.Tensor) -> str:
    """Of all that is given, in order."""
    sha = hashlib.sha256()
    for content in contents:
        sha.update(content if isinstance(content, bytes) else np.ascontiguousarray(content).tobytes())
    return sha.hexdigest()


def remove(place: Path) -> None:
    """Nothing stands at a place then."""
    if place.is_dir():
        shutil.rmtree(place)
    place.unlink(missing_ok=True)


# The operations


def operations(folder: Path) -> Iterator[Operation]:
    """Prepare, save, recommend, train, on small data below a folder; the last two also in two processes."""

    def command(*arguments: Any) -> None:
        if code := cli.main([str(argument) for argument in arguments], standalone_mode=False):
            sys.exit(code)

    def place(name: str) -> Path:
        (folder / name).mkdir()
        return folder / name / name

    raw, data = [], []
    for version in (0, 1):
        raw.append(folder / f"ratings-{version}.csv")
        users, items = clusters(160 + 40 * version, seed=version).nonzero()
        rows = "".join(f"{u + 1},{i + 1},4.5,0\n" for u, i in zip(users, items, strict=True))
        raw[-1].write_text("userId,movieId,rating,timestamp\n" + rows)
        data.append(folder / f"data-{version}")
        Child(lambda v=version: command("prepare", raw[v], "--out", data[v]), folder / "log").was_killed()

    def read_data(at: Path) -> Found:
        if not at.exists():
            return {}
        opened = open_dataset(at)
        opened.validate()
        matrices = [a for m in opened.matrices().values() for a in (m.indptr, m.indices)]
        return {"data": digest(*matrices, *opened.ids().values(), json.dumps(opened.report).encode())}

    for name, more in (("prepare", []), ("prepare-disk", ["--on-disk"])):
        out = place(name)
        arguments = ["--out", out, "--overwrite", *more]
        yield Operation(
            name,
            out,
            lambda v, arguments=arguments: command("prepare", raw[v], *arguments),
            lambda at=out: read_data(at),
        )

    saved = place("save")
    models = []
    for version in (0, 1):
        torch.manual_seed(version)
        models.append(CFSFL(40, **SIZES))
        models[-1].item_ids = np.arange(40) + version

    def read_model(at: Path) -> Found:
        if not (at / checkpoint.MODEL).exists():
            return {}
        model = CFSFL.from_pretrained(at)
        assert model.item_ids is not None
        return {at.name: digest(*(p.detach().numpy() for p in model.state_dict().values()), model.item_ids)}

    yield Operation("save", saved, lambda v: models[v].save_pretrained(saved), lambda: read_model(saved))

    for version, model in enumerate(models):
        model.save_pretrained(folder / f"model-{version}")
    (folder / "history.csv").write_text("".join(f"user{n % 50},{1 + n % 37}\n" for n in range(400)))

    def read_lists(at: Path) -> Found:
        if not at.exists():
            return {}
        text = at.read_bytes()
        assert text.startswith(b"user,item,rank,score\n")
        assert all(line.count(b",") == 3 for line in text.splitlines())
        return {"lists": digest(text)}

    history = ["--history", folder / "history.csv", "--device", "cpu"]
    for name, more in (("recommend", []), ("recommend-2", []), ("recommend-parts", ["--item-shards=2"])):
        listed = place(name)
        yield Operation(
            name,
            listed,
            lambda v, to=listed, more=more: command("recommend", folder / f"model-{v}", *history, "--out", to, *more),
            lambda at=listed: read_lists(at),
            child=Child if name == "recommend" else Pair,
            share=1.0 if name == "recommend" else 0.25,
        )

    options = [f"--{name.replace('_', '-')}={value}" for name, value in TRAINING.items()]

    def read_run(run: Path) -> Found:
        found = {}
        for at in (run, *run.glob("stages/*")):
            found |= read_model(at)
        if (run / STATE).exists():
            tensors, metadata = checkpoint.read_tensors(run / STATE)
            found[STATE] = digest(*(t.numpy() for t in tensors.values()), metadata["progress"].encode())
        if (run / METRICS).exists():
            found[METRICS] = digest(json.dumps(_lines(run / METRICS)).encode())
        if (run / REPORT).exists():
            found[REPORT] = digest(json.dumps(checkpoint.read_json(run / REPORT)).encode())
        return found

    for name, more in (("train", []), ("train-2", []), ("train-parts", ["--item-shards=2"])):
        run = place(name)
        arguments = ["--out", run, "--resume", "--device", "cpu", *options, *more]
        yield Operation(
            name,
            run,
            lambda v, arguments=arguments: command("train", data[v], *arguments),
            lambda at=run: read_run(at),
            resumes=True,
            child=Child if name == "train" else Pair,
            share=1.0 if name == "train" else 0.5,
        )


# The kills


@dataclass
class Tally:
    """What came of the kills of one operation."""

    outcomes: Counter[str] = field(default_factory=Counter)
    reads: int = 0
    wrong: list[str] = field(default_factory=list)


def chain(op: Operation, version: int, older: int | None, moments: Iterator[dict[str, Any]], tally: Tally) -> None:
    """Writes a version over an older one (or none); kills it at a moment, or, where it resumes, at one after another
    until it comes to its end before.
    """
    if older is None:
        remove(op.place)
    allowed = op.whole[version] | (set() if older is None else op.whole[older])
    stood = older is not None
    for moment in moments:
        child = op.child(lambda: op.act(version), op.log, **moment)
        while not child.ended():
            stood |= bool(op.look(allowed, stood))
            tally.reads += 1
            time.sleep(0.0005)
        killed = child.was_killed()
        found = set(op.look(allowed, stood).items())
        if not killed:
            break
        finished = found and found <= op.whole[version] and (not op.resumes or any(n == REPORT for n, _ in found))
        tally.outcomes["newer" if finished else "older" if found else "nothing"] += 1
        if not op.resumes:
            break
    if op.child(lambda: op.act(version), op.log).was_killed():
        raise WrongError(f"it hangs: {op.log.read_text()[-600:]}")
    op.compare(version)


def torment(op: Operation, kills: int, steps: int, seed: int) -> Tally:
    """Kills an operation so many times at random moments, and before so many steps."""
    chance = random.Random(f"{seed} {op.name}")
    op.learn()
    tally = Tally()

    def some() -> dict[str, Any]:
        """Which of two."""
        return {} if op.child is Child else {"who": chance.randrange(3)}

    def at_random() -> Iterator[dict[str, Any]]:
        while True:
            yield {"seconds": chance.uniform(0, op.seconds), **some()}

    def before_steps() -> Iterator[dict[str, Any]]:
        every = list(range(op.n_steps))
        while True:
            yield from ({"step": step, **some()} for step in chance.sample(every, len(every)))

    standing: int | None = None
    for wanted, moments in ((kills, at_random()), (steps, before_steps())):
        wanted += tally.outcomes.total()
        while tally.outcomes.total() < wanted and len(tally.wrong) < 3:
            version = chance.randrange(2) if standing is None or op.resumes else 1 - standing
            if op.resumes or chance.random() < 0.3:
                standing = None
            try:
                chain(op, version, standing, moments, tally)
                standing = version
            except WrongError as error:
                tally.wrong.append(f"{op.name}, seed {seed}, after {tally.outcomes.total()} kills: {error}")
                remove(op.place.parent)
                op.place.parent.mkdir()
                standing = None
    return tally


@click.command()
@click.option("--kills", default=40, help="Of each operation, at random moments.")
@click.option("--steps", default=60, help="Of each operation, before steps on the file system.")
@click.option("--seed", default=0, help="Of the moments.")
@click.option("--only", multiple=True, help="One operation; repeat for more.")
def main(kills: int, steps: int, seed: int, only: tuple[str, ...]) -> None:
    """Kills every operation; prints what came of it; exit code 1 where anything was lost or half read."""
    began = time.perf_counter()
    columns = ("kills", "nothing", "older", "newer", "reads", "wrong")
    click.echo(f"{'':<16}{'steps':>6}" + "".join(f"{name:>10}" for name in columns))
    total: Counter[str] = Counter()
    wrong: list[str] = []
    with tempfile.TemporaryDirectory(prefix="cfsfl-chaos-") as folder:
        for op in operations(Path(folder)):
            if only and op.name not in only:
                continue
            tally = torment(op, *(max(1, round(op.share * n)) for n in (kills, steps)), seed)
            row = Counter(
                {**tally.outcomes, "kills": tally.outcomes.total(), "reads": tally.reads, "wrong": len(tally.wrong)}
            )
            click.echo(f"{op.name:<16}{op.n_steps:>6}" + "".join(f"{row[name]:>10,}" for name in columns))
            total += row
            wrong += tally.wrong
    click.echo(f"{'together':<22}" + "".join(f"{total[name]:>10,}" for name in columns))
    click.echo(
        "after every kill: what then stood at the place (for train, older is a run to go on with); reads: while it ran"
        f"; {time.perf_counter() - began:.0f} s, seed {seed}"
    )
    for line in wrong:
        click.echo(line, err=True)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
