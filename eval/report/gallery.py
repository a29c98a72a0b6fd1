"""Pictures of a run for the report: every prompt by category, the worst and best prompts of a metric, those
where two models differ most, and what the settings of the cascade-only studies draw."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.pages import data_uri, open_picture
from eval.report.charts import estimate
from eval.run import Item, Run, Setting

BUDGET = 64_000_000  # pixels in all embedded pictures: about 10 MB as WebP
SIZES = (256, 192, 128)  # px of an embedded picture, where the budget allows
SHOWN = (4, 2, 1)  # pictures of a prompt
SMALL = 64  # px where it allows none of these
PROMPTS = 1000  # of which the report shows pictures
DETAIL = 128
EXTREMES = 10  # prompts at each end of a metric
STUDY_PROMPTS = 6


@dataclass(frozen=True)
class Shot:
    uri: str
    alt: str
    file: str  # relative to the run folder


@dataclass(frozen=True)
class Strip:
    """Pictures of one prompt by one model, at one stage and setting (places in the page's switches; None:
    shown whatever the switch says)."""

    model: str
    setting: int | None
    stage: int | None
    shots: tuple[Shot, ...]


@dataclass(frozen=True)
class Block:
    prompt: int
    text: str
    strips: tuple[Strip, ...]
    value: str = ""


@dataclass(frozen=True)
class Extremes:
    """The ends of one list of values by prompt: (heading, prompts) pairs."""

    title: str
    ends: tuple[tuple[str, tuple[Block, ...]], ...]


class Gallery:
    """`px` fixes the size of the embedded pictures; None lets the budget choose it."""

    def __init__(self, run: Run, px: int | None = None) -> None:
        self.run = run
        self.settings: list[Setting] = [s for s in run.settings if not s.study or "guidance" in s.study]
        drawn = [model for model in run.models.values() if model.kind == "cascade"]
        self.stages = list(dict.fromkeys(name for model in drawn for name in model.stages))
        self.prompts = self._first_prompts()
        self.shown, self.px = self._affordable(px)
        self._items: dict[tuple[str, str, int], list[Item]] = defaultdict(list)
        for item in run.items:
            self._items[item.model, item.setting, item.prompt].append(item)
        self._uris: dict[tuple[str, int], str] = {}
        self.detail_px = min(self.px, DETAIL)  # outside of the categories

    def categories(self) -> list[tuple[str, list[Block]]]:
        """The shown prompts with the pictures of all models, shown settings and stages."""
        blocks: dict[str, list[Block]] = {name: [] for name in self.run.suite.categories}
        for index in self.prompts:
            prompt = self.run.suite.prompts[index]
            strips = [
                self._strip(index, model, setting, stage)
                for setting in range(len(self.settings))
                for model, info in self.run.models.items()
                for stage in ([None] if info.kind == "pictures" else range(len(self.stages)))
                if stage is None or self.stages[stage] in info.stages
            ]
            blocks[prompt.category].append(Block(index, prompt.text, tuple(strips)))
        return list(blocks.items())

    def extremes(self, metric: dict[str, Any], stage: str | None) -> list[Extremes]:
        """The worst and best prompts of each model at the first setting, then those where two models are
        furthest apart. `stage` is the one that was measured."""
        setting = self.settings[0].id
        found = {
            model: {int(prompt): value for prompt, value in by_setting[setting]["prompts"].items()}
            for model, by_setting in metric["values"].items()
            if setting in by_setting
        }
        better = metric["higher_is_better"]
        results = []
        for model, values in found.items():
            low, high = self._ends(values, [model], stage)
            ends = (("Worst", low), ("Best", high)) if better else (("Worst", high), ("Best", low))
            results.append(Extremes(f"Model {model}", ends))
        if len(found) == 2:
            a, b = found.values()
            apart = {prompt: a[prompt] - b[prompt] for prompt in a if prompt in b}
            low, high = self._ends(apart, list(found), stage, sign=True)
            first, second = (high, low) if better else (low, high)
            ends = (("A is furthest ahead", first), ("B is furthest ahead", second))
            results.append(Extremes("A minus B", ends))
        return results

    def studies(self) -> list[tuple[str, list[str], list[tuple[str, list[Shot]]]]]:
        """(study, headings, rows of prompt and pictures): a prompt of each of the first categories, drawn by
        model A at every setting of a study."""
        firsts = {self.run.suite.prompts[index].category: index for index in reversed(self.prompts)}
        chosen = sorted(firsts.values())[:STUDY_PROMPTS]
        names = dict.fromkeys(s.study for s in self.run.settings if s not in self.settings)
        tables = []
        for study in names:
            settings = [self.settings[0], *(s for s in self.run.settings if s.study == study)]
            rows = []
            for index in chosen:
                items = [self._items["A", s.id, index][0] for s in settings]
                shots = [self._shot(item, self.run.stage("A"), self.detail_px) for item in items]
                rows.append((self.run.suite.prompts[index].text, shots))
            tables.append((study, [s.label or s.id for s in settings], rows))
        return tables

    def _first_prompts(self) -> list[int]:
        """All prompts of a suite of usual size; of a larger one the first of each category."""
        most, shown, taken = PROMPTS // len(self.run.suite.categories), [], Counter[str]()
        for index, prompt in enumerate(self.run.suite.prompts):
            taken[prompt.category] += 1
            if taken[prompt.category] <= most:
                shown.append(index)
        return shown

    def _affordable(self, px: int | None) -> tuple[int, int]:
        """(pictures of a prompt, px) that the budget allows."""
        sizes = SIZES if px is None else (px,)
        for shown in (min(n, self.run.plan.per_prompt) for n in SHOWN):
            for size in sizes:
                if shown * self._pixels(size) <= BUDGET:
                    return shown, size
        return 1, SMALL if px is None else px

    def _pixels(self, px: int) -> int:
        """Of one picture a prompt at every shown setting, by every model and stage."""
        one = sum(min(px, own) ** 2 for model in self.run.models.values() for own in model.stages.values())
        return one * len(self.settings) * len(self.prompts)

    def _strip(self, prompt: int, model: str, setting: int, stage: int | None) -> Strip:
        name = self.run.stage(model, None if stage is None else self.stages[stage])
        return Strip(model, setting, stage, self._shots(model, setting, prompt, name, self.px))

    def _ends(
        self, values: dict[int, float], models: Sequence[str], stage: str | None, sign: bool = False
    ) -> tuple[tuple[Block, ...], tuple[Block, ...]]:
        """The prompts of lowest and of highest value, the furthest out first."""
        order = sorted(values, key=lambda prompt: (values[prompt], prompt))
        count = min(EXTREMES, len(order) // 2)

        def block(prompt: int) -> Block:
            strips = [
                Strip(
                    model,
                    None,
                    None,
                    self._shots(model, 0, prompt, self.run.stage(model, stage), self.detail_px),
                )
                for model in models
            ]
            text = self.run.suite.prompts[prompt].text
            return Block(prompt, text, tuple(strips), estimate(values[prompt], None, None, sign)[0])

        return tuple(map(block, order[:count])), tuple(map(block, order[::-1][:count]))

    def _shots(self, model: str, setting: int, prompt: int, stage: str, px: int) -> tuple[Shot, ...]:
        items = self._items[model, self.settings[setting].id, prompt][: self.shown]
        return tuple(self._shot(item, stage, px) for item in items)

    def _shot(self, item: Item, stage: str, px: int) -> Shot:
        name = (item.sha256[stage], px)
        if name not in self._uris:
            self._uris[name] = data_uri(open_picture(self.run.path(item, stage)), px)
        alt = f"picture {item.k + 1} of “{item.text}” by model {item.model}, {stage}"
        return Shot(self._uris[name], alt, Path(item.files[stage]).as_posix())
