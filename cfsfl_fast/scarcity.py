"""Where a device has no memory left: fewer users at once if that changes no figure, an end that says why if it does."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

log = logging.getLogger(__name__)

T = TypeVar("T")


class OutOfMemoryError(MemoryError):
    """The device cannot hold what was asked for; the message says what to set."""


class Batches:
    """Work on users in batches whose sizes change no answer: smaller ones, once the device could not hold one.

    Args:
        least: users of a batch that is not made smaller.
    """

    def __init__(self, least: int = 1) -> None:
        self.least = least
        self.most: int | None = None  # what the device can hold, once that is known

    def __call__(self, users: Tensor, size: int, act: Callable[[Tensor], T]) -> Iterator[T]:
        """What `act` gives for one batch after the other; where there are no users, for none of them.

        Args:
            users: [U].
            size: users at once, if the device can hold so many.

        Raises:
            OutOfMemoryError: the device cannot hold the least.
        """
        done = 0
        while done < len(users) or done == 0:
            some = users[done : done + min(size, self.most or size)]
            found, trouble = _tried(act, some)
            if trouble is None:
                yield found[0]
                done += max(len(some), 1)
            elif len(some) <= self.least:
                raise OutOfMemoryError(f"no memory for {len(some)} users at once, the fewest there can be: {trouble}")
            else:
                self.most = max(self.least, len(some) // 2)
                log.warning("no memory for %d users at once: %d from here on (%s)", len(some), self.most, trouble)


def _tried(act: Callable[[Tensor], T], users: Tensor) -> tuple[list[T], str | None]:
    """What an action gives, or what it lacked; the memory that it had taken is free again then."""
    try:
        return [act(users)], None
    except (RuntimeError, MemoryError) as error:
        if not _lacks_memory(error):
            raise
        trouble = str(error).split("\n")[0]
    _let_go()
    return [], trouble


@contextlib.contextmanager
def explained(what: str, advice: str, device: torch.device) -> Iterator[None]:
    """Says what did not fit inside, and what to do.

    Raises:
        OutOfMemoryError: instead of what PyTorch raises.
    """
    try:
        yield
        return
    except (RuntimeError, MemoryError) as error:
        if not _lacks_memory(error):
            raise
        trouble = str(error).split("\n")[0]
    _let_go()
    room = ""
    if device.type == "cuda":
        free, total = (n / 2**30 for n in torch.cuda.mem_get_info(device))
        room = f" ({free:.1f} of {total:.1f} GiB are free without it)"
    raise OutOfMemoryError(f"{device} has no memory for {what}{room}: {advice} [{trouble}]")


def free_memory(device: torch.device) -> float:
    """Bytes that are free: of a CUDA device, or of the machine within the limit of its control group; infinity where it
    does not say.
    """
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    free = float("inf")
    for line in _lines(Path("/proc/meminfo")):
        if line.startswith("MemAvailable:"):
            free = 1024.0 * int(line.split()[1])
    limit, used = (_lines(Path("/sys/fs/cgroup") / name) for name in ("memory.max", "memory.current"))
    if limit and used and limit[0].isdigit():
        free = min(free, float(int(limit[0]) - int(used[0])))
    return free


def check_free(n_bytes: int, what: str) -> None:
    """Before more is allocated than the machine can give.

    Raises:
        MemoryError: naming what is needed and what there is.
    """
    free = free_memory(torch.device("cpu"))
    if n_bytes > free:
        raise MemoryError(f"{what} takes {n_bytes / 1e9:.1f} GB; {free / 1e9:.1f} GB are free")


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


def _lacks_memory(error: BaseException) -> bool:
    if isinstance(error, OutOfMemoryError):
        return False  # who raised it has tried
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


def _let_go() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
