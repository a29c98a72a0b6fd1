"""Training data: records, captions, pixels. `python -m train.data RECIPE` fetches and builds a recipe's set.

Everything a training step draws is a function of (seed, position), where the position counts samples over the
whole run; so a step sees the same samples and the same noise at any number of processes and after a resume.
"""

from __future__ import annotations

import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.progress import track
from torch import Tensor

from cascade import random
from cascade.conditioning import TextEmbedding, Tokens
from cascade.errors import InputError
from cascade.images import downsample, from_pil, to_uint8
from cascade.text import load_text_encoder
from train.recipe import DataConfig, Recipe


class PictureSet:
    """The pictures of a built data set. `train` and `heldout` are indices into `records`."""

    def __init__(self, cfg: DataConfig) -> None:
        self.cfg, self.folder = cfg, Path(cfg.folder)
        path = self.folder / "metadata.jsonl"
        if not path.exists():
            raise InputError(f"no data set in {self.folder}: build it with python -m train.data {cfg.name}")
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        self.records = [row for row in rows if row["style"] in cfg.styles]
        self.train = [i for i, r in enumerate(self.records) if r["split"] == "train"]
        self.heldout = [i for i, r in enumerate(self.records) if r["split"] == "heldout"]

    def captions(self, index: int) -> list[str]:
        """The caption forms of a record, in the order of `caption_weights`."""
        r = self.records[index]
        tags = [t for t in r["tags"] if t not in r["label"].lower()][:3]
        return [r["text"], f"{', '.join([r['label'], *tags])}, {r['style']} style", r["label"]]

    def epoch(self, seed: int, number: int) -> np.ndarray:
        """The samples of one epoch in their order. A picture of period p takes part in one epoch of p."""
        chosen = [i for i in self.train if (random.key(0, i) + number) % self.period(i) == 0]
        order = torch.randperm(len(chosen), generator=random.generator(seed, "epoch", number))
        return np.asarray(chosen)[order.numpy()]

    def period(self, index: int) -> int:
        record = self.records[index]
        toned = self.cfg.toned_period if record["tone"] is not None else 1
        return toned * self.cfg.style_period.get(record["style"], 1)

    def order(self, seed: int) -> Order:
        return Order(self, seed)

    def pixels(self, px: int) -> np.ndarray:
        """All pictures at px x px as one uint8 array (N px px 3) on disk, made once by the antialiased filter."""
        path = self.folder / "cache" / f"{'-'.join(sorted(self.cfg.styles))}-{px}.npy"
        if not path.exists():
            self._make_pixels(path, px)
        return np.load(path, mmap_mode="r")

    def picture(self, index: int) -> Tensor:
        """One picture at its full size: 3 1024 1024, uint8."""
        with Image.open(self.folder / self.records[index]["file_name"]) as image:
            return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)

    def _make_pixels(self, path: Path, px: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.{os.getpid()}")
        array = np.lib.format.open_memmap(part, "w+", np.uint8, (len(self.records), px, px, 3))

        def make(i: int) -> None:
            with Image.open(self.folder / self.records[i]["file_name"]) as image:
                small = downsample(from_pil(image)[None], px)
            array[i] = to_uint8(small)[0].permute(1, 2, 0).numpy()

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for _ in track(pool.map(make, range(len(self.records))), f"{px} px", len(self.records)):
                pass
        array.flush()
        part.rename(path)


class Order:
    """Position in the run -> sample: epochs one after another, each in its keyed order."""

    def __init__(self, pictures: PictureSet, seed: int) -> None:
        self._epoch = lru_cache(maxsize=2)(lambda number: pictures.epoch(seed, number))
        self._starts = [0]

    def __getitem__(self, position: int) -> int:
        while position >= self._starts[-1]:
            self._starts.append(self._starts[-1] + len(self._epoch(len(self._starts) - 1)))
        number = int(np.searchsorted(self._starts, position, side="right")) - 1
        return int(self._epoch(number)[position - self._starts[number]])


class TextStore:
    """The encoded captions of a set, ragged and memory-mapped: caption form c of picture i is row 3 i + c."""

    def __init__(self, pictures: PictureSet, reference: dict) -> None:
        encoder = load_text_encoder(reference)
        self.max_length, self.dims = encoder.max_length, encoder.dims
        captions = [c for i in range(len(pictures.records)) for c in pictures.captions(i)]
        digest = f"{random.key(0, json.dumps(reference, sort_keys=True), *captions):016x}"
        path = pictures.folder / "cache" / f"text-{digest}.npz"
        if not path.exists():
            _encode_captions(encoder, captions, path)
        arrays = {name: np.load(path.with_suffix(f".{name}.npy"), mmap_mode="r") for name in ("states", "ends")}
        self._states, self._ends = arrays["states"], arrays["ends"]

    def __call__(self, rows: list[int]) -> TextEmbedding:
        """Token states of caption rows, padded to the encoder's length."""
        states = torch.zeros(len(rows), self.max_length, self.dims[0])
        mask = torch.zeros(len(rows), self.max_length, dtype=torch.bool)
        for k, row in enumerate(rows):
            start, end = (self._ends[row - 1] if row else 0), self._ends[row]
            states[k, : end - start] = torch.from_numpy(self._states[start:end].astype(np.float32))
            mask[k, : end - start] = True
        return TextEmbedding((Tokens(states, mask),))


def _encode_captions(encoder, captions: list[str], path: Path) -> None:
    """Encode captions once; float16 on disk. `path` itself is written last and marks the files as complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    parts, lengths = [], []
    for start in track(range(0, len(captions), 256), "captions"):
        tokens: Tokens = encoder(captions[start : start + 256]).sequences[0]
        parts.append(tokens.states[tokens.mask].half().numpy())
        lengths += tokens.mask.sum(1).tolist()
    np.save(path.with_suffix(".states.npy"), np.concatenate(parts))
    np.save(path.with_suffix(".ends.npy"), np.cumsum(lengths))
    path.touch()


def build(recipe: Recipe) -> PictureSet:
    """Fetch, rasterise and check the recipe's data set."""
    from train import emoji

    folder = Path(recipe.data.folder)
    emoji.build(folder)
    emoji.check(folder)
    return PictureSet(recipe.data)


def main(argv: list[str] | None = None) -> int:
    from train.recipe import load_recipe

    arguments = sys.argv[1:] if argv is None else argv
    if len(arguments) != 1:
        print("usage: python -m train.data RECIPE", file=sys.stderr)
        return 2
    try:
        pictures = build(load_recipe(arguments[0]))
    except InputError as error:
        print(f"train.data: {error}", file=sys.stderr)
        return 2
    print(f"{len(pictures.train)} training and {len(pictures.heldout)} held-out pictures in {pictures.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
