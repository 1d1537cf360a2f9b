"""Processes that work on one model, as `torchrun` starts them, and the few sums and messages that they need.

Without torchrun there is one process, and nothing here communicates. Gradients come from `torch.autograd.grad` with
hand-written sparse sinks, not from `.backward()` on leaves, so `DistributedDataParallel`, whose reduction hangs on the
accumulation into `.grad`, would never be reached: gradients are summed here, the tables in place and one by one (their
transfers overlap), everything small in one buffer.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

SMALL = 1 << 18
"""Entries below which a tensor travels in the buffer of the small ones: a message of less is all latency."""

TIMEOUT = "CFSFL_TIMEOUT"
"""Environment variable: seconds until a process that does not answer counts as lost."""

T = TypeVar("T")


class ProcessError(RuntimeError):
    """Another process stopped, or does not answer."""


def span(n: int, part: int, parts: int) -> tuple[int, int]:
    """Where part number `part` (from 0) of n things begins and ends; parts differ by one at most."""
    return n * part // parts, n * (part + 1) // parts


class Group:
    """Processes that share work; this is number `rank` of `size`.

    Args:
        handle: of torch.distributed; None for a process alone.
        device: where messages are made: a CUDA device for nccl.
    """

    def __init__(self, handle: dist.ProcessGroup | None = None, device: torch.device | str = "cpu") -> None:
        self._handle, self._device = handle, torch.device(device)
        self.rank, self.size = (0, 1) if handle is None else (dist.get_rank(handle), dist.get_world_size(handle))

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and talks to people."""
        return self.rank == 0

    def span(self, n: int) -> tuple[int, int]:
        """Where this process's part of n things begins and ends; parts differ by one at most."""
        return span(n, self.rank, self.size)

    def part(self, values: Tensor, nobody: float) -> Tensor:
        """This process's part of a value per user, `nobody` where it has no users: no operation is one of none."""
        if self.size == 1:
            return values
        begin, end = self.span(len(values))
        return values[begin:end] if end > begin else torch.full_like(values[:1], nobody)

    def sums(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The sums of tensors over all processes, the same bits everywhere; they may take the tensors' memory."""
        found = list(tensors)
        if self.size == 1:
            return found
        large = [i for i, t in enumerate(found) if t.numel() > SMALL and t.is_contiguous()]
        small = [i for i, t in enumerate(found) if not (t.numel() > SMALL and t.is_contiguous())]
        with self._answered():
            pending = [dist.all_reduce(found[i], group=self._handle, async_op=True) for i in large]
            for dtype in {found[i].dtype: None for i in small}:
                alike = [i for i in small if found[i].dtype == dtype]
                joined = torch.cat([found[i].flatten() for i in alike])
                dist.all_reduce(joined, group=self._handle)
                for i, total in zip(alike, joined.split([found[i].numel() for i in alike]), strict=True):
                    found[i] = total.view(found[i].shape)
            for work in pending:
                work.wait()
        return found

    def row_sums(self, mine: Tensor) -> Tensor:
        """The sum over all processes of tensors [M, D] that are sparse in their rows; only these rows travel."""
        if self.size == 1:
            return mine
        mine = mine.coalesce()
        rows, values = mine.indices()[0], mine.values()
        counts = self.gathered(torch.tensor([len(rows)], device=rows.device)).flatten().tolist()
        room = max(counts) - len(rows)
        all_rows = self.gathered(torch.cat([rows, rows.new_zeros(room)]))
        all_values = self.gathered(torch.cat([values, values.new_zeros(room, *values.shape[1:])]))
        parts = [(r[:n], v[:n]) for r, v, n in zip(all_rows, all_values, counts, strict=True)]
        rows, place = torch.cat([r for r, _ in parts]).unique(return_inverse=True)
        total = values.new_zeros(len(rows), *values.shape[1:]).index_add_(0, place, torch.cat([v for _, v in parts]))
        return torch.sparse_coo_tensor(rows[None], total, mine.shape, is_coalesced=True, check_invariants=False)

    def gathered(self, mine: Tensor) -> Tensor:
        """Every process's tensor of one shape. [size, ...]"""
        if self.size == 1:
            return mine[None]
        found = [torch.empty_like(mine) for _ in range(self.size)]
        with self._answered():
            dist.all_gather(found, mine, group=self._handle)
        return torch.stack(found)

    def joined(self, mine: Tensor, n: int) -> Tensor:
        """All rows of a tensor of n rows, of which each process has the rows of its `span`."""
        if self.size == 1:
            return mine
        begin, end = self.span(n)
        whole = torch.zeros(n, *mine.shape[1:], dtype=mine.dtype, device=self._device)
        whole[begin:end] = mine  # adding zeros changes no value
        return self.sums([whole])[0].to(mine.device)

    def first(self, act: Callable[[], T]) -> T:
        """What `act` gives on the first process, which alone runs it; the others wait for it. It must fit into json.

        Raises:
            ProcessError: on the others, where the first one failed; they say why.
        """
        if self.size == 1:
            return act()
        if not self.is_first:
            answer = json.loads(self._text(""))
            if "error" in answer:
                raise ProcessError(f"process 0 stopped: {answer['error']}")
            found: T = answer["found"]
            return found
        try:
            found = act()
        except Exception as error:
            self._text(json.dumps({"error": str(error)}))
            raise
        self._text(json.dumps({"found": found}))
        return found

    def all_do(self, act: Callable[[], None]) -> None:
        """Every process runs `act`; where one fails, all stop.

        Raises:
            ProcessError: another one failed, and says why.
        """
        failure = None
        try:
            act()
        except Exception as error:
            if self.size == 1:
                raise
            failure = error
        (failed,) = self.sums([torch.tensor(int(failure is not None), device=self._device)])
        if failure is not None:
            raise failure
        if int(failed):
            raise ProcessError("another process failed, and says why")

    def agree(self, mine: bool) -> bool:
        """Whether it is true in all processes."""
        return int(self.sums([torch.tensor(int(mine), device=self._device)])[0]) == self.size

    def check_same(self, tensors: Sequence[Tensor], what: str) -> None:
        """Refuses to go on with tensors that are not the same bits in all processes.

        Raises:
            ProcessError: they differ.
        """
        if self.size == 1:
            return
        sums = torch.stack([_bits(t) for t in tensors]).to(self._device)
        lowest, highest = sums.clone(), sums.clone()
        with self._answered():
            dist.all_reduce(lowest, dist.ReduceOp.MIN, group=self._handle)
            dist.all_reduce(highest, dist.ReduceOp.MAX, group=self._handle)
        if not torch.equal(lowest, highest):
            raise ProcessError(
                f"{what} differ between the processes, which must be the same bits: are these machines, library "
                "versions and backends the same?"
            )

    def _text(self, mine: str) -> str:
        """The first process's text."""
        held = mine.encode()
        size = torch.tensor([len(held)], device=self._device)
        with self._answered():
            dist.broadcast(size, group=self._handle, group_src=0)
            text = torch.zeros(int(size), dtype=torch.uint8, device=self._device)
            if self.is_first:
                text.copy_(torch.frombuffer(bytearray(held), dtype=torch.uint8))
            dist.broadcast(text, group=self._handle, group_src=0)
        return text.cpu().numpy().tobytes().decode()

    @contextlib.contextmanager
    def _answered(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise ProcessError(
                f"process {self.rank} of {self.size} lost the others: one was ended, or did not answer within "
                f"{_patience():.0f} s ({TIMEOUT}). Start all again with --resume. ({reason})"
            ) from error


ALONE = Group()
"""One process, which communicates with nobody."""


@dataclass(frozen=True)
class Mesh:
    """Processes in two dimensions.

    Attributes:
        everyone: all of them; the first writes files and talks to people.
        data: those with the same rows of the item tables, which share users.
        items: those with the same users, which share the rows of the item tables.
    """

    everyone: Group = ALONE
    data: Group = ALONE
    items: Group = ALONE


def under_torchrun() -> bool:
    """Whether this is one of several processes."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def local_rank() -> int:
    """This process's number on its machine: the CUDA device that is its own."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_size() -> int:
    """How many of the processes run on this machine, and share its memory."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


@contextlib.contextmanager
def processes(device: torch.device, item_shards: int = 1) -> Iterator[Mesh]:
    """The processes that torchrun started, or this one alone: nccl between CUDA devices, gloo elsewhere.

    Neighbours by number share the rows of item tables, `item_shards` of them each time. The groups are made one by one,
    not by `init_device_mesh`, which gives its groups no patience but the default half an hour.

    Args:
        device: this process's.
        item_shards: S; divides the number of processes.

    Raises:
        ProcessError: the others did not come.
        ValueError: item_shards does not divide the number of processes.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if item_shards < 1 or size % item_shards:
        raise ValueError(f"item_shards must divide the number of processes, {size}; got {item_shards}")
    if not under_torchrun():
        yield Mesh()
        return
    cuda = device.type == "cuda"
    # The group is a default argument of this module's functions from its import on, which torch leaves to whoever comes
    # first; imported later, it keeps the group, whose threads then outlive the interpreter and end the process.
    importlib.import_module("torch.distributed.nn.functional")
    patience = timedelta(seconds=_patience())
    try:
        dist.init_process_group("nccl" if cuda else "gloo", timeout=patience, device_id=device if cuda else None)
    except (dist.DistError, ValueError) as error:
        raise ProcessError(f"the processes did not find each other ({str(error).splitlines()[0]})") from error
    everyone = Group(dist.group.WORLD, device if cuda else "cpu")
    mesh = Mesh(everyone, everyone, ALONE)
    groups = [everyone]
    try:
        if item_shards > 1:
            rows = [list(range(first, first + item_shards)) for first in range(0, size, item_shards)]
            columns = [list(ranks) for ranks in zip(*rows, strict=True)]
            with everyone._answered():
                items, data = (dist.new_subgroups_by_enumeration(of, timeout=patience)[0] for of in (rows, columns))
            groups += [Group(data, everyone._device), Group(items, everyone._device)]
            mesh = Mesh(everyone, groups[1], groups[2])
        yield mesh
    finally:
        for group in groups:
            group._handle = None  # as above
        dist.destroy_process_group()


def _patience() -> float:
    text = os.environ.get(TIMEOUT, "600")
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0
    if not 0 < seconds < 1e6:
        raise ValueError(f"{TIMEOUT} must be a number of seconds above 0; got {text!r}")
    return seconds


def _bits(t: Tensor) -> Any:
    """A sum over a tensor's bits, which no rounding touches. int64"""
    return t.detach().flatten().view(torch.uint8 if t.numel() * t.element_size() % 4 else torch.int32).sum()
