"""What the extractors of a run's metrics say of its pictures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cascade.errors import InputError
from eval import exchange
from eval.distances import FEW, OF_FEATURES, frechet
from eval.extractors.base import Extractor, JointExtractor
from eval.features import Picture, picture_rows, text_rows
from eval.gauges import GAUGES, SET_TITLES, Seen, Spec, set_name
from eval.metrics.frechet import Moments, moments
from eval.reference import Reference
from eval.run import Item, Run
from eval.score_table import Column, compare, estimate
from eval.statistics import make_groups

FEATURES = "features"
GROUPS = 20  # of prompts, left out one at a time for the intervals of distances
HIGHER = {"precision", "recall", "density", "coverage"}  # measures of sets of which more is better
SHARES = {"geneval"}  # scores from elsewhere that are shares of hits
BALANCED = {"geneval"}  # scores whose overall figure is the mean over categories
Table = dict[str, Any]


class Measuring:
    """A run and its extractors, loaded once. `columns` are pairs (model, setting)."""

    def __init__(
        self,
        run: Run,
        specs: Sequence[Spec],
        reference: Reference | None,
        seed: int,
        device: torch.device | str,
        allow_legacy: bool = False,
    ) -> None:
        """allow_legacy: read networks that are pickles. Raises InputError where an extractor cannot be
        loaded, or has nothing to compare with."""
        self.run, self.reference, self.seed = run, reference, seed
        self.texts = list(dict.fromkeys(prompt.text for prompt in run.suite.prompts))
        self.place = {text: place for place, text in enumerate(self.texts)}
        self.categories = [prompt.category for prompt in run.suite.prompts]
        self.imported: dict[str, tuple[Path, exchange.Found]] = {}
        for kind, source in specs:
            if kind in exchange.IMPORTS:
                found = exchange.IMPORTS[kind](run, Path(source))
                self.imported |= {name: (Path(source), figures) for name, figures in found.items()}
        self.extractors: dict[str, Extractor] = {}
        for name, source in specs:
            if name in GAUGES:
                if not GAUGES[name].scores and reference is None:
                    raise InputError(f"metric {name} compares with real pictures: expected --references")
                self.extractors[name] = GAUGES[name].load(source, allow_legacy)
                self.extractors[name].to(device)

    # -- scores of single pictures ---------------------------------------------------------------------------

    def scores(self, stage: str | None = None) -> Table:
        """report.json's metrics by name, without the comparison: of the pictures of a stage, by default of
        the last one, of every model that has it."""
        return {name: entry for name, entry, _ in self._scores(stage)}

    def compared_scores(self, stage: str | None = None) -> Table:
        """The same with the scores that came from elsewhere, and with A against B where there are both."""
        found: Table = {}
        for name, entry, columns in [*self._scores(stage), *self._imported()]:
            found[name] = entry
            if len(self.run.models) > 1:
                higher, balanced = entry["higher_is_better"], name in BALANCED
                entry["comparison"] = compare(columns, self.categories, self.seed, higher, balanced)
        return found

    def _scores(self, stage: str | None) -> Iterator[tuple[str, Table, dict[Column, Tensor]]]:
        for name, extractor in self.extractors.items():
            gauge = GAUGES[name]
            if not gauge.scores:
                continue
            texts = None
            if isinstance(extractor, JointExtractor):
                texts = text_rows(extractor, self.texts, self._file("texts", name))
            seen = {}
            for column, items in self._columns(stage):
                items = [i for i in items if self._wanted(i) is not None] if gauge.words_only else items
                if items:
                    own = torch.tensor([self.place[item.text] for item in items])
                    rows = self._rows(name, column, items, stage)
                    seen[column] = items, Seen(extractor, rows, texts, own)
            for score in gauge.scores:
                columns = {c: self._by_prompt(items, score.of(s)) for c, (items, s) in seen.items()}
                entry = {
                    "title": score.title,
                    "unit": score.unit,
                    "higher_is_better": True,
                    "model": extractor.network,
                    "resize": extractor.resize,
                    "values": estimate(columns, self.categories, self.seed, share=score.unit == "share"),
                }
                yield score.name, entry | ({"note": gauge.note} if gauge.note else {}), columns

    def _imported(self) -> Iterator[tuple[str, Table, dict[Column, Tensor]]]:
        for name, (source, found) in self.imported.items():
            columns = {
                column: self._by_prompt(self.run.select(*column), torch.tensor(values))
                for column, values in found.items()
            }
            entry = {
                "title": exchange.TITLES.get(name, name),
                "unit": "",
                "higher_is_better": True,
                "model": f"scored elsewhere, read from {source.name}",
                "resize": "the scorer's own",
                "values": estimate(columns, self.categories, self.seed, name in BALANCED, name in SHARES),
            }
            yield name, entry, columns

    def _by_prompt(self, items: Sequence[Item], scores: Tensor) -> Tensor:
        """Mean over each prompt's pictures, NaN for a prompt without one: P."""
        prompts, count = torch.tensor([item.prompt for item in items]), len(self.categories)
        totals = torch.zeros(count, dtype=torch.float64).index_add(0, prompts, scores.double())
        return totals / prompts.bincount(minlength=count)

    # -- measures of sets ------------------------------------------------------------------------------------

    def sets(self, stage: str | None = None) -> Table:
        """report.json's sets: the pictures of each column against the real ones."""
        found: Table = {}
        for name, extractor in self.extractors.items():
            gauge = GAUGES[name]
            if self.reference is None or not gauge.sets:
                continue
            real = self._real(name, extractor)
            for (model, setting), items in self._columns(stage):
                rows = self._rows(name, (model, setting), items, stage)
                if isinstance(real, Moments) and len(real.mean) != rows.shape[1]:
                    of = f"{self.reference.path} holds statistics of {len(real.mean)} features"
                    raise InputError(f"{of}: {name} has {rows.shape[1]}")
                for kind, cell in self._distances(gauge.sets, real, rows, items).items():
                    entry = found.setdefault(
                        set_name(kind, name),
                        {
                            "title": SET_TITLES[kind].format(gauge.label),
                            "higher_is_better": kind in HIGHER,
                            "model": extractor.network,
                            "resize": extractor.resize,
                            "values": {},
                        },
                    )
                    entry["values"].setdefault(model, {})[setting] = cell
        return found

    def _distances(
        self, kinds: Sequence[str], real: Tensor | Moments, rows: Tensor, items: Sequence[Item]
    ) -> Table:
        """By measure: value, interval, number of pictures and what is to be said of that."""
        group_of = make_groups(len(self.categories), GROUPS, self.seed)
        groups = group_of[torch.tensor([item.prompt for item in items])].unique(return_inverse=True)[1]
        found = {}
        if "fd" in kinds:
            fitted = real if isinstance(real, Moments) else moments(real)
            found |= frechet(fitted, rows, groups)
        if isinstance(real, Tensor):
            for kind in kinds:
                if kind in OF_FEATURES:
                    found |= OF_FEATURES[kind](real, rows, groups, self.seed)
        count = len(rows) if isinstance(real, Moments) else min(len(rows), len(real))
        few = None
        if count < FEW:
            few = f"{count} pictures: fewer than {FEW:,} tell large differences alone, and bias the distance"
        return {k: {**asdict(v), "count": len(rows), "warning": few} for k, v in found.items()}

    def _real(self, name: str, extractor: Extractor) -> Tensor | Moments:
        assert self.reference is not None
        if self.reference.moments is None:
            return picture_rows(extractor, self.reference.pictures, self._file("reference", name))
        return self.reference.moments

    # -- rows ------------------------------------------------------------------------------------------------

    def _columns(self, stage: str | None) -> Iterator[tuple[Column, list[Item]]]:
        """The items of each column that has pictures of the stage."""
        for model, info in self.run.models.items():
            if stage is None or stage in info.stages or info.kind == "pictures":
                for setting in self.run.settings:
                    items = self.run.select(model, setting.id)
                    if all(self.run.stage(model, stage) in item.files for item in items):
                        yield (model, setting.id), items

    def _rows(self, name: str, column: Column, items: Sequence[Item], stage: str | None) -> Tensor:
        model, setting = column
        stage = self.run.stage(model, stage)
        words_only = GAUGES[name].words_only
        pictures = [
            Picture(
                self.run.folder / item.files[stage],
                item.sha256[stage],
                (self._wanted(item) or "") if words_only else item.text,
            )
            for item in items
        ]
        return picture_rows(self.extractors[name], pictures, self._file(f"{model}/{setting}/{stage}", name))

    def _wanted(self, item: Item) -> str | None:
        """The words that a picture is to show."""
        return self.run.suite.prompts[item.prompt].rendered

    def _file(self, place: str, name: str) -> Path:
        return self.run.folder / FEATURES / place / f"{name}.safetensors"
