"""How far a command is in what may take minutes."""

from __future__ import annotations

import sys
import time
from collections.abc import Collection, Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import track

T = TypeVar("T")
EVERY_S = 20.0  # between lines where stderr is no terminal


def tracked(items: Iterable[T], what: str, total: int | None = None, *, quiet: bool = False) -> Iterator[T]:
    """The items, with a bar on stderr that goes when they end or, where that is no terminal, a line every
    EVERY_S: in the log of a job, minutes without a word look like a run that hangs. total: for items without
    a length. quiet: neither."""
    console = Console(stderr=True)
    if quiet or console.is_terminal:
        yield from track(items, what, total, console=console, transient=True, disable=quiet)
        return
    if total is None:
        assert isinstance(items, Collection)
        total = len(items)
    start = said = time.monotonic()
    for done, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if now - said >= EVERY_S:
            said, left = now, (now - start) / done * (total - done)
            print(f"{what}: {done:,} of {total:,}, {left / 60:.0f} min left", file=sys.stderr, flush=True)
