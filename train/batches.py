"""Batches of each stage: everything a step consumes, keyed by the sample's position in the run.

Loader processes read pictures and look captions up. The training process pads the texts, which are far larger
then, and does what only it can, with the device and the encoders.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from cascade import random
from cascade.augment import corrupt_training
from cascade.conditioning import Conditioning, TextEmbedding, Tokens
from cascade.images import downsample, from_uint8, to_uint8
from train.bundle import Bundle, bundled
from train.data import PictureSet, Reader
from train.encoded import ImageStore, TextStore, padded
from train.recipe import ClipRecipe, Recipe, StageRecipe
from train.vary import variants

Batch = dict[str, Tensor]
GUESS = "guess_"  # begins the names of what only the guess of x_0 learns from
VARIED = "varied"  # rows whose embedding is made of the batch's own picture
RAW = ("captions", "views", "tokens", "places")  # begin the names of what `complete` makes something else of
ENCODED = 16  # variants are encoded by multiples of so many
NEAR = 16  # so many embeddings are like one, for `train.image_blend`
ITSELF = 1 - 1e-4  # cosine from which an embedding is that of the same picture
CROP_CANDIDATES = 2  # of which the crop with more contrast is kept: much of a drawing is flat


class Batches(Dataset[Bundle]):
    """Item k is this process's share of step k, for `Maker.complete`."""

    def __init__(
        self, make: Maker, batch: int, rank: int, world: int, seed: int, stage: str, steps: int
    ) -> None:
        self._make, self._batch, self._rank, self._world = make, batch, rank, world
        self._seed, self._stage, self._steps = seed, stage, steps
        self._reader = make.reader  # before loader processes, each of which would make one

    def __len__(self) -> int:
        return self._steps

    def __getitem__(self, step: int) -> Bundle:
        positions = list(range(step * self._batch + self._rank, (step + 1) * self._batch, self._world))
        seeds = [random.key(self._seed, "train", self._stage, p) for p in positions]
        return bundled(self._make.draw(positions, seeds))


@dataclass(frozen=True)
class Sample:
    """What a loader process reads of one picture."""

    index: int
    pixels: Tensor | None = None  # 3 H W, uint8
    embed: Tensor | None = None  # D, its CLIP embedding
    view: Tensor | None = None  # 3 H W, uint8: what CLIP is shown, where no embedding is stored


