"""Charts as data: where each estimate stands on its track and how it reads. The templates draw them, as
HTML tables and SVG that follow the reader's colours and width."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

MINUS = "\N{MINUS SIGN}"
OVERALL = "All prompts"
PLANE = {"width": 400, "height": 280, "left": 44, "right": 380, "top": 10, "bottom": 256}  # its own units


@dataclass(frozen=True)
class Tick:
    at: float
    text: str


@dataclass(frozen=True)
class Mark:
    """One estimate: places in per cent of the track, or None where there is no interval."""

    figure: str  # METRIC/SETTING/MODEL/CATEGORY, the name under which the page holds the figure
    side: str  # A, B or difference: its colour
    value: str
    interval: str
    at: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Row:
    label: str
    marks: tuple[Mark, ...]
    count: int | None = None
    verdict: str = ""
    p: str = ""
    note: str = ""


@dataclass(frozen=True)
class Chart:
    rows: tuple[Row, ...]
    ticks: tuple[Tick, ...]
    zero: float | None = None  # where the track shows equality


@dataclass(frozen=True)
class Point:
    label: str
    x: float
    y: float
    x_low: float
    x_high: float
    y_low: float
    y_high: float


@dataclass(frozen=True)
class Plane:
    """Curves of y over x with the intervals of both, one a model; coordinates are those of the drawing."""

    title: str
    x_title: str
    y_title: str
    curves: dict[str, tuple[Point, ...]]
    rows: tuple[tuple[str, str, str, str], ...]  # the same as text: model, label, x, y
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]


class Scale:
    """A linear map of the values, widened to round numbers, onto places."""

    def __init__(
        self, values: Iterable[float], start: float = 0.0, end: float = 100.0, parts: int = 4
    ) -> None:
        values = [v for v in values if math.isfinite(v)] or [0.0]
        self.steps = round_steps(min(values), max(values), parts)
        self.start, self.end = start, end

    def __call__(self, value: float) -> float:
        share = (value - self.steps[0]) / (self.steps[-1] - self.steps[0])
        return round(self.start + min(max(share, 0.0), 1.0) * (self.end - self.start), 2)

    def ticks(self) -> tuple[Tick, ...]:
        digits = decimals(self.steps[1] - self.steps[0], 1)
        return tuple(Tick(self(step), number(step, digits)) for step in self.steps)


def round_steps(low: float, high: float, parts: int) -> list[float]:
    """About `parts` equal steps of 1, 2 or 5 times a power of ten that cover low to high."""
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        low, high = low - max(abs(low), 1.0) / 10, high + max(abs(high), 1.0) / 10
    power = 10 ** math.floor(math.log10((high - low) / parts))
    step = next(m * power for m in (1, 2, 5, 10) if m * power * parts >= (high - low) * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, last + 1)]


def decimals(size: float, digits: int = 2) -> int:
    """Decimals that show `digits` digits of a number of this size; 0 to 6."""
    if not math.isfinite(size) or size <= 0:
        return 0
    return min(6, max(0, digits - 1 - math.floor(math.log10(size) + 1e-9)))


def number(value: float, digits: int, sign: bool = False) -> str:
    if not math.isfinite(value):
        return "none"
    text = f"{value:{'+' if sign else ''},.{digits}f}"
    return (text.lstrip("+-") if float(text.replace(",", "")) == 0 else text).replace("-", MINUS)


def estimate(value: float, low: float | None, high: float | None, sign: bool = False) -> tuple[str, str]:
    """The value and "low to high", to two digits of half the interval's width."""
    if low is None or high is None:
        return number(value, decimals(abs(value), 4), sign), ""
    digits = decimals((high - low) / 2) if high > low else decimals(abs(value), 4)
    return number(value, digits, sign), f"{number(low, digits, sign)} to {number(high, digits, sign)}"


def percent(share: dict[str, Any]) -> str:
    return f"{share['mean']:.0%} ({share['low']:.0%} to {share['high']:.0%})"


