"""Training data: records, captions, pixels. `python -m train.data RECIPE` fetches and builds a recipe's set.

Everything a training step draws is a function of (seed, position), where the position counts samples over the
whole run; so a step sees the same samples and the same noise at any number of processes and after a resume.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.progress import track
from torch import Tensor

from cascade import random
from cascade.conditioning import TextEmbedding, Tokens
from cascade.errors import InputError, unknown
from cascade.images import downsample, from_pil, from_uint8, to_uint8
from cascade.text import TextEncoder, load_text_encoder
from train.recipe import DataConfig, Recipe

KEYS = ("file_name", "text", "label", "tags", "style", "tone", "split")  # of a record: what training reads


class PictureSet:
    """The pictures of a built data set. `train` and `heldout` are indices into `records`."""

    def __init__(self, cfg: DataConfig) -> None:
        self.cfg, self.folder = cfg, Path(cfg.folder)
        rows = _read_records(self.folder / "metadata.jsonl", cfg.name)
        known = sorted({row["style"] for row in rows})
        for style in cfg.styles:
            if style not in known:
                raise unknown("style", style, known, where=str(self.folder))
        self.records = [row for row in rows if row["style"] in cfg.styles]
        self.train = [i for i, r in enumerate(self.records) if r["split"] == "train"]
        self.heldout = [i for i, r in enumerate(self.records) if r["split"] == "heldout"]
        if not self.train:
            raise InputError(f"{self.folder}: expected records of split 'train', found none")

    def captions(self, index: int) -> list[str]:
        """The caption forms of a record, in the order of `caption_weights`."""
        r = self.records[index]
        tags = [t for t in r["tags"] if t not in r["label"].lower()][:3]
        return [r["text"], f"{', '.join([r['label'], *tags])}, {r['style']} style", r["label"]]

    def epoch(self, seed: int, number: int) -> np.ndarray:
        """The samples of one epoch in their order. A picture of period p takes part in one epoch of p."""
        chosen = [i for i in self.train if (random.key(0, i) + number) % self.period(i) == 0]
        order = torch.randperm(len(chosen), generator=random.generator(seed, "epoch", number))
        return np.asarray(chosen, dtype=np.int64)[order.numpy()]

    def period(self, index: int) -> int:
        """In one epoch of how many a picture takes part: that of its skin tone times that of its style."""
        record = self.records[index]
        toned = self.cfg.toned_period if record["tone"] is not None else 1
        return toned * self.cfg.style_period.get(record["style"], 1)

    def order(self, seed: int) -> Order:
        return Order(self, seed)

    def pixels(self, px: int) -> np.ndarray:
        """All pictures at px x px as one uint8 array (N px px 3) on disk, made once by the antialiased filter
        and again when the data set is another one."""
        path = self.folder / "cache" / f"{'-'.join(sorted(self.cfg.styles))}-{px}.npy"
        if not self._is_current(path, px):
            self._make_pixels(path, px)
        return np.load(path, mmap_mode="r")

    def picture(self, index: int) -> Tensor:
        """One picture at its full size: 3 H W, uint8."""
        path = self.folder / self.records[index]["file_name"]
        try:
            with Image.open(path) as image:
                if image.mode != "RGB":
                    return to_uint8(from_pil(image))  # transparency over white
                return torch.from_numpy(np.array(image)).permute(2, 0, 1)
        except OSError as error:  # Pillow's too
            raise InputError(f"cannot read {path}: {error.strerror or 'not a whole picture'}") from None

    def resized(self, index: int, px: int) -> Tensor:
        """One picture at px x px: 3 px px, uint8."""
        full = self.picture(index)
        return full if full.shape[1:] == (px, px) else to_uint8(downsample(from_uint8(full), px))

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
        with _whole(path) as part:
            array = np.lib.format.open_memmap(part, "w+", np.uint8, (len(self.records), px, px, 3))

            def make(i: int) -> None:
                array[i] = self.resized(i, px).permute(1, 2, 0).numpy()

            with ThreadPoolExecutor(os.cpu_count()) as pool:
                for _ in track(pool.map(make, range(len(self.records))), f"{px} px", len(self.records)):
                    pass
            array.flush()


class Order:
    """Position in the run -> sample: epochs one after another, each in its keyed order."""

    def __init__(self, pictures: PictureSet, seed: int) -> None:
        self._pictures, self._seed = pictures, seed
        self._starts = [0]  # of each epoch, and the end of the last one known
        self._epochs: dict[int, np.ndarray] = {}  # the last two used: a batch may lie across a border

    def __getitem__(self, position: int) -> int:
        while position >= self._starts[-1]:
            number = len(self._starts) - 1
            self._starts.append(self._starts[-1] + len(self._epoch(number)))
        number = int(np.searchsorted(self._starts, position, side="right")) - 1
        return int(self._epoch(number)[position - self._starts[number]])

    def _epoch(self, number: int) -> np.ndarray:
        if number not in self._epochs:
            while len(self._epochs) >= 2:
                del self._epochs[next(iter(self._epochs))]
            self._epochs[number] = self._pictures.epoch(self._seed, number)
        return self._epochs[number]


class TextStore:
    """The encoded captions of a set, ragged and memory-mapped, one array a token sequence: caption form c of
    picture i is row 3 i + c."""

    def __init__(self, pictures: PictureSet, reference: dict) -> None:
        encoder = load_text_encoder(reference)
        self.max_length, self.dims = encoder.max_length, tuple(encoder.dims)
        captions = [c for i in range(len(pictures.records)) for c in pictures.captions(i)]
        digest = f"{random.key(0, json.dumps(reference, sort_keys=True), *captions):016x}"
        marker = pictures.folder / "cache" / f"text-{digest}.npz"
        if not marker.exists():
            _encode_captions(encoder, captions, marker)
        self._arrays = [
            [np.load(path, mmap_mode="r") for path in _text_files(marker, i)] for i in range(len(self.dims))
        ]

    def __call__(self, rows: list[int]) -> TextEmbedding:
        """Token states of caption rows, padded to the encoder's length."""
        return TextEmbedding(tuple(self._tokens(i, rows) for i in range(len(self.dims))))

    def _tokens(self, sequence: int, rows: list[int]) -> Tokens:
        packed, ends = self._arrays[sequence]
        states = torch.zeros(len(rows), self.max_length, self.dims[sequence])  # B L D
        mask = torch.zeros(len(rows), self.max_length, dtype=torch.bool)  # B L
        for k, row in enumerate(rows):
            start, end = (ends[row - 1] if row else 0), ends[row]
            states[k, : end - start] = torch.from_numpy(packed[start:end].astype(np.float32))
            mask[k, : end - start] = True
        return Tokens(states, mask)


