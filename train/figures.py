"""The curves of a training report, as SVG with text that can be searched and scaled."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, NullFormatter, PercentFormatter

Records = Sequence[dict[str, Any]]

LEVELS = ("#440154", "#31688e", "#21a179", "#c8a415")  # viridis, its yellow darkened: little noise to much
TRAIN, VALIDATION, QUIET = "#31688e", "#c43c3c", "#8a8f98"
SIZE = (4.4, 2.9)  # inches; a phone shows one such figure at nearly its own size
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "font.family": "sans-serif",
    "svg.fonttype": "none",
    "svg.hashsalt": "train.report",  # ids that do not change from page to page
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e3e6ea",
    "axes.edgecolor": QUIET,
    "legend.frameon": False,
    "legend.fontsize": 8,
}


def loss_figure(records: Records, validations: Records) -> str:
    """The training loss, and the validation loss of the averaged weights."""

    def draw(axes: Axes) -> None:
        _line(axes, records, "loss", TRAIN, "training")
        _line(axes, validations, "loss", VALIDATION, "validation (average)", marker="o")
        _log_scale(axes)

    return _figure(draw)


def loss_by_level_figure(records: Records, validations: Records) -> str | None:
    """The same in quarters of t; None for a stage without noise levels."""
    quarters = len(LEVELS)
    if not any(loss for r in records for loss in r["loss_by_t"][1:]):
        return None

    def draw(axes: Axes) -> None:
        for i, color in enumerate(LEVELS):
            label = f"t {i / quarters:g}–{(i + 1) / quarters:g}"
            trained = [(r["images"], r["loss_by_t"][i]) for r in records if r["loss_by_t"][i]]
            axes.plot(*_columns(trained), color=color, linewidth=1.2, label=label)
            held = [(v["images"], _quarter(v["by_t"], i)) for v in validations]
            held = [(images, loss) for images, loss in held if loss is not None]
            axes.plot(*_columns(held), color=color, linewidth=1, linestyle="--", marker="o", markersize=2.5)
        if validations:
            axes.plot([], [], color=QUIET, linewidth=1, linestyle="--", label="validation")
        _log_scale(axes)

    return _figure(draw)


def speed_figure(records: Records) -> str:
    def draw(axes: Axes) -> None:
        _line(axes, records, "images_per_s", TRAIN, "")
        axes.set_ylim(bottom=0)

    return _figure(draw)


def waiting_figure(records: Records) -> str:
    """Shares of the time: waiting for data, and all that is not forward, backward or optimiser."""

    def draw(axes: Axes) -> None:
        _line(axes, [r for r in records if "outside" in r], "outside", QUIET, "outside the network")
        _line(axes, records, "data_wait", VALIDATION, "waiting for data")
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set_ylim(0, max(0.05, axes.get_ylim()[1]))

    return _figure(draw)


def _quarter(by_level: Sequence[float], quarter: int) -> float | None:
    """Mean loss of the levels whose t = (level + 1/2) / levels lies in a quarter."""
    count, quarters = len(by_level), len(LEVELS)
    inside = [loss for i, loss in enumerate(by_level) if int((i + 0.5) / count * quarters) == quarter]
    return sum(inside) / len(inside) if inside else None


def _line(axes: Axes, records: Records, key: str, color: str, label: str, marker: str = "") -> None:
    points = [(r["images"], r[key]) for r in records if r[key] is not None]
    if points:
        axes.plot(*_columns(points), color=color, linewidth=1.4, label=label, marker=marker, markersize=3)


def _columns(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _log_scale(axes: Axes) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _figure(draw: Callable[[Axes], None]) -> str:
    with rc_context(STYLE):
        figure = Figure(figsize=SIZE, layout="constrained")
        axes = figure.add_subplot()
        draw(axes)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.set_xlabel("training images")
        if axes.get_legend_handles_labels()[1]:
            axes.legend()
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    return re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', 'role="img"', svg[svg.index("<svg") :], count=1)
