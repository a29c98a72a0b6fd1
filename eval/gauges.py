"""The measures by name: which extractor each one needs, and what is read off its rows.

On the command line a gauge is NAME or NAME=SOURCE; NAMES lists them. A gauge gives scores of single pictures,
which are averaged over prompts, or measures of a whole set against real pictures, or both.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from cascade.errors import InputError, unknown
from eval.extractors.base import Extractor
from eval.metrics.alignment import clip_score, cosine, recall_at, text_ranks


@dataclass(frozen=True)
class Seen:
    """What there is to score pictures by."""

    extractor: Extractor
    rows: Tensor  # N D, of the pictures
    texts: Tensor | None  # P D, of all different prompts, where the extractor is of a joint space
    own: Tensor  # N integers, the prompt of each picture among those

    def cosines(self) -> Tensor:
        """N, of each picture and its own prompt."""
        assert self.texts is not None
        return cosine(self.rows, self.texts[self.own])

    def ranks(self) -> Tensor:
        assert self.texts is not None
        return text_ranks(self.rows, self.texts, self.own)


@dataclass(frozen=True)
class Score:
    """A figure of each picture."""

    name: str
    title: str
    unit: str
    of: Callable[[Seen], Tensor]  # N


@dataclass(frozen=True)
class Gauge:
    """loader: MODULE:CLASS under eval.extractors, imported when it is asked for. source: what stands after =,
    "" where nothing does."""

    loader: str
    source: str = ""
    scores: tuple[Score, ...] = ()
    sets: tuple[str, ...] = ()  # "fd", and keys of `distances.OF_FEATURES`
    label: str = ""  # of its set measures: "FD, label"
    options: tuple[tuple[str, Any], ...] = ()
    words_only: bool = False  # sees only prompts that ask for words
    pickles: bool = False  # whether its weights may come as pickles, where they are allowed
    note: str = ""

    def load(self, source: str, allow_legacy: bool = False) -> Extractor:
        module, _, name = self.loader.partition(":")
        make = getattr(importlib.import_module(f"eval.extractors.{module}"), name)
        arguments = [source] if self.source else []
        options = dict(self.options) | ({"allow_legacy": allow_legacy} if self.pickles else {})
        return cast(Extractor, make(*arguments, **options))


def _clip(prefix: str, title: str) -> tuple[Score, ...]:
    return (
        Score(f"{prefix}_cosine", f"{title}: cosine to the prompt", "cosine", Seen.cosines),
        Score(f"{prefix}_score", f"{title} score, 2.5 max(cosine, 0)", "", lambda s: clip_score(s.cosines())),
        Score(f"{prefix}_r1", f"{title}: R@1 among all prompts", "share", lambda s: recall_at(s.ranks(), 1)),
        Score(f"{prefix}_r5", f"{title}: R@5 among all prompts", "share", lambda s: recall_at(s.ranks(), 5)),
    )


def _scaled_cosines(seen: Seen) -> Tensor:
    return cast(Any, seen.extractor).scale * seen.cosines()


def _column(place: int) -> Callable[[Seen], Tensor]:
    return lambda seen: seen.rows[:, place].double()


ALL = ("fd", "kid", "prdc")
CLIP_SOURCE = "FOLDER|owner/name|hf-hub:owner/name|local-dir:FOLDER|NAME,WEIGHTS"
GAUGES = {
    "own-clip": Gauge(
        "clip:OwnClip",
        source="MODEL",
        scores=_clip("own_clip", "Own CLIP"),
        note="The own CLIP gave the model's prior its targets: its scores flatter the model, and say nothing "
        "about models of other makers.",
    ),
    "clip": Gauge("clip:load_clip", CLIP_SOURCE, _clip("clip", "CLIP"), pickles=True),
    "ocr": Gauge(
        "lettering:Lettering",
        scores=(
            Score("ocr_similarity", "Lettering: 1 - normalised edit distance", "share", _column(0)),
            Score("ocr_exact", "Lettering: words shown whole", "share", _column(1)),
        ),
        words_only=True,
    ),
    "aesthetic": Gauge(
        "clip:Aesthetic",
        "FILE[,CLIP]",
        (Score("aesthetic", "Aesthetic predictor", "mark, 1 to 10", _column(0)),),
        pickles=True,
    ),
    "pickscore": Gauge(
        "clip:load_clip",
        CLIP_SOURCE,
        (Score("pickscore", "PickScore", "scaled cosine", _scaled_cosines),),
        pickles=True,
    ),
    "hpsv2": Gauge(
        "clip:load_hpsv2",
        "FILE[,NAME]",
        (Score("hpsv2", "HPSv2", "cosine", Seen.cosines),),
        pickles=True,
        note="Comparable on the same prompts and by the same version of the weights only.",
    ),
    "imagereward": Gauge(
        "reward:ImageReward",
        "FOLDER|owner/name",
        (Score("imagereward", "ImageReward", "standard deviations", _column(0)),),
        pickles=True,
    ),
    "efficientnet": Gauge("vision:EfficientNetLite0", sets=ALL, label="EfficientNet-Lite0 (not FID)"),
    "inception": Gauge("vision:Inception", "FILE|owner/name/FILE", sets=ALL, label="Inception", pickles=True),
    "inception-clean": Gauge(
        "vision:Inception",
        "FILE|owner/name/FILE",
        sets=ALL,
        label="Inception, clean resize",
        pickles=True,
        options=(("antialias", True),),
    ),
    "dinov2": Gauge("vision:DINOv2", "FOLDER|owner/name", sets=ALL, label="DINOv2"),
    "cmmd": Gauge("clip:load_clip", CLIP_SOURCE, sets=("cmmd",), label="CLIP", pickles=True),
}
IMPORTS = {  # results of scorers elsewhere (see `eval.exchange`) -> what stands after =
    "geneval": "FOLDER",
    "vqascore": "FOLDER",
    "scores": "FILE.csv",
}
NAMES = (*GAUGES, *IMPORTS)
SET_TITLES = {
    "fd": "Frechet distance, {}",
    "kid": "KID, {}",
    "cmmd": "CMMD, {}",
    "precision": "Precision, {}",
    "recall": "Recall, {}",
    "density": "Density, {}",
    "coverage": "Coverage, {}",
}
FID = {"inception": "fid", "inception-clean": "fid_clean"}  # the names that the field knows
Spec = tuple[str, str]  # name, source


def set_name(kind: str, gauge: str) -> str:
    """Name of a set measure in a report: fid, fd_dinov2, precision_efficientnet, cmmd, ..."""
    if kind == "fd":
        return FID.get(gauge, f"fd_{gauge}")
    return kind if kind == gauge else f"{kind}_{gauge.replace('-', '_')}"


def parse(texts: Sequence[str]) -> list[Spec]:
    """NAME or NAME=SOURCE. Raises InputError for an unknown name, one without the source it needs or with one
    it has no use for, and one that is given twice. "own-clip" may name another model's folder."""
    specs: list[Spec] = []
    for text in texts:
        name, given, source = text.partition("=")
        if name not in NAMES:
            raise unknown("metric", name, NAMES)
        needed = GAUGES[name].source if name in GAUGES else IMPORTS[name]
        if needed and not source and name != "own-clip":
            raise InputError(f"metric {name}: expected {name}={needed}")
        if given and not needed:
            raise InputError(f"metric {text}: expected {name} alone")
        if name in (other for other, _ in specs):
            raise InputError(f"metric {name} is given twice: expected it once")
        if name in IMPORTS and not Path(source).exists():
            raise InputError(f"metric {name}: no file or folder {source}")
        specs.append((name, source))
    return specs
