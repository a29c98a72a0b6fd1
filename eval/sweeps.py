"""What one setting trades for another: two measures over the values that a run varied it to."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

from eval.run import Run

ALIGNMENT = ("clip_cosine", "own_clip_cosine")  # one of these is the x axis, the first that there is
DISTANCES = ("fid", "fid_clean", "fd_dinov2", "fd_efficientnet", "cmmd")  # each of these is a y axis


def make_sweeps(run: Run, metrics: Mapping[str, Any], sets: Mapping[str, Any]) -> list[dict[str, Any]]:
    """report.json's sweeps: a curve for every study of settings, model and pair of measures. Without real
    pictures the other scores take the distances' place."""
    x = next((name for name in ALIGNMENT if name in metrics), None)
    if x is None:
        return []
    others = [name for name in metrics if name.partition("_")[0] != x.partition("_")[0]]
    ys = [name for name in DISTANCES if name in sets] or others
    studies = dict.fromkeys(setting.study for setting in run.settings if "." in setting.study)
    curves = []
    for study, y, model in itertools.product(studies, ys, run.models):
        points = list(_points(run, study, model, metrics[x], sets[y] if y in sets else metrics[y]))
        if len(points) > 1:
            curves.append({"over": study, "x": x, "y": y, "model": model, "points": points})
    return curves


def _points(
    run: Run, study: str, model: str, x: Mapping[str, Any], y: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    for setting in run.settings:
        cells = [measure["values"].get(model, {}).get(setting.id) for measure in (x, y)]
        if setting.study == study and None not in cells:
            point: dict[str, Any] = {"setting": setting.id, "label": setting.label}
            for axis, cell in zip("xy", cells, strict=True):
                cell = cell.get("overall", cell)  # of a score; a distance has but one
                ends = {f"{axis}_{end}": cell[end] for end in ("low", "high")}
                point |= {axis: cell["mean"] if "mean" in cell else cell["value"], **ends}
            yield point
