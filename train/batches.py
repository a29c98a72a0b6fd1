"""Batches of each stage: everything a step consumes, keyed by the sample's position in the run."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from cascade import random
from cascade.augment import corrupt_training
from cascade.conditioning import Conditioning, TextEmbedding, Tokens
from cascade.images import downsample, from_uint8
from train.data import PictureSet, TextStore
from train.recipe import ClipRecipe, Recipe, StageRecipe

Batch = dict[str, Tensor]
CACHED_PX = 256  # larger pictures are decoded one by one: all of them would fit neither memory nor disk
CROP_CANDIDATES = 2  # of which the crop with more contrast is kept: much of a drawing is flat


class Batches(Dataset[Batch]):
    """Item k is this process's share of step k. `make(positions, seeds)` builds it."""

    def __init__(
        self,
        make: Callable[[list[int], list[int]], Batch],
        batch: int,
        rank: int,
        world: int,
        seed: int,
        stage: str,
        steps: int,
    ) -> None:
        self._make, self._batch, self._rank, self._world = make, batch, rank, world
        self._seed, self._stage, self._steps = seed, stage, steps

    def __len__(self) -> int:
        return self._steps

    def __getitem__(self, step: int) -> Batch:
        positions = list(range(step * self._batch + self._rank, (step + 1) * self._batch, self._world))
        seeds = [random.key(self._seed, "train", self._stage, p) for p in positions]
        return self._make(positions, seeds)


