"""Drawn pictures and features of any picture, kept in the judge's folder for the next time.

A drawn picture's file is named by its seed, a function of (seed, caption): but for rounding, the picture
depends on no other, so a larger count or a restart draws only what is missing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from cascade import Cascade
from cascade.checkpoint import sha256
from cascade.images import save_png, to_pil
from cascade.progress import tracked
from eval.captioned import Record, load_picture
from eval.extractors.base import Extractor
from eval.features import Picture, picture_rows
from eval.quality import BATCH, picture_seeds


def data_sha256(records: Sequence[Record]) -> str:
    """Of captions, attributes and pictures, in any order."""
    digest = hashlib.sha256()
    for r in tracked(sorted(records, key=lambda record: record.path), "hashes"):
        digest.update(f"{sha256(r.path)} {r.split} {r.text} {sorted(r.attributes.items())}\n".encode())
    return digest.hexdigest()


class Workshop:
    """Draws pictures and looks at them."""

    def __init__(self, pipe: Cascade, identity: str, data: str, folder: Path, seed: int) -> None:
        """identity: names the model, its device and its number format in file names. data: the hash of the
        real pictures."""
        self.pipe, self.data, self.folder, self.seed = pipe, data, folder, seed
        self.identity = f"{identity}-{seed}"
        self.stages = {stage.config.image_px: name for name, stage in pipe.stages.items()}

    def draw(self, records: Sequence[Record], px: int, what: str) -> list[Path]:
        """The files of one picture a caption at `px`, through every stage up to that size."""
        return self._files(records, px, what, real=False)

    def enlarge(self, records: Sequence[Record], px: int, what: str) -> list[Path]:
        """Likewise, from the real pictures at the size of the first stage, by super-resolution alone."""
        return self._files(records, px, what, real=True)

    def rows(self, extractor: Extractor, files: Sequence[Path], name: str) -> Tensor:
        """The features of pictures, N D, kept under `name`."""
        pictures = [Picture(path, sha256(path)) for path in files]
        return picture_rows(extractor, pictures, self.folder / "features" / f"{name}.safetensors")

    def _files(self, records: Sequence[Record], px: int, what: str, real: bool) -> list[Path]:
        files = []
        names = list(self.stages.values())
        names = names[int(real) : names.index(self.stages[px]) + 1]  # the stages that run
        for batch in tracked([*_batches(records)], what):
            seeds = picture_seeds([record.text for record in batch], self.seed)
            paths = {name: self._paths(name, seeds, real) for name in names}
            if not all(path.is_file() for path in paths[names[-1]]):
                pictures = self._pictures(batch, seeds, names, real)
                for name, same in paths.items():
                    for path, image in zip(same, to_pil(pictures[name]), strict=True):
                        save_png(image, path)
            files += paths[names[-1]]
        return files

    def _pictures(
        self, batch: list[Record], seeds: list[int], names: list[str], real: bool
    ) -> dict[str, Tensor]:
        """By stage, B 3 H W in [-1, 1]."""
        captions, stop_at = [record.text for record in batch], names[-1]
        if not real:
            # The first stage's small pictures in one forward are three times as fast on a CPU.
            together = {next(iter(self.stages.values())): {"micro_batch": len(batch)}}
            return self.pipe(captions, seed=seeds, stop_at=stop_at, **together).stages
        base_px = next(iter(self.stages))
        lowres = torch.stack([load_picture(record, base_px) for record in batch])  # B 3 h w
        return self.pipe(captions, seed=seeds, start_at=names[0], stop_at=stop_at, images=lowres).stages

    def _paths(self, stage: str, seeds: list[int], real: bool) -> list[Path]:
        folder = (
            self.folder / "pictures" / self.identity / (f"{stage}-of-{self.data[:12]}" if real else stage)
        )
        return [folder / f"{seed:016x}.png" for seed in seeds]


def _batches(records: Sequence[Record]) -> Iterator[list[Record]]:
    for start in range(0, len(records), BATCH):
        yield list(records[start : start + BATCH])