class Maker(ABC):
    """What the stages' batches share: samples, captions, dropout flags, noise levels. A call gives a whole
    batch; `draw` and `complete` are the halves of the loader's and of the training process."""

    images: ImageStore | None = None  # where image embeddings come from, in a stage that takes them
    learned_null = True  # False: the empty caption stands for one that is dropped
    own_among_siblings = True  # in a mean over the pictures of a subject

    def __init__(self, recipe: Recipe, stage: str, pictures: PictureSet, text: TextStore, px: int) -> None:
        """px: the size that the stage needs a picture to have."""
        self.stage, self.pictures, self.text = stage, pictures, text
        self.train = recipe.train_of(stage)
        self._seed = random.key(recipe.seed, "order", stage)
        self._px = px

    @cached_property
    def reader(self) -> Reader:
        """The pictures in the order of the run, which a stage that is taken as it is never asks for. Raises
        InputError where none is large enough."""
        return Reader(self.pictures, self.pictures.order(self._seed, self._px))

    def __call__(self, positions: list[int], seeds: list[int]) -> Batch:
        return self.complete(self.draw(positions, seeds))

    @abstractmethod
    def draw(self, positions: list[int], seeds: list[int]) -> Batch:
        """The batch, its texts as `TextStore.gathered`; where something is yet to be encoded, `captions` (as
        bytes) and `views` stand for it."""

    def complete(self, batch: Batch, device: torch.device | str = "cpu") -> Batch:
        """The batch on the device as networks take it, texts padded and all encoded."""
        rest = {name: x for name, x in batch.items() if not name.startswith(GUESS)}
        guess = {GUESS + name: x for name, x in self.complete_part(guess_part(batch), device).items()}
        return self.complete_part(rest, device) | guess

    def complete_part(self, part: Batch, device: torch.device | str) -> Batch:
        """The same of the samples of the step, or of those for its guess."""
        moved = {name: x.to(device, non_blocking=True) for name, x in part.items()}
        done = {name: x for name, x in moved.items() if not name.startswith(RAW)}
        if "tokens0" in moved:
            done |= text_batch(padded(moved))
        if "captions" in part:
            done |= text_batch(self.text.to(device)(unpacked(part["captions"])).to(device))
        if "views" in moved:
            assert self.images is not None
            done["image_embed"] = self.images.to(device).encode(moved["views"])
        return done

    def samples(self, positions: list[int]) -> list[int]:
        """Numbers of the pictures at positions of the run."""
        return [sample.index for sample in self.read_at(positions)]

    def read_at(self, positions: list[int]) -> list[Sample]:
        """What is read at positions of the run."""
        rows, last = [], None
        for position in positions:
            place = position // self.train.crops_per_picture  # the crops of a picture are neighbours
            if last is None or last[0] != place:
                seed = random.key(self._seed, "square", place)
                last = place, self.reader(place, lambda index, seed=seed: self.read(index, seed))
            rows.append(last[1])
        return rows

    @abstractmethod
    def read(self, index: int, seed: int) -> Sample:
        """One picture. Raises BadPicture."""

    def embed_of(self, index: int) -> dict[str, Tensor]:
        """The picture's embedding or, where none are stored, what CLIP is shown."""
        if self.images is None:
            return {}
        if self.images.cache is None:
            return {"view": self.images.view(index)}
        return {"embed": self.images(index)}

    def embeds(self, samples: list[Sample], seeds: list[int], mixed: Tensor) -> Batch:
        """`image_embed` B D, or `views` B 3 H W, or nothing in a stage that takes none. mixed: B, as
        `of_siblings`."""
        if mixed.any():
            chosen = zip(samples, seeds, mixed.tolist(), strict=True)
            samples = [replace(s, embed=self._sibling_mean(s, seed)) if m else s for s, seed, m in chosen]
        for name, rows in (("image_embed", [s.embed for s in samples]), ("views", [s.view for s in samples])):
            if found := [row for row in rows if row is not None]:
                return {name: torch.stack(found)}
        return {}

    def of_siblings(self, samples: list[Sample], seeds: list[int]) -> Tensor:
        """Of which samples the embedding is a mean over pictures of their subject, B."""
        if not self.train.image_siblings:
            return torch.zeros(len(samples), dtype=torch.bool)
        several = torch.tensor([len(self.pictures.siblings(sample.index)) > 1 for sample in samples])
        return several & (random.uniform(seeds, "siblings")[:, 0] < self.train.image_siblings)

    def _sibling_mean(self, sample: Sample, seed: int) -> Tensor:
        """A mean of the embeddings of the subject's pictures, D, its weights uniform on their simplex, at the
        length of the picture's own."""
        assert sample.embed is not None and self.images is not None
        places = self.pictures.siblings(sample.index)
        if not self.own_among_siblings:
            places = [place for place in places if place != sample.index]
        weights = -torch.log1p(-random.uniform([seed], "sibling_weights", count=len(places))[0])
        rows = F.normalize(torch.stack([self.images(place).float() for place in places]), dim=1)
        mean = F.normalize(weights.float() @ rows, dim=0)
        return (sample.embed.float().norm() * mean).to(sample.embed.dtype)

    def captions(self, samples: list[Sample], seeds: list[int], means: bool = False) -> Batch:
        """A caption a sample by the captions' weights: tokens0, places0, tokens1, ... by token sequence, or
        `captions` where the cache lacks one. means: the mean token alone."""
        texts = [self.pictures.caption(s.index, seed) for s, seed in zip(samples, seeds, strict=True)]
        if not self.learned_null:
            kept = random.uniform(seeds, "drop", count=2)[:, 0] >= self.train.text_drop  # B
            texts = [text if keep else "" for text, keep in zip(texts, kept.tolist(), strict=True)]
        rows = [row for row in self.text.rows(texts) if row is not None]
        if len(rows) < len(texts):
            return {"captions": packed(texts)}
        return self.text.means(rows) if means else self.text.gathered(rows)

    def keep(self, seeds: list[int]) -> Batch:
        """What each sample is still told: `keep_text` B S, a column a token sequence, for networks with a
        null of their own; `keep_image` B."""
        first, image = random.uniform(seeds, "drop", count=2).unbind(1)  # B, B
        kept = {"keep_image": image >= self.train.image_drop}
        if self.learned_null:
            others = [random.uniform(seeds, "drop", i)[:, 0] for i in range(1, len(self.text.dims))]
            kept["keep_text"] = torch.stack([first, *others], dim=1) >= self.train.text_drop
        return kept

    def for_guess(self, positions: list[int]) -> Batch:
        """What a step's guess of x_0 learns from: `guess_batch` samples over all processes, in the same order
        as the others, through which they run faster. Of a caption a guess takes the mean token, so that is
        all it gets: a fraction of the bytes."""
        share = self.train.guess_share
        if not share:
            return {}
        places = [p * share + k for p in positions for k in range(share)]
        seeds = [random.key(self._seed, "guess", p) for p in places]
        return {GUESS + name: x for name, x in self.guessed(self.read_at(places), seeds).items()}

    def guessed(self, samples: list[Sample], seeds: list[int]) -> Batch:
        """x_0 and conditions of samples, in a stage that makes a guess."""
        return {}

    def times(self, positions: list[int], seeds: list[int]) -> Tensor:
        """Times stratified over the global batch, (i + u) / B, float64: less variance of the loss."""
        stratum = torch.tensor([p % self.train.batch for p in positions], dtype=torch.float64)
        return (stratum + random.uniform(seeds, "time")[:, 0]) / self.train.batch


