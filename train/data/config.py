"""What a recipe says about its pictures."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from cascade.errors import unknown

EMOJI_FOLDER = "data/emoji"


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which pictures, which of them, how often, and how their captions are composed."""

    name: Literal["emoji", "folder", "hub", "parquet", "webdataset"] = "emoji"
    # emoji and folder: where the pictures are; the others: where index, caches and quarantine go
    folder: str = EMOJI_FOLDER

    # emoji: styles, of which the first that shows a thing is meant where none is named, how often skin-toned
    # variants, and weights of the caption forms label + style; label + tags + style; label; phrases such as
    # people use (train.data.phrases)
    styles: tuple[str, ...] = ("twemoji", "noto", "fluent")
    toned_period: int = 5  # a skin-toned variant takes part in one epoch of this many
    caption_weights: tuple[float, float, float, float] = (0.7, 0.2, 0.1, 0.0)

    # hub: a data set of the Hugging Face hub
    hub: str | None = None  # owner/name
    subset: str | None = None
    revision: str | None = None
    split: str = "train"
    # parquet and webdataset: paths and URLs; {000..123} counts and, in paths, * matches
    files: tuple[str, ...] = ()

    # folder, hub, parquet, webdataset: columns of the table, or of the .json beside a picture in a tar file
    image: str = "image"  # picture files, of a table
    captions: dict[str, float] = field(default_factory=lambda: {"text": 1.0})  # column -> weight
    tags: tuple[str, ...] = ()  # those of them that are lists of tags, which are joined by commas
    tag_drop: float = 0.0  # probability with which each tag is left out

    # which pictures take part in training
    min_px: int = 1  # of the shorter side; a stage also asks for its own size
    max_aspect: float = math.inf  # longer side / shorter side
    # column -> least, most
    ranges: dict[str, tuple[float | None, float | None]] = field(default_factory=dict)
    heldout: float = 0.01  # share that is kept from training (emoji has its own rule)
    crop: Literal["centre", "random"] = "centre"  # the square that is cut out of a picture

    max_pixels: int = 2**26  # of a picture; larger ones are not decoded
    max_bad: float = 0.01  # share of unreadable and larger pictures that is borne

    # webdataset: shards in the order of an epoch, read one after another, rather than any picture at any time
    streaming: bool = False
    window: int = 10_000  # pictures among which the order is shuffled
    lanes: int = 1  # parts of an epoch that are read side by side; with as many processes, each reads its own
    cache_gb: float = 100.0  # disk space for copies of shards that are URLs

    text_cache: str | None = None  # of train.embed; default: in `folder`, one for each encoder

    @property
    def choice(self) -> str:
        """What tells the pictures and captions of this recipe from those of others of the same folder."""
        parts = (self.name, self.styles, self.hub, self.subset, self.revision, self.split, self.files)
        return repr((*parts, self.image, list(self.captions), self.tags))

    def __post_init__(self) -> None:
        self._check_emoji()
        self._check_place()
        expect = self._expect
        weights = self.captions.values()
        expect("captions", all(0 <= w < math.inf for w in weights) and sum(weights) > 0, "weights above 0")
        for column in self.tags:
            if column not in self.captions:
                raise unknown("column", column, self.captions, where="data.tags")
        expect("tag_drop", 0 <= self.tag_drop < 1, "a number from 0 to below 1")
        for name in ("min_px", "max_pixels", "window", "lanes"):
            expect(name, getattr(self, name) >= 1, "an integer of at least 1")
        expect("max_aspect", self.max_aspect >= 1, "a number of at least 1")
        for column, (least, most) in self.ranges.items():
            holds = least is None or most is None or least <= most
            expect(f"ranges.{column}", holds, "[least, most]", [least, most])
        for name in ("heldout", "max_bad"):
            expect(name, 0 <= getattr(self, name) < 1, "a number from 0 to below 1")
        expect("cache_gb", self.cache_gb > 0, "a number above 0")
        expect("streaming", not self.streaming or self.name == "webdataset", "data.name webdataset with it")

    def _check_emoji(self) -> None:
        if not self.styles or len(set(self.styles)) != len(self.styles):
            raise ValueError(f"styles {list(self.styles)}: expected at least one, each once")
        if self.toned_period < 1:
            raise ValueError(f"toned_period {self.toned_period}: expected an integer of at least 1")
        if min(self.caption_weights) < 0 or not 0 < sum(self.caption_weights) < math.inf:
            raise ValueError(f"caption_weights {list(self.caption_weights)}: expected none below 0")

    def _check_place(self) -> None:
        own = self.name == "emoji" or self.folder != EMOJI_FOLDER
        self._expect("folder", own, f"a folder of its own for data.name {self.name}")
        given = {"hub": self.hub is not None, "files": bool(self.files)}
        wanted = {"hub": self.name == "hub", "files": self.name in ("parquet", "webdataset")}
        for key, holds in given.items():
            if holds != wanted[key]:
                kinds = "data.name hub" if key == "hub" else "data.name parquet or webdataset"
                expected = f"a value for data.name {self.name}" if wanted[key] else f"{kinds} with it"
                raise ValueError(f"{key} {getattr(self, key)!r}: expected {expected}")
        for file in self.files:
            if file.startswith("pipe:"):
                raise ValueError(f"files {file!r}: expected a path or a URL, no command")

    def _expect(self, name: str, holds: object, expected: str, value: object = None) -> None:
        if not holds:
            found = getattr(self, name) if value is None else value
            raise ValueError(f"{name} {found!r}: expected {expected}")
