"""How far a run is, over all its processes, and what is said meanwhile."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from eval.run import MANIFEST, rank_manifests

EVERY_S = 60.0  # between lines where stderr is no terminal
LOOK_S = 1.0  # between looks at what the other processes have done


class Counter:
    """Lines in the manifests of a run folder, read as far as they grew."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.ends, self.count = folder, dict[Path, int](), 0

    def read(self) -> int:
        for path in [self.folder / MANIFEST, *rank_manifests(self.folder)]:
            if path.is_file():
                with path.open("rb") as file:
                    file.seek(self.ends.get(path, 0))
                    grown = file.read()
                self.ends[path] = self.ends.get(path, 0) + len(grown)
                self.count += grown.count(b"\n")
        return self.count


@contextmanager
def shown(folder: Path, total: int) -> Iterator[Callable[[], None]]:
    """A bar on stderr, or a line a minute where that is no terminal. Call what it gives after a picture."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    counter = Counter(folder)
    begun, start = counter.read(), time.monotonic()
    looked = said = start
    columns = (TextColumn("drawing"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as progress:
        bar = progress.add_task("", total=total, completed=begun)

        def update() -> None:
            nonlocal looked, said
            now = time.monotonic()
            if now - looked < LOOK_S:
                return
            looked, done = now, counter.read()
            progress.update(bar, completed=done)
            if progress.disable and now - said >= EVERY_S and done > begun:
                said, left = now, (now - start) / (done - begun) * (total - done)
                print(f"eval: {done} of {total} pictures, {left / 60:.0f} min left", file=sys.stderr)

        yield update


@contextmanager
def said_once() -> Iterator[None]:
    """Within it the library says a thing once, as that a prompt is too long: each is drawn many times."""
    said = set[str]()

    def is_new(record: logging.LogRecord) -> bool:
        before = len(said)
        said.add(record.getMessage())
        return len(said) > before

    logger = logging.getLogger("cascade")
    logger.addFilter(is_new)
    try:
        yield
    finally:
        logger.removeFilter(is_new)