class ClipMaker(Maker):
    def __init__(self, recipe: Recipe, pictures: PictureSet, text: TextStore) -> None:
        part = recipe.of("clip")
        assert isinstance(part, ClipRecipe)
        super().__init__(recipe, "clip", pictures, text, part.model.image_px)
        self.pixels = pictures.view(part.model.image_px)

    def read(self, index: int, seed: int) -> Sample:
        return Sample(index, self.pixels(index, seed))

    def draw(self, positions: list[int], seeds: list[int]) -> Batch:
        samples = self.read_at(positions)
        x = whole(samples)
        # shifts of up to 3 px: a tower with few pictures otherwise learns their pixels by heart
        moves = (random.uniform(seeds, "shift", count=2) * 7).long() - 3
        x = torch.stack([torch.roll(row, tuple(m.tolist()), (1, 2)) for row, m in zip(x, moves, strict=True)])
        group = torch.tensor([self.pictures.group(s.index) for s in samples])
        return {"x": x, "group": group, **self.captions(samples, seeds)}


class PriorMaker(Maker):
    def __init__(self, recipe: Recipe, pictures: PictureSet, text: TextStore, images: ImageStore) -> None:
        assert recipe.clip is not None and recipe.prior is not None
        super().__init__(recipe, "prior", pictures, text, 1)
        self.learned_null = recipe.prior.model.learned_null
        self.images, self.embed_dim = images, recipe.clip.embed_dim

    def read(self, index: int, seed: int) -> Sample:
        return Sample(index, **self.embed_of(index))

    def draw(self, positions: list[int], seeds: list[int]) -> Batch:
        samples = self.read_at(positions)
        return {
            **self.embeds(samples, seeds, self.of_siblings(samples, seeds)),
            "noise": random.normal((self.embed_dim,), seeds, "noise"),
            "t": self.times(positions, seeds),
            **self.captions(samples, seeds),
            **self.keep(seeds),
            **self.for_guess(positions),
        }

    def guessed(self, samples: list[Sample], seeds: list[int]) -> Batch:
        mixed = self.of_siblings(samples, seeds)
        return self.embeds(samples, seeds, mixed) | self.captions(samples, seeds, means=True)


