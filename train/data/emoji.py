"""The emoji set, built by `train.emoji`: square pictures of known quality, each in the style it names."""

from __future__ import annotations

import json
import os
from bisect import bisect_right
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from cascade import random
from cascade.errors import InputError, unknown
from cascade.progress import tracked
from train.data import phrases
from train.data.config import DataConfig
from train.data.decode import read_file
from train.data.pictures import PictureSet, weighted
from train.files import whole_file

KEYS = (
    "file_name",
    "text",
    "label",
    "tags",
    "style",
    "tone",
    "gender",
    "split",
)  # of a record: what training reads
CACHED_PX = 256  # larger pictures are decoded one by one: all of them would fit neither memory nor disk


class EmojiPictures(PictureSet):
    """`records` are the lines of metadata.jsonl in the styles of the recipe."""

    subjects = True

    def __init__(self, cfg: DataConfig) -> None:
        super().__init__(cfg)
        rows = _read_records(self.folder / "metadata.jsonl")
        known = sorted({row["style"] for row in rows})
        for style in cfg.styles:
            if style not in known:
                raise unknown("style", style, known, where=str(self.folder))
        self.records = [row for row in rows if row["style"] in cfg.styles]
        self._captions: dict[int, list[str]] = {}
        self._plain = _plain_styles(self.records, cfg.styles)
        self.train = [i for i, r in enumerate(self.records) if r["split"] == "train"]
        self.heldout = [i for i, r in enumerate(self.records) if r["split"] == "heldout"]
        if not self.train:
            raise InputError(f"{self.folder}: expected records of split 'train', found none")

    def __len__(self) -> int:
        return len(self.records)

    def name(self, index: int) -> str:
        return self.records[index]["file_name"]

    def siblings(self, index: int) -> Sequence[int]:
        """The same emoji in the styles in which it is for training."""
        return self._subjects[self.records[index]["label"]]

    @cached_property
    def _subjects(self) -> dict[str, list[int]]:
        found: dict[str, list[int]] = {}
        for index in self.train:
            found.setdefault(self.records[index]["label"], []).append(index)
        return found

    def encoded(self, index: int) -> bytes:
        return read_file(self.name(index), self.folder / self.name(index))

    def captions(self, index: int) -> list[str]:
        """The forms in the order of `caption_weights`, of which the last is several phrases.

        A caption that names no style is of the first of `styles` that shows the same for training: a model
        that learned it of all styles would draw something between them."""
        if index not in self._captions:
            self._captions[index] = self._forms(self.records[index])
        return self._captions[index]

    def _forms(self, r: dict) -> list[str]:
        tags = [t for t in r["tags"] if t not in r["label"].lower()][:3]
        tagged = phrases.in_style(", ".join([r["label"], *tags]), r["style"])
        plain = self._plain.get(r["label"]) == r["style"]
        others = [r["label"], *phrases.phrases(r)]
        return [r["text"], tagged, *(x if plain else phrases.in_style(x, r["style"]) for x in others)]

    def caption(self, index: int, seed: int) -> str:
        return self.captions(index)[weighted(self._weights, seed)]

    @cached_property
    def _weights(self) -> list[float]:
        *forms, phrase = self.cfg.caption_weights
        return [*forms, *[phrase / phrases.COUNT] * phrases.COUNT]

    def order(self, seed: int, min_px: int = 1) -> Periodic:
        return Periodic(self, seed)

    def epoch(self, seed: int, number: int) -> np.ndarray:
        """The pictures of one epoch in their order. A picture of period p takes part in one epoch of p."""
        chosen = [i for i in self.train if (random.key(0, i) + number) % self.period(i) == 0]
        order = torch.randperm(len(chosen), generator=random.generator(seed, "epoch", number))
        return np.asarray(chosen, dtype=np.int64)[order.numpy()]

    def period(self, index: int) -> int:
        """In one epoch of how many a picture takes part."""
        return 1 if self.records[index]["tone"] is None else self.cfg.toned_period

    def pixels(self, px: int) -> np.ndarray | None:
        """Made once by the antialiased filter, and again when the data set is another one. Raises BadPicture
        where a picture is not whole."""
        if px > CACHED_PX:
            return None
        path = self.folder / "cache" / f"{'-'.join(sorted(self.cfg.styles))}-{px}.npy"
        if not self._is_current(path, px):
            self._make_pixels(path, px)
        return np.load(path, mmap_mode="c").view(np.ndarray)

    def _is_current(self, path: Path, px: int) -> bool:
        """Whether the cache holds these records: the count, and a look at three pictures."""
        if not path.exists():
            return False
        array, last = np.load(path, mmap_mode="r"), len(self.records) - 1
        if array.shape != (last + 1, px, px, 3):
            return False
        for i in (0, last // 2, last):
            gap = array[i].astype(np.int16) - self.resized(i, px).permute(1, 2, 0).numpy()
            if np.abs(gap).mean() > 1:  # decoders differ by less
                return False
        return True

    def _make_pixels(self, path: Path, px: int) -> None:
        with whole_file(path) as part:
            array = np.lib.format.open_memmap(part, "w+", np.uint8, (len(self.records), px, px, 3))

            def make(i: int) -> None:
                array[i] = self.resized(i, px).permute(1, 2, 0).numpy()

            with ThreadPoolExecutor(os.cpu_count()) as pool:
                for _ in tracked(
                    pool.map(make, range(len(self.records))), f"pictures at {px} px, once", len(self.records)
                ):
                    pass
            array.flush()


class Periodic:
    """Epochs one after another, each in its keyed order; how long one is depends on the periods."""

    def __init__(self, pictures: EmojiPictures, seed: int) -> None:
        self._pictures, self._seed = pictures, seed
        self._starts = [0]  # of each epoch, and the end of the last one known
        self._epochs: dict[int, np.ndarray] = {}  # the last two used: a batch may lie across a border

    def __getitem__(self, position: int) -> int:
        while position >= self._starts[-1]:
            number = len(self._starts) - 1
            self._starts.append(self._starts[-1] + len(self._epoch(number)))
        number = bisect_right(self._starts, position) - 1
        return int(self._epoch(number)[position - self._starts[number]])

    def replacement(self, position: int, attempt: int) -> int:
        """Any training picture."""
        draw = random.key(self._seed, "replace", position, attempt)
        return self._pictures.train[draw % len(self._pictures.train)]

    def _epoch(self, number: int) -> np.ndarray:
        if number not in self._epochs:
            while len(self._epochs) >= 2:
                del self._epochs[next(iter(self._epochs))]
            self._epochs[number] = self._pictures.epoch(self._seed, number)
        return self._epochs[number]


def _plain_styles(records: list[dict], styles: tuple[str, ...]) -> dict[str, str]:
    """By label, the first of the styles that a training picture of it has."""
    return {
        row["label"]: row["style"]
        for row in sorted(records, key=lambda row: styles.index(row["style"]), reverse=True)
        if row["split"] == "train"
    }


def _read_records(path: Path) -> list[dict]:
    if not path.exists():
        raise InputError(f"no data set in {path.parent}: build it with python -m train.data emoji")
    rows = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            row = json.loads(line)
        except ValueError as error:  # of JSON or of UTF-8
            raise InputError(f"{path}, line {number}: not a JSON record ({error})") from None
        missing = [k for k in KEYS if not isinstance(row, dict) or k not in row]
        if missing:
            raise InputError(f"{path}, line {number}: missing key {missing[0]!r}")
        rows.append(row)
    return rows
