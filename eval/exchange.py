"""Scorers that live elsewhere: their folder layouts out, their results in.

Each has a folder of its own, by default in the run, with one part for every model and setting:

    FOLDER/MODEL/SETTING/00000/metadata.jsonl, samples/0000.png     GenEval (arXiv:2310.11513)
    FOLDER/MODEL/SETTING/results.jsonl                              what its evaluate_images.py wrote there
    FOLDER/MODEL/SETTING/dataset.json                               VQAScore (arXiv:2404.01291)
    FOLDER/MODEL/SETTING/scores.json                                batch_forward(dataset).tolist() as JSON

Any other scorer's figures come in as a CSV file of the columns file (as in the manifest) and one a measure.
"""

from __future__ import annotations

import csv
import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from cascade.checkpoint import write_json
from cascade.errors import InputError
from eval.run import Item, Run

Column = tuple[str, str]  # model, setting
Found = dict[Column, list[float]]  # the figure of each of a column's items, in their order


def export_geneval(run: Run, folder: Path, stage: str | None = None) -> None:
    """Write the folders that GenEval's evaluate_images.py takes. Raises InputError for a suite that is not
    GenEval's, and where there is such a folder already."""
    for prompt in run.suite.prompts:
        if "tag" not in prompt.meta or "include" not in prompt.meta:
            raise InputError(f"suite {run.suite.name}: expected GenEval's prompts, each with tag and include")
    for (model, setting), items in _columns(run):
        place = _new(folder / model / setting)
        for item in items:
            samples = place / f"{item.prompt:05d}" / "samples"
            samples.mkdir(parents=True, exist_ok=True)
            prompt = run.suite.prompts[item.prompt]
            line = json.dumps({**prompt.meta, "prompt": prompt.text}, ensure_ascii=False)
            (samples.parent / "metadata.jsonl").write_text(line + "\n", encoding="utf-8")
            shutil.copy(run.path(item, stage), samples / f"{item.k:04d}.png")


def import_geneval(run: Run, folder: Path) -> dict[str, Found]:
    """1 for each picture that GenEval found correct, else 0."""

    def read(place: Path, items: list[Item]) -> list[float]:
        found = {}
        for row in _lines(place / "results.jsonl"):
            try:
                *_, prompt, _, name = Path(row["filename"]).parts
                found[int(prompt), int(Path(name).stem)] = float(row["correct"])
            except (KeyError, TypeError, ValueError):
                raise InputError(
                    f"{place / 'results.jsonl'}: expected GenEval's filename and correct"
                ) from None
        return _in_order(place, items, found, key=lambda item: (item.prompt, item.k))

    return {"geneval": _each(run, folder, "results.jsonl", read)}


def export_vqascore(run: Run, folder: Path, stage: str | None = None) -> None:
    """Write the data sets that t2v_metrics' batch_forward takes: one entry a prompt, its pictures (absolute
    paths) and its text."""
    for (model, setting), items in _columns(run):
        entries = [{"images": [], "texts": [prompt.text]} for prompt in run.suite.prompts]
        for item in items:
            entries[item.prompt]["images"].append(str(run.path(item, stage).resolve()))
        write_json(_new(folder / model / setting) / "dataset.json", entries)


def import_vqascore(run: Run, folder: Path) -> dict[str, Found]:
    """The score of each picture with its text."""

    def read(place: Path, items: list[Item]) -> list[float]:
        try:
            scores = json.loads((place / "scores.json").read_text(encoding="utf-8"))
            found = {(i.prompt, i.k): float(scores[i.prompt][i.k][0]) for i in items}
        except (OSError, ValueError, TypeError, LookupError):
            raise InputError(
                f"{place / 'scores.json'}: expected a list of prompts, of pictures, of one score"
            ) from None
        return _in_order(place, items, found, key=lambda item: (item.prompt, item.k))

    return {"vqascore": _each(run, folder, "scores.json", read)}


def import_scores(run: Run, path: Path) -> dict[str, Found]:
    """Every measure of a CSV file: a figure for every picture of at least one model and setting."""
    try:
        rows = list(csv.DictReader(path.read_text(encoding="utf-8-sig").splitlines()))
        names = [name for name in rows[0] if name != "file"]
        found = {name: {row["file"]: float(row[name]) for row in rows} for name in names}
    except (OSError, ValueError, TypeError, LookupError):
        raise InputError(f"{path}: expected CSV of the columns file and one a measure, all numbers") from None
    measures: dict[str, Found] = {}
    for name, figures in found.items():
        for column, items in _columns(run):
            of_item = {i.key: figures[file] for i in items for file in i.files.values() if file in figures}
            if of_item:
                values = _in_order(path, items, of_item, key=lambda item: item.key)
                measures.setdefault(name, {})[column] = values
    if not measures:
        raise InputError(f"{path} names no picture of the run: expected files as {run.items[0].files}")
    return measures


EXPORTS = {"geneval": export_geneval, "vqascore": export_vqascore}
IMPORTS = {"geneval": import_geneval, "vqascore": import_vqascore, "scores": import_scores}
TITLES = {"geneval": "GenEval, mean of tasks", "vqascore": "VQAScore"}


def _columns(run: Run) -> Iterator[tuple[Column, list[Item]]]:
    for model in run.models:
        for setting in run.settings:
            yield (model, setting.id), run.select(model, setting.id)


def _new(folder: Path) -> Path:
    if folder.exists():
        raise InputError(f"{folder} exists: expected a folder to make")
    folder.mkdir(parents=True)
    return folder


def _each(run: Run, folder: Path, file: str, read: Callable[[Path, list[Item]], list[float]]) -> Found:
    """Read every column that has the file. Raises InputError where none has."""
    places = {column: (folder / "/".join(column), items) for column, items in _columns(run)}
    found = {c: read(place, items) for c, (place, items) in places.items() if (place / file).is_file()}
    if not found:
        raise InputError(
            f"{folder}: expected MODEL/SETTING/{file} in it, as for {next(iter(places.values()))[0]}"
        )
    return found


def _in_order(
    place: Path, items: list[Item], found: dict[Any, float], key: Callable[[Item], Any]
) -> list[float]:
    missing = [item for item in items if key(item) not in found]
    if missing:
        raise InputError(
            f"{place} lacks {len(missing)} of {len(items)} pictures, as prompt {missing[0].prompt} "
            f"picture {missing[0].k}"
        )
    values = [found[key(item)] for item in items]
    if not all(math.isfinite(value) for value in values):
        raise InputError(f"{place}: expected numbers alone, found one that is not finite")
    return values


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            yield json.loads(line)
        except ValueError:
            raise InputError(f"{path}:{number}: expected a JSON object a line") from None