class Maker:
    """What the stages' batches share: sample order, captions, dropout flags, noise levels."""

    def __init__(self, recipe: Recipe, stage: str, pictures: PictureSet, text: TextStore) -> None:
        self.recipe, self.stage, self.pictures, self.text = recipe, stage, pictures, text
        self.train = recipe.train_of(stage)
        self.order = pictures.order(random.key(recipe.seed, "order", stage))

    def samples(self, positions: list[int]) -> list[int]:
        return [self.order[p // self.train.crops_per_picture] for p in positions]

    def captions(self, samples: list[int], seeds: list[int]) -> Batch:
        """A caption form a sample, by `caption_weights`: states0, mask0, states1, ... by token sequence."""
        edges = np.cumsum(self.recipe.data.caption_weights)
        draws = random.uniform(seeds, "caption")[:, 0].numpy() * edges[-1]
        forms = np.searchsorted(edges[:-1], draws, side="right")
        text = self.text([3 * s + int(f) for s, f in zip(samples, forms, strict=True)])
        batch: Batch = {}
        for i, tokens in enumerate(text.sequences):
            batch |= {f"states{i}": tokens.states, f"mask{i}": tokens.mask}
        return batch

    def keep(self, seeds: list[int]) -> Batch:
        """What each sample is still told: `keep_text` B S, a column a token sequence; `keep_image` B."""
        first, image = random.uniform(seeds, "drop", count=2).unbind(1)  # B, B
        others = [random.uniform(seeds, "drop", i)[:, 0] for i in range(1, len(self.text.dims))]
        return {
            "keep_text": torch.stack([first, *others], dim=1) >= self.train.text_drop,
            "keep_image": image >= self.train.image_drop,
        }

    def times(self, positions: list[int], seeds: list[int]) -> Tensor:
        """Times stratified over the global batch, (i + u) / B, float64: less variance of the loss."""
        stratum = torch.tensor([p % self.train.batch for p in positions], dtype=torch.float64)
        return (stratum + random.uniform(seeds, "time")[:, 0]) / self.train.batch


class ClipMaker(Maker):
    def __init__(self, recipe: Recipe, pictures: PictureSet, text: TextStore) -> None:
        super().__init__(recipe, "clip", pictures, text)
        part = recipe.of("clip")
        assert isinstance(part, ClipRecipe)
        self.images = pictures.pixels(part.model.image_px)
        # the same label in the same style is the same caption
        numbers: dict[tuple[str, str], int] = {}
        self.groups = [numbers.setdefault((r["label"], r["style"]), len(numbers)) for r in pictures.records]

    def __call__(self, positions: list[int], seeds: list[int]) -> Batch:
        samples = self.samples(positions)
        x = pixels(self.images, samples)
        # shifts of up to 3 px: a tower with few pictures otherwise learns their pixels by heart
        moves = (random.uniform(seeds, "shift", count=2) * 7).long() - 3
        x = torch.stack([torch.roll(row, tuple(m.tolist()), (1, 2)) for row, m in zip(x, moves, strict=True)])
        group = torch.tensor([self.groups[s] for s in samples])
        return {"x": x, "group": group, **self.captions(samples, seeds)}


class PriorMaker(Maker):
    def __init__(self, recipe: Recipe, pictures: PictureSet, text: TextStore, embeds: Tensor) -> None:
        super().__init__(recipe, "prior", pictures, text)
        self.embeds = embeds

    def __call__(self, positions: list[int], seeds: list[int]) -> Batch:
        samples = self.samples(positions)
        return {
            "x": self.embeds[samples],
            "noise": random.normal((self.embeds.shape[1],), seeds, "noise"),
            "t": self.times(positions, seeds),
            **self.captions(samples, seeds),
            **self.keep(seeds),
        }


class StageMaker(Maker):
    def __init__(
        self, recipe: Recipe, stage: str, pictures: PictureSet, text: TextStore, embeds: Tensor | None
    ) -> None:
        super().__init__(recipe, stage, pictures, text)
        part = recipe.of(stage)
        assert isinstance(part, StageRecipe)
        self.cfg, self.embeds = part.stage, embeds
        self.images = pictures.pixels(self.cfg.image_px) if self.cfg.image_px <= CACHED_PX else None

    def __call__(self, positions: list[int], seeds: list[int]) -> Batch:
        samples = self.samples(positions)
        batch = {"x": self._pictures(samples, seeds), "t": self.times(positions, seeds)}
        shape = batch["x"].shape[1:]
        batch["noise"] = random.normal(shape, seeds, "noise")
        if self.cfg.unet.text_dims:
            batch |= self.captions(samples, seeds)
        batch |= self.keep(seeds)
        if self.embeds is not None:
            batch["image_embed"] = self.embeds[samples]
        if self.cfg.lowres_px:
            augment = self.cfg.augment
            assert augment is not None
            lowres = downsample(batch["x"], shape[-1] * self.cfg.lowres_px // self.cfg.image_px)
            batch["lowres"] = corrupt_training(lowres, augment, seeds, self.stage)
            batch["aug_level"] = (random.uniform(seeds, "aug")[:, 0] * augment.max_level).float()
            batch["aug_noise"] = random.normal(shape, seeds, "aug_noise")
        return batch

    def _pictures(self, samples: list[int], seeds: list[int]) -> Tensor:
        crop, px = self.train.crop_px, self.cfg.image_px
        if crop is None and self.images is not None:
            return pixels(self.images, samples)
        multiple = px // (self.cfg.lowres_px or px)
        rows, decoded = [], {}
        for sample, seed in zip(samples, seeds, strict=True):
            if sample not in decoded:
                decoded = {sample: self._picture(sample, px)}  # the crops of a picture are neighbours
            picture = decoded[sample]
            rows.append(picture if crop is None else best_crop(picture, crop, multiple, seed))
        return from_uint8(torch.stack(rows))

    def _picture(self, sample: int, px: int) -> Tensor:
        if self.images is None:
            return self.pictures.resized(sample, px)
        return torch.from_numpy(np.ascontiguousarray(self.images[sample].transpose(2, 0, 1)))


def best_crop(picture: Tensor, crop: int, multiple: int, seed: int) -> Tensor:
    """Of a few random crops (aligned to the low-resolution grid) the one with the highest contrast."""
    places = picture.shape[-1] - crop
    draws = random.uniform([seed], "crop", count=2 * CROP_CANDIDATES)[0].view(-1, 2)
    best, contrast = picture, -1.0
    for u, v in (draws * (places // multiple + 1)).long().tolist():
        top, left = u * multiple, v * multiple
        candidate = picture[:, top : top + crop, left : left + crop]
        deviation = float(candidate[:, ::8, ::8].float().std())
        if deviation > contrast:
            best, contrast = candidate, deviation
    return best


def pixels(images: np.ndarray, samples: list[int]) -> Tensor:
    """Rows of a pixel cache as B 3 H W in [-1, 1]."""
    rows = torch.from_numpy(np.stack([images[s] for s in samples]))
    return from_uint8(rows.permute(0, 3, 1, 2))


def text_of(batch: Batch) -> TextEmbedding | None:
    """The batch's captions, all token sequences of them."""
    count = sum(name.startswith("states") for name in batch)
    sequences = tuple(Tokens(batch[f"states{i}"], batch[f"mask{i}"]) for i in range(count))
    return TextEmbedding(sequences) if sequences else None


def conditioning_of(batch: Batch, lowres: Tensor | None) -> Conditioning:
    """The batch's conditions; rows that dropout chose are marked for the network's nulls."""
    text = text_of(batch)
    return Conditioning(
        text=text,
        image_embed=batch.get("image_embed"),
        lowres=lowres,
        aug_level=batch.get("aug_level"),
        text_keep=batch["keep_text"] if text is not None else None,
        image_keep=batch["keep_image"] if "image_embed" in batch else None,
    )
