"""Pictures of the emoji data set: SVG text to 1024 px WebP, resumable, over several processes."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from cascade.errors import InputError
from train.files import write_whole

SIZE = 1024  # pixels a side
QUALITY = 90  # WebP quality
EFFORT = 2  # WebP method, 0 (fast) to 6 (small)
WHITE = [255.0, 255.0, 255.0]


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """One picture to rasterise: its SVG document, its renderer ("vips" or "resvg") and its file."""

    svg: str
    renderer: str
    path: Path


def sized_svg(svg: str, size: int = SIZE) -> str:
    """`svg` with its root drawn `size` x `size` pixels; a viewBox that is not square is centred.

    The root must have a viewBox and no width or height of its own (true of all the sources).
    """
    head, root, rest = svg.partition("<svg")
    tag = rest.split(">", 1)[0]
    if not root or "viewBox=" not in tag or " width=" in tag or " height=" in tag:
        raise InputError(f"expected an svg root with a viewBox and no width or height, found <svg{tag[:80]}>")
    return f'{head}<svg width="{size}" height="{size}"{rest}'


def rasterise(svg: str, renderer: str, size: int = SIZE) -> bytes:
    """WebP bytes, RGB on white, `size` x `size`; raises InputError if the SVG cannot be drawn so."""
    import pyvips

    try:
        image = _draw(sized_svg(svg, size), renderer)
        image = image.flatten(background=WHITE) if image.hasalpha() else image
        if (image.width, image.height, image.bands) != (size, size, 3):
            found = f"{image.width}x{image.height}x{image.bands}"
            raise InputError(f"expected a picture of {size}x{size}x3, drew {found}")
        return image.webpsave_buffer(Q=QUALITY, effort=EFFORT)  # smart_subsample would take 5x the time
    except (pyvips.Error, ValueError) as error:
        raise InputError(" ".join(str(error).split())) from None


def _draw(svg: str, renderer: str):
    """The drawing as a pyvips image with alpha."""
    import pyvips

    if renderer == "vips":
        return pyvips.Image.svgload_buffer(svg.encode()).copy_memory()
    if renderer == "resvg":
        # Noto nests clip paths in a way that librsvg (pyvips) gets wrong on 7% of the pictures.
        import resvg_py

        png = resvg_py.svg_to_bytes(svg_string=svg, skip_system_fonts=True)
        return pyvips.Image.new_from_buffer(bytes(png), "")
    raise InputError(f"renderer {renderer!r}: expected 'vips' or 'resvg'")


def write_drawing(drawing: Drawing) -> str | None:
    """Rasterise into `drawing.path`; None, or one line that names the file (it crosses processes)."""
    try:
        write_whole(drawing.path, rasterise(drawing.svg, drawing.renderer))
    except (InputError, OSError) as error:
        return f"{drawing.path}: {error}"
    return None


def write_drawings(drawings: Iterable[Drawing], *, processes: int | None, progress: bool) -> int:
    """Rasterise every drawing whose file is not there yet; the number written.

    processes: how many, None for one a core. Raises InputError with the first file that failed.
    """
    todo = [drawing for drawing in drawings if not drawing.path.exists()]
    workers = min(processes or os.cpu_count() or 1, len(todo)) or 1
    with _bar(len(todo), enabled=progress) as advance, _results(todo, workers) as results:
        for error in results:
            if error is not None:
                raise InputError(error)
            advance()
    return len(todo)


@contextmanager
def _results(todo: list[Drawing], workers: int) -> Iterator[Iterable[str | None]]:
    if workers == 1:
        yield map(write_drawing, todo)
        return
    # spawn, not fork: libvips owns threads, and a forked copy of them deadlocks.
    with multiprocessing.get_context("spawn").Pool(workers, initializer=_one_thread) as pool:
        yield pool.imap_unordered(write_drawing, todo, chunksize=8)


def _one_thread() -> None:
    """The processes share the cores, so libvips must not start its own pool in each (read at import)."""
    os.environ["VIPS_CONCURRENCY"] = "1"


@contextmanager
def _bar(total: int, *, enabled: bool):
    """A rich progress bar; yields the function that moves it by one picture."""
    columns = (TextColumn("pictures"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, disable=not enabled) as bar:
        task = bar.add_task("pictures", total=total)
        yield lambda: bar.advance(task)