def p_value(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def category_chart(name: str, values: dict[str, Any], setting: str, categories: Sequence[str]) -> Chart:
    """One row for all prompts and one a category, one mark a model."""
    cells = {
        (row, model): found
        for model, by_setting in values.items()
        for row, found in cells_of(by_setting.get(setting))
    }
    scale = Scale(v for cell in cells.values() for v in _ends(cell, "mean"))
    rows = []
    for row in [OVERALL, *categories]:
        marks = {model: cells[row, model] for model in values if (row, model) in cells}
        if marks:
            rows.append(
                Row(
                    label=row,
                    marks=tuple(
                        _mark(f"{name}/{setting}/{model}/{row}", model, cell, "mean", scale)
                        for model, cell in marks.items()
                    ),
                    count=next(iter(marks.values())).get("count"),
                )
            )
    return Chart(tuple(rows), scale.ticks())


def difference_chart(name: str, comparison: dict[str, Any], setting: str, categories: Sequence[str]) -> Chart:
    """A minus B with its interval and verdict, for all prompts and by category."""
    cells = dict(cells_of(comparison))
    scale = Scale([0.0, *(v for cell in cells.values() for v in _ends(cell, "difference"))])
    rows = [
        Row(
            label=row,
            marks=(
                _mark(f"{name}/{setting}/difference/{row}", "difference", cells[row], "difference", scale),
            ),
            verdict=cells[row]["verdict"],
            p=_significance(cells[row]),
            note=cells[row].get("note", ""),
        )
        for row in [OVERALL, *categories]
        if row in cells
    ]
    return Chart(tuple(rows), scale.ticks(), zero=scale(0.0))


def planes(sweeps: Sequence[dict[str, Any]], titles: dict[str, str]) -> list[Plane]:
    """Sweeps over the same thing with the same two axes share a plane, one curve a model."""

    def axes(sweep: dict[str, Any]) -> tuple[str, str, str]:
        return sweep["over"], sweep["x"], sweep["y"]

    return [
        _plane(over, titles.get(x, x), titles.get(y, y), list(group))
        for (over, x, y), group in groupby(sorted(sweeps, key=axes), key=axes)
    ]


def _plane(over: str, x_title: str, y_title: str, sweeps: list[dict[str, Any]]) -> Plane:
    points = [point for sweep in sweeps for point in sweep["points"]]
    x = Scale([v for p in points for v in _axis(p, "x")], PLANE["left"], PLANE["right"], parts=5)
    y = Scale([v for p in points for v in _axis(p, "y")], PLANE["bottom"], PLANE["top"])
    curves = {
        sweep["model"]: tuple(
            Point(str(p["label"]), *map(x, _axis(p, "x")[:1]), *map(y, _axis(p, "y")[:1]),
                  *map(x, _axis(p, "x")[1:]), *map(y, _axis(p, "y")[1:]))
            for p in sweep["points"]
        )
        for sweep in sweeps
    }  # fmt: skip
    rows = tuple(
        (sweep["model"], str(p["label"]), _text(p, "x"), _text(p, "y"))
        for sweep in sweeps
        for p in sweep["points"]
    )
    return Plane(f"By {over}", x_title, y_title, curves, rows, x.ticks(), y.ticks())


def _axis(point: dict[str, Any], axis: str) -> list[float]:
    """Value, low end and high end; the value itself where there is no interval."""
    ends = [point.get(f"{axis}_low"), point.get(f"{axis}_high")]
    return [point[axis], *(point[axis] if end is None else end for end in ends)]


def _text(point: dict[str, Any], axis: str) -> str:
    value, interval = estimate(point[axis], point.get(f"{axis}_low"), point.get(f"{axis}_high"))
    return f"{value} ({interval})" if interval else value


def cells_of(values: dict[str, Any] | None) -> list[tuple[str, dict[str, Any]]]:
    return [] if values is None else [(OVERALL, values["overall"]), *values.get("categories", {}).items()]


def _ends(cell: dict[str, Any], value: str) -> list[float]:
    return [v for v in (cell[value], cell["low"], cell["high"]) if v is not None]


def _mark(figure: str, side: str, cell: dict[str, Any], value: str, scale: Scale) -> Mark:
    low, high = cell["low"], cell["high"]
    text, interval = estimate(cell[value], low, high, sign=value == "difference")
    places = [None if end is None else scale(end) for end in (low, high)]
    return Mark(figure, side, text, interval, scale(cell[value]), *places)


def _significance(cell: dict[str, Any]) -> str:
    name, p = ("Holm p", cell["p_holm"]) if "p_holm" in cell else ("p", cell["p"])
    text = p_value(p)
    return f"{name} {text}" if text.startswith("<") else f"{name} = {text}"