def _text_files(marker: Path, sequence: int) -> list[Path]:
    """Where the states of one token sequence lie, all captions in a row, and where each caption ends."""
    number = sequence or ""
    return [marker.with_suffix(f".states{number}.npy"), marker.with_suffix(f".ends{number}.npy")]


def _encode_captions(encoder: TextEncoder, captions: list[str], marker: Path) -> None:
    """Encode captions once; float16 on disk. `marker` is written last: then the files are complete."""
    count = len(encoder.dims)
    parts: list[list[np.ndarray]] = [[] for _ in range(count)]
    lengths: list[list[int]] = [[] for _ in range(count)]
    for start in track(range(0, len(captions), 256), "captions"):
        for i, tokens in enumerate(encoder(captions[start : start + 256]).sequences):
            parts[i].append(tokens.states[tokens.mask].half().cpu().numpy())
            lengths[i] += tokens.mask.sum(1).tolist()
    for i in range(count):
        for path, array in zip(
            _text_files(marker, i), (np.concatenate(parts[i]), np.cumsum(lengths[i])), strict=True
        ):
            with _whole(path) as part, part.open("wb") as file:
                np.save(file, array)
    marker.touch()


@contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """A temporary path that takes the name `path` when the block ends without an error, else goes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _read_records(path: Path, name: str) -> list[dict]:
    if not path.exists():
        raise InputError(f"no data set in {path.parent}: build it with python -m train.data {name}")
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
    counts = f"{len(pictures.train)} training and {len(pictures.heldout)} held-out pictures"
    print(f"{counts} in {pictures.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