class StageMaker(Maker):
    own_among_siblings = False  # the others tell what the subject is, the text which of its pictures is meant

    def __init__(
        self, recipe: Recipe, stage: str, pictures: PictureSet, text: TextStore, images: ImageStore | None
    ) -> None:
        part = recipe.of(stage)
        assert isinstance(part, StageRecipe)
        super().__init__(recipe, stage, pictures, text, part.stage.image_px)
        self.cfg, self.images = part.stage, images
        self.learned_null = part.stage.unet.learned_null
        self.pixels = pictures.view(self.cfg.image_px)
        self.fine = bool(self.cfg.unet.fine_channels)  # whether the batch also teaches a fine network

    def read(self, index: int, seed: int) -> Sample:
        return Sample(index, self.pixels(index, seed), **self.embed_of(index))

    def draw(self, positions: list[int], seeds: list[int]) -> Batch:
        samples = self.read_at(positions)
        batch = self._told(self._pictures(samples, seeds), samples, seeds)
        shape = batch["x"].shape[1:]
        batch |= {"t": self.times(positions, seeds), "noise": random.normal(shape, seeds, "noise")}
        if self.cfg.lowres_px:
            augment = self.cfg.augment
            assert augment is not None
            lowres = downsample(batch["x"], shape[-1] * self.cfg.lowres_px // self.cfg.image_px)
            batch["lowres"] = corrupt_training(lowres, augment, seeds, self.stage)
            batch["aug_level"] = (random.uniform(seeds, "aug")[:, 0] * augment.max_level).float()
            batch["aug_noise"] = random.normal(shape, seeds, "aug_noise")
        if self.fine:
            batch["fine_noise"] = random.normal(shape, seeds, "fine_noise")
            batch["fine_draws"] = random.uniform(seeds, "fine", count=3).float()  # noise level, window
        return batch | self.for_guess(positions)

    def complete_part(self, part: Batch, device: torch.device | str) -> Batch:
        part = super().complete_part(part, device)
        if (draws := part.pop("embed_blend", None)) is not None:
            self._others = self._others.to(device)  # which it then stays on
            part["image_embed"] = blended(part["image_embed"], self._others, draws)
        if (varied := part.pop(VARIED, None)) is not None and len(varied):
            assert self.images is not None
            # filled up, to few sizes: kernels are made, and kept in memory, for each size that they meet
            rows = varied.repeat(ENCODED)[: len(varied) + -len(varied) % ENCODED]
            views = to_uint8(part["x"][rows])
            with torch.autocast(views.device.type, torch.bfloat16, enabled=self.train.precision == "bf16"):
                embeds = self.images.to(device).encode(views)[: len(varied)]
            part["image_embed"] = part["image_embed"].index_copy(0, varied, embeds.to(part["image_embed"]))
        if (noise := part.pop("embed_noise", None)) is not None:
            embed = part["image_embed"]  # B D
            scale = self.train.image_noise * embed.shape[1] ** -0.5  # unit vectors vary by D^-1/2
            part["image_embed"] = embed + scale * noise.to(embed)
        return part

    def _told(self, x: Tensor, samples: list[Sample], seeds: list[int], means: bool = False) -> Batch:
        """Pictures and their conditions. Of `train.vary` of them a variant takes the place, which no caption
        describes: its embedding, yet to be made, is all that is told of it."""
        batch = {"x": x, **self._conditions(samples, seeds, means)}
        if not self.train.vary:
            return batch
        chosen = random.uniform(seeds, "vary")[:, 0] < self.train.vary  # B
        batch[VARIED] = chosen.nonzero()[:, 0]
        rows = batch[VARIED].tolist()
        if rows:
            batch["x"][chosen] = variants(batch["x"][chosen], [seeds[i] for i in rows])
        batch["keep_text"] &= ~chosen[:, None]
        batch["keep_image"] |= chosen
        return batch

    def _conditions(self, samples: list[Sample], seeds: list[int], means: bool = False) -> Batch:
        batch = self.captions(samples, seeds, means) if self.cfg.unet.text_dims else {}
        mixed = self.of_siblings(samples, seeds)
        batch |= self.keep(seeds) | self.embeds(samples, seeds, mixed)
        if self.cfg.unet.image_embed_dim and self.train.image_noise:
            batch["embed_noise"] = random.normal((self.cfg.unet.image_embed_dim,), seeds, "embed_noise")
        if self.train.image_blend:
            chance, near, far = random.uniform(seeds, "embed_blend", count=3).unbind(1)  # B, B, B
            chosen = chance < self.train.image_blend
            batch["embed_blend"] = torch.stack([near, far * chosen], dim=1)
            batch["keep_text"] |= chosen[:, None]  # nothing else tells which of the two it is
        if self.train.image_siblings:
            batch["keep_text"] |= mixed[:, None]  # likewise
        return batch

    @cached_property
    def _others(self) -> Tensor:
        """Embeddings of the training pictures, or of many of them, at length 1. N D."""
        assert self.images is not None
        return F.normalize(self.images.sample().float(), dim=1)

    def guessed(self, samples: list[Sample], seeds: list[int]) -> Batch:
        return self._told(whole(samples), samples, seeds, means=True)

    def _pictures(self, samples: list[Sample], seeds: list[int]) -> Tensor:
        """B 3 H W in [-1, 1]: whole pictures, or a crop of each."""
        crop = self.train.crop_px
        if crop is None:
            return whole(samples)
        multiple = self.cfg.image_px // (self.cfg.lowres_px or self.cfg.image_px)
        rows = []
        for sample, seed in zip(samples, seeds, strict=True):
            assert sample.pixels is not None
            rows.append(best_crop(sample.pixels, crop, multiple, seed))
        return from_uint8(torch.stack(rows))


def guess_part(batch: Batch) -> Batch:
    """What a batch holds for the guess of x_0 alone; empty where its network makes none."""
    return {name.removeprefix(GUESS): x for name, x in batch.items() if name.startswith(GUESS)}


def blended(embeds: Tensor, others: Tensor, draws: Tensor) -> Tensor:
    """Embeddings, B D, turned towards one of the `NEAR` likest of `others`, N D of length 1; which one and
    how far are the columns of `draws`, B 2, in [0, 1). So a prior errs: it takes a thing for one like it."""
    length = embeds.float().norm(dim=1, keepdim=True)
    own, far = embeds.float() / length, draws[:, 1:].float()
    alike = own @ others.T  # B N
    near = alike.masked_fill(alike > ITSELF, -1.0).topk(min(NEAR, len(others)), dim=1).indices  # B K
    chosen = near.gather(1, (draws[:, :1] * near.shape[1]).long())[:, 0]  # B
    moved = length * F.normalize(torch.lerp(own, others[chosen], far), dim=1)
    return torch.where(far > 0, moved.to(embeds), embeds)


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


def whole(samples: list[Sample]) -> Tensor:
    """Pictures as B 3 H W in [-1, 1], channels last as networks want them."""
    rows = [s.pixels.permute(1, 2, 0) for s in samples if s.pixels is not None]
    return from_uint8(torch.stack(rows).permute(0, 3, 1, 2))


def packed(texts: list[str]) -> Tensor:
    """Texts as a tensor of bytes, as which they pass from process to process like the rest of a batch."""
    return torch.frombuffer(bytearray(json.dumps(texts).encode()), dtype=torch.uint8)


def unpacked(data: Tensor) -> list[str]:
    return json.loads(bytes(data.tolist()))


def text_batch(text: TextEmbedding) -> Batch:
    batch: Batch = {} if text.pooled is None else {"pooled": text.pooled}
    for i, tokens in enumerate(text.sequences):
        batch |= {f"states{i}": tokens.states, f"mask{i}": tokens.mask}
    return batch


def text_of(batch: Batch) -> TextEmbedding | None:
    """The batch's captions, all token sequences of them."""
    count = sum(name.startswith("states") for name in batch)
    sequences = tuple(Tokens(batch[f"states{i}"], batch[f"mask{i}"]) for i in range(count))
    return TextEmbedding(sequences, batch.get("pooled")) if sequences else None


def conditioning_of(batch: Batch, lowres: Tensor | None) -> Conditioning:
    """The batch's conditions; rows that dropout chose are marked for the network's nulls."""
    text = text_of(batch)
    return Conditioning(
        text=text,
        image_embed=batch.get("image_embed"),
        lowres=lowres,
        aug_level=batch.get("aug_level"),
        text_keep=batch.get("keep_text") if text is not None else None,
        image_keep=batch["keep_image"] if "image_embed" in batch else None,
    )
