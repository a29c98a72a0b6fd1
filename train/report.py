"""`python -m train.report OUT`: what a run's stages did, as one HTML page that needs no other file.

It reads what training writes beside its states (log.jsonl, events.jsonl, grids, recipe.yaml), so it can be
made at any time, also while training goes on, and on a machine that has nothing but those files.
"""

from __future__ import annotations

import base64
import io
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from cascade.arguments import Parser
from cascade.errors import InputError
from train.figures import loss_by_level_figure, loss_figure, speed_figure, waiting_figure
from train.files import write_whole
from train.recipe import ORDER
from train.status import EVENTS, LOG

GRIDS = 8  # of a stage that the page shows, evenly over the run, the first and the last among them
GRID_PX = 1200  # longest side of a grid on the page
ROWS = 25  # of the table of a stage


@dataclass(frozen=True)
class StageLog:
    """What one stage wrote. Records are in the order of their images, each number of images once."""

    name: str
    folder: Path
    records: list[dict[str, Any]]
    validations: list[dict[str, Any]]
    troubles: dict[str, int]  # kind of event -> how many
    grids: dict[int, Path]  # training images -> picture

    @property
    def summary(self) -> dict[str, Any]:
        last, seconds = self.records[-1], sum(r["seconds"] for r in self.records)
        best = min((v["loss"] for v in self.validations), default=None)
        return {
            "images": last["images"],
            "loss": last["loss"],
            "validation": self.validations[-1]["loss"] if self.validations else None,
            "best": best,
            "rate": statistics.median(r["images_per_s"] for r in self.records),
            "wait": sum(r["data_wait"] * r["seconds"] for r in self.records) / seconds if seconds else 0.0,
            "hours": seconds / 3600,
            "updated": last.get("skipped") is None or sum(r["skipped"] for r in self.records) == 0,
            "skipped": sum(r.get("skipped", 0) for r in self.records),
            "spikes": self.troubles.get("spike", 0),
        }


def read_stage(folder: Path) -> StageLog:
    """One stage's training folder. Lines that are not whole, as a run in progress leaves, are passed over."""
    name = folder.name.removesuffix("-training")
    events = read_lines(folder / EVENTS)
    validations = {e["images"]: e for e in events if e.get("event") == "validation"}
    records = {r["images"]: r for r in read_lines(folder / LOG)}
    troubles: dict[str, int] = {}
    for event in events:
        if (kind := event.get("event", "")) != "validation":
            troubles[kind] = troubles.get(kind, 0) + 1
    grids = {int(path.stem.split("-")[1]): path for path in folder.glob("grid-" + "[0-9]" * 10 + ".png")}
    return StageLog(
        name,
        folder,
        [records[images] for images in sorted(records)],
        [validations[images] for images in sorted(validations)],
        troubles,
        dict(sorted(grids.items())),
    )


def read_lines(path: Path) -> list[dict[str, Any]]:
    found = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and "images" in record:
            found.append(record)
    return found


def read_run(out: Path) -> list[StageLog]:
    """The stages of a run that have logged something, in the order of training. Raises InputError where there
    is none."""
    if not out.is_dir():
        raise InputError(f"no run in {out}: expected a folder that training wrote")
    folders = [out / f"{name}-training" for name in ORDER]
    stages = [stage for stage in (read_stage(f) for f in folders if (f / LOG).exists()) if stage.records]
    if not stages:
        raise InputError(
            f"no stage has logged anything in {out}: expected {ORDER[0]}-training/{LOG} or others"
        )
    return stages


def write_report(out: Path, path: Path) -> Path:
    """Read the run in `out` and write its page to `path`. Raises InputError."""
    stages = read_run(out)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"count": count, "number": number, "share": share}
    recipes = [s.folder / "recipe.yaml" for s in stages] + [out / "recipe.yaml"]
    recipe = max((p for p in recipes if p.exists()), key=lambda p: p.stat().st_mtime, default=None)
    version = out / "version.txt"
    page = environment.get_template("report.html").render(
        name=out.resolve().name,
        stages=[stage_view(stage) for stage in stages],
        recipe=None if recipe is None else recipe.read_text(encoding="utf-8"),
        version=version.read_text(encoding="utf-8").strip() if version.exists() else None,
    )
    write_whole(path, page.encode())
    return path


def stage_view(stage: StageLog) -> dict[str, Any]:
    """What the template shows of a stage."""
    figures = {
        "Loss": loss_figure(stage.records, stage.validations),
        "Loss by noise level": loss_by_level_figure(stage.records, stage.validations),
        "Training images a second": speed_figure(stage.records),
        "Share of the time": waiting_figure(stage.records),
    }
    validated = {v["images"]: v["loss"] for v in stage.validations}
    return {
        "name": stage.name,
        "summary": stage.summary,
        "figures": {title: svg for title, svg in figures.items() if svg is not None},
        "grids": [{"images": n, **embedded(stage.grids[n])} for n in spread(list(stage.grids), GRIDS)],
        "rows": [(r, validated.get(r["images"])) for r in spread(stage.records, ROWS)],
    }


def spread(items: Sequence[Any], most: int) -> list[Any]:
    """At most so many of the items, evenly spaced, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def embedded(path: Path) -> dict[str, Any]:
    """The picture as WebP inside a URI, its longer side at most GRID_PX, and the width it is shown at: small
    ones at twice their own."""
    try:
        with Image.open(path) as picture:
            picture = picture.convert("RGB")
    except OSError as error:  # Pillow's too
        raise InputError(f"cannot read {path}: {error.strerror or 'not a whole picture'}") from None
    if max(picture.size) > GRID_PX:
        picture.thumbnail((GRID_PX, GRID_PX), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", quality=85)
    uri = f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return {"uri": uri, "width": min(GRID_PX, 2 * picture.width)}


def count(value: int) -> str:
    return f"{value:,}"


def number(value: float | None) -> str:
    """Four digits that matter; a dash where there is none."""
    return "–" if value is None else f"{value:#.4g}"


def share(value: float) -> str:
    return f"{value:.1%}"


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="python -m train.report", description=__doc__)
    parser.add_argument("out", type=Path, help="the folder of a run")
    parser.add_argument("--html", type=Path, help="the page to write; default: OUT/report.html")
    try:
        arguments = parser.parse_args(argv)
        print(write_report(arguments.out, arguments.html or arguments.out / "report.html"))
    except InputError as error:
        print(f"train.report: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
