"""Figures that only a cascade has: each stage on its own, and what varying one of its parts does.

A stage's pictures are compared with their input, the picture of the stage before, as the files hold them:

input_difference  mean absolute difference of the downsampled picture and the input, as a share of the range:
                  how far super-resolution strays from what it was asked to enlarge
input_psnr_db     peak signal-to-noise ratio of the same
detail            root mean square, as a share of the range, of what the picture has beyond its downsampled
                  self enlarged again: how much super-resolution added, whether true or not
clipped           share of colour values at 0 or 255: where too much guidance drives pictures, and what
                  thresholding is for (Imagen, arXiv:2205.11487, section 2.3)
real_psnr_db      to the real picture that was downsampled (only with --ablate lowres)

Means are over prompts, with bootstrap intervals.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from cascade.augment import upsample
from cascade.images import downsample, to_uint8
from eval.pictures import load_picture, load_square
from eval.quality import disagreement, psnr
from eval.run import Item, Run, Setting
from eval.statistics import bootstrap_means, percentiles

TITLES = {"prior": "Where the image embedding comes from", "lowres": "What super-resolution enlarges"}
BASELINES = {"prior": "prior", "lowres": "generated pictures"}
NOTE = (
    "Input: the picture of the stage before. Difference and detail are shares of the range; detail is what "
    "a picture has beyond its downsampled self enlarged again; clipped is the share of colour values at 0 or "
    "255, which a white ground is too."
)
Score = Callable[[str], dict[str, Any]]  # a stage's name to what report.json calls metrics
Table = dict[str, Any]


def cascade_measures(run: Run, score: Score) -> dict[str, Table]:
    """The tables of report.json's "cascade": `stages`, and one a study of the run, each with title, note and
    rows of plain values; the interval of a value NAME is NAME_low and NAME_high."""
    measure = _Measure(run, score)
    plain = [setting for setting in run.settings if not setting.study]
    tables = {"stages": measure.table("Each stage on its own", plain, "")} if plain else {}
    for study in dict.fromkeys(setting.study for setting in run.settings if setting.study):
        varied = [setting for setting in run.settings if setting.study == study]
        tables[study] = measure.table(TITLES.get(study, f"{study} varied"), [*plain, *varied], study)
    return {name: table for name, table in tables.items() if table["rows"]}


class _Measure:
    """Rows of the tables, each computed once."""

    def __init__(self, run: Run, score: Score) -> None:
        self.run, self.score = run, score
        self.scores: dict[str, dict[str, Any]] = {}
        self.pictures: dict[tuple[str, ...], dict[str, float]] = {}  # by the hashes of what was compared

    def table(self, title: str, settings: list[Setting], study: str) -> Table:
        rows = [
            self.row(name, setting, stage, study)
            for name, model in self.run.models.items()
            if model.kind == "cascade"
            for stage in _affected(study, list(model.stages))
            for setting in settings
        ]
        return {"title": title, "note": NOTE, "rows": rows}

    def row(self, model: str, setting: Setting, stage: str, study: str) -> dict[str, Any]:
        """One stage of one model at one setting: what networks say of its pictures, and what pixels do."""
        row: dict[str, Any] = {"model": model} if len(self.run.models) > 1 else {}
        row |= {"stage": stage, "px": self.run.models[model].stages[stage]}
        if study:
            row[study] = setting.label or self._default(model, setting, study)
        for metric in self._scores(stage).values():
            overall = metric["values"].get(model, {}).get(setting.id, {}).get("overall")
            if overall is not None:
                ends = {f"{metric['title']}_{end}": overall[end] for end in ("low", "high")}
                row |= {metric["title"]: overall["mean"], **ends}
        return row | self._pixels(model, setting, stage)

    def _default(self, model: str, setting: Setting, study: str) -> str:
        """What is varied in a study, as it is in a setting that does not vary it."""
        if study in BASELINES:
            return BASELINES[study]
        sampling = self.run.models[model].config["sampling"]
        values = []
        for path in study.split(","):
            stage, _, name = path.partition(".")
            default = sampling.get(stage, {}).get(name, "default")  # the prior's defaults are its own
            values.append(str(setting.overrides.get(stage, {}).get(name, default)))
        return ", ".join(values)

    def _scores(self, stage: str) -> dict[str, Any]:
        if stage not in self.scores:
            self.scores[stage] = self.score(stage)
        return self.scores[stage]

    def _pixels(self, model: str, setting: Setting, stage: str) -> dict[str, float]:
        """Means over prompts, with intervals."""
        by_prompt: dict[int, list[dict[str, float]]] = {}
        for item in self.run.select(model, setting.id):
            by_prompt.setdefault(item.prompt, []).append(self._picture(item, setting, stage))
        names = list(next(iter(by_prompt.values()))[0])
        means = [[fmean(found[name] for found in each) for name in names] for each in by_prompt.values()]
        values = torch.tensor(means, dtype=torch.float64)  # P M
        low, high = percentiles(bootstrap_means(values, self.run.plan.seed), len(values)).tolist()
        row = {}
        for place, name in enumerate(names):
            row[name] = values[:, place].mean().item()
            if len(values) > 1:
                row |= {f"{name}_low": low[place], f"{name}_high": high[place]}
        return row

    def _picture(self, item: Item, setting: Setting, stage: str) -> dict[str, float]:
        stages = list(self.run.models[item.model].stages)
        before = stages[stages.index(stage) - 1] if stage != stages[0] else None
        key = (item.sha256[stage], item.sha256.get(before or "", ""), setting.lowres)
        if key not in self.pictures:
            picture = load_picture(self.run.path(item, stage))[None]
            lowres = None if before is None else load_picture(self.run.path(item, before))[None]
            found = compare(picture, lowres)
            reference = self.run.reference(item.prompt)
            if setting.lowres == "real" and lowres is not None and reference is not None:
                real = load_square(reference, picture.shape[-1])[None]
                found["real_psnr_db"] = psnr(picture, real)
            self.pictures[key] = found
        return self.pictures[key]


def compare(picture: Tensor, lowres: Tensor | None) -> dict[str, float]:
    """The figures of a picture 1 3 H W and the input 1 3 h w that it was enlarged from (see the module)."""
    levels = to_uint8(picture)
    found = {"clipped": ((levels == 0) | (levels == 255)).double().mean().item()}
    if lowres is not None:
        height, width = lowres.shape[-2:]
        small = downsample(picture, (height, width))
        again = upsample(small, (picture.shape[-2], picture.shape[-1]), "bicubic")
        found["input_difference"] = disagreement(picture, lowres)
        found["input_psnr_db"] = psnr(small, lowres)
        found["detail"] = ((picture - again).double() / 2).square().mean().sqrt().item()
    return found


def _affected(study: str, stages: list[str]) -> list[str]:
    """The stages whose pictures a study can change."""
    if study == "lowres":
        return stages[1:]
    varied = [path.partition(".")[0] for path in study.split(",")]
    return stages[min((stages.index(name) for name in varied if name in stages), default=0) :]
