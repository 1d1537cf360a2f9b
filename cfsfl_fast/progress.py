"""Progress bars on stderr; tqdm is imported where one is shown."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any


def bar(items: Iterable[Any] | None = None, *, shown: bool, **options: Any) -> Any:
    """A tqdm bar over items, or one that is moved by hand; where it is not shown, something that takes the same calls.

    Args:
        items: what iterating gives.
        shown: even so only on a terminal.
        options: tqdm's.
    """
    if not shown:
        return _NoBar(items)
    from tqdm import tqdm

    return tqdm(items, disable=None, **options)


class _NoBar:
    disable = True

    def __init__(self, items: Iterable[Any] | None) -> None:
        self._items = () if items is None else items

    def __iter__(self) -> Iterator[Any]:
        return iter(self._items)

    def __enter__(self) -> _NoBar:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def update(self, n: int = 1) -> None:
        """As tqdm's."""

    def set_postfix(self, *values: Any, **named: Any) -> None:
        """As tqdm's."""

    def set_postfix_str(self, *values: Any, **named: Any) -> None:
        """As tqdm's."""
