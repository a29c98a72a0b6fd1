"""Every figure of a run, as report.json: scores, comparisons, distances, sweeps, and what only a cascade has.

The report is a function of the pictures, the real pictures, the networks and the seed: it holds no dates, its
keys are in order, and so it is the same bytes however often the run was interrupted.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from cascade.checkpoint import read_index, resolve_source
from cascade.config import to_dict
from cascade.errors import InputError
from cascade.pretrained.source import LEGACY, check_pickle
from eval.cascade_measures import cascade_measures
from eval.distances import FEW
from eval.gauges import Spec, parse
from eval.measuring import Measuring, Table
from eval.models import model_source
from eval.reference import Reference, open_reference
from eval.run import Run
from eval.sweeps import make_sweeps

REPORT = "report.json"
DIGITS = 9  # of a figure; the rest is rounding


def check(metrics: Sequence[str], allow_legacy: bool = False) -> None:
    """Raise InputError, one line, where a metric is not NAME or NAME=SOURCE (see `eval.gauges`), or where its
    source is a pickle and these are not allowed: before hours of drawing."""
    for _, source in parse(metrics):
        for path in map(Path, source.split(",")):
            if path.suffix in LEGACY and path.is_file():
                check_pickle(path, allow_legacy)


def measure(
    run: Run,
    *,
    metrics: Sequence[str] = (),
    references: Path | None = None,
    stage: str | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    allow_legacy: bool = False,
) -> Table:
    """Measure a run, write RUN/report.json and return it.

    metrics: NAME or NAME=SOURCE; none: what needs no download (own-clip, ocr where prompts ask for words,
    efficientnet where there are references). references: real pictures, or a file of their statistics; where
    the suite names a picture a prompt, those alone. stage: whose pictures, by default the last of each model.
    seed: of everything random in the statistics. allow_legacy: read networks that are pickles, of which
    tensors alone are taken. Raises InputError, one line, where any of it is not there; then report.json is as
    it was."""
    stages = {name: run.stage(name, stage) for name in run.models}
    specs = _specs(run, metrics, references)
    reference = None if references is None else open_reference(run, references)
    measuring = Measuring(run, specs, reference, seed, device, allow_legacy)
    scores, sets = measuring.compared_scores(stage), measuring.sets(stage)
    prompts = len(run.suite.prompts)
    report = {
        "suite": {**to_dict(run.suite), "prompts": prompts, "categories": list(run.suite.categories)},
        "models": {name: to_dict(model) for name, model in run.models.items()},
        "settings": [to_dict(setting) for setting in run.settings],
        "per_prompt": run.plan.per_prompt,
        "seed": run.plan.seed,
        "stage": next(iter(stages.values())),
        "code": run.plan.code,
        "command": run.plan.command,
        "environment": {"torch": torch.__version__, "device": str(device)},
        "references": None if reference is None else reference.describe(),
        "metrics": scores,
        "sets": sets,
        "sweeps": make_sweeps(run, scores, sets),
        "cascade": cascade_measures(run, measuring.scores),
        "warnings": list(_warnings(run, reference, scores, sets)),
    }
    report = _rounded(report)
    _write(run.folder / REPORT, report)
    return report


def _specs(run: Run, metrics: Sequence[str], references: Path | None) -> list[Spec]:
    """What to measure with: as asked, or what there is without a download; own-clip with its folder."""
    specs = parse(metrics)
    own_clip = _own_clip(run) if not specs or ("own-clip", "") in specs else None
    if not specs:
        words = any(prompt.rendered for prompt in run.suite.prompts) and find_spec("rapidocr") is not None
        there = {"own-clip": own_clip is not None, "ocr": words, "efficientnet": references is not None}
        specs = [(name, "") for name, is_there in there.items() if is_there]
    elif own_clip is None and ("own-clip", "") in specs:
        raise InputError(f"metric own-clip: no model of {run.folder} has a CLIP; own-clip=MODEL names one")
    return [
        (name, source or own_clip or "") if name == "own-clip" else (name, source) for name, source in specs
    ]


def _own_clip(run: Run) -> str | None:
    """The model folder whose CLIP scores the pictures of all models: the first one that has a CLIP."""
    for model in run.models.values():
        if model.kind == "cascade":
            folder = resolve_source(model_source(model))
            if "clip" in read_index(folder).components:
                return str(folder)
    return None


def _warnings(run: Run, reference: Reference | None, scores: Table, sets: Table) -> Iterator[str]:
    """What a reader should know before the figures."""
    yield from run.suite.warnings
    yield from dict.fromkeys(entry["note"] for entry in scores.values() if "note" in entry)
    counts = [c["count"] for entry in sets.values() for m in entry["values"].values() for c in m.values()]
    if reference is not None and reference.pictures:
        counts.append(len(reference.pictures))
    if counts and min(counts) < FEW:
        yield (
            f"Distances of sets are of {min(counts)} pictures: below {FEW:,} they are biased, and comparable "
            "at the same number only."
        )
    if not scores and not sets:
        yield "Nothing was scored: there is no metric that needs no download. See --metrics."


def _rounded(value: Any) -> Any:
    """The same with DIGITS significant digits in every figure, for the last ones depend on the machine."""
    if isinstance(value, dict):
        return {str(key): _rounded(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(each) for each in value]
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value


def _write(path: Path, report: Table) -> None:
    """Complete or absent."""
    temporary = path.with_name(f".{path.name}.tmp")
    text = json.dumps(report, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False)
    try:
        temporary.write_text(text + "\n", encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from None
