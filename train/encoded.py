"""Captions and pictures as the frozen encoders give them: from a cache (train.embed), else encoded online.

Loader processes look captions and pictures up; what no cache holds they pass on as it is, and the process
that trains encodes it, for it has the device. A row reads the same from either: online ones are rounded as
stored ones are.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from cascade import random
from cascade.conditioning import TextEmbedding, Tokens
from cascade.errors import InputError
from cascade.images import from_uint8
from cascade.progress import tracked
from cascade.text import TextEncoder, load_text_encoder
from prior import CLIP, OpenCLIP
from train.cache import MANIFEST, Cache, Row, finish, list_hash, made_from, write_shard
from train.data import BadPicture, PictureSet, View

SMALL = 50_000  # pictures: so small a set is encoded before training, not in it
SHARD = 1024  # pictures whose captions, or embeddings, stand in one file
CHUNK = 256  # captions or pictures encoded at a time
STATISTICS = 20_000  # embeddings from which their mean and deviation are taken


class Store(ABC):
    """What one encoder says of a picture set, in a cache folder. `cache` is None where nothing is cached."""

    def __init__(self, pictures: PictureSet, about: dict[str, Any], folder: Path | None = None) -> None:
        """folder: default one for this encoder and choice of pictures in the set's folder."""
        name = f"{about['kind']}-{list_hash(about, [pictures.cfg.choice])}"
        self._shared = folder is not None  # perhaps with other sets: only train.embed writes there
        folder = folder or pictures.folder / "cache" / name
        self.pictures, self.about, self.folder = pictures, about, folder
        self.cache = Cache(folder) if (folder / MANIFEST).exists() else None
        if self.cache is not None and self.cache.about != about:
            found, expected = (json.dumps(a)[:200] for a in (self.cache.about, about))
            raise InputError(
                f"{folder} is the cache of another encoder, {found}: expected {expected}; "
                "delete it, or run python -m train.embed for this one elsewhere"
            )

    def write(self, rank: int = 0, world: int = 1, barrier: Callable[[], None] = lambda: None) -> None:
        """Write this process's share of the cache and, when all are done, what makes it whole. Shards that
        are there already stay. The same files come of any number of processes."""
        names = [f"{number:06d}.safetensors" for number in range(-(-len(self.pictures) // SHARD))]
        mine = range(rank, len(names), world)
        sources = {number: list_hash(self.about, self.listed(number)) for number in mine}
        todo = [number for number in mine if made_from(self.folder / names[number]) != sources[number]]
        for number in tracked(todo, f"{self.about['kind']} cache", quiet=rank > 0 or not todo):
            write_shard(self.folder / names[number], sources[number], *self.encoded(number))
        barrier()
        found = {name: made_from(self.folder / name) for name in names}
        if rank == 0 and (self.cache is None or self.cache.sources != found):
            finish(self.folder, names, self.about)
        barrier()
        self.cache = Cache(self.folder)

    def prepare(self) -> Self:
        """Write the cache of a small set, where that has not been done, on the device if there is one."""
        if len(self.pictures) <= SMALL and not self._shared:
            self.to(torch.accelerator.current_accelerator(check_available=True) or "cpu").write()
            self.to("cpu")
        return self

    def span(self, shard: int) -> range:
        """The pictures of a shard."""
        return range(shard * SHARD, min(len(self.pictures), (shard + 1) * SHARD))

    @abstractmethod
    def to(self, device: torch.device | str) -> Self:
        """Encode on `device`."""

    @abstractmethod
    def listed(self, shard: int) -> list[str]:
        """What a shard is made from: names of its rows, or more."""

    @abstractmethod
    def encoded(self, shard: int) -> tuple[list[str], list[Row]]:
        """Names and rows of a shard."""


class TextStore(Store):
    """Captions to token states, padded to the encoder's length."""

    def __init__(self, pictures: PictureSet, reference: dict[str, Any], padding: bool = False) -> None:
        """padding: keep the states of padding too, for networks that attend to it. Raises InputError where
        the recipe names the cache of another encoder."""
        self.encoder = load_text_encoder(reference)
        self.max_length, self.dims = self.encoder.max_length, tuple(self.encoder.dims)
        self._types, self._padding = stored_types(self.encoder), padding
        self._null: Row | None = None
        about = {"kind": "text", "encoder": fingerprint(self.encoder.reference())}
        about |= {"max_length": self.max_length, "dims": list(self.dims)}
        about |= {"padding": True} if padding else {}
        given = pictures.cfg.text_cache
        super().__init__(pictures, about, Path(given) if given else None)

    def __call__(self, captions: Sequence[str]) -> TextEmbedding:
        """Encoded captions: of each sequence B L D, float32, and B L; pooled B D where the encoder has it."""
        rows = self.rows(captions)
        fresh = iter(self.encode([c for c, row in zip(captions, rows, strict=True) if row is None]))
        return padded(self.gathered([next(fresh) if row is None else row for row in rows]))

    def to(self, device: torch.device | str) -> Self:
        self.encoder.to(device)
        return self

    def with_null(self) -> Self:
        """Know the empty caption, which is in no cache: it stands for those that dropout chose."""
        (self._null,) = self.encode([""])
        return self

    def rows(self, captions: Sequence[str]) -> list[Row | None]:
        """What is known of each caption without the encoder."""
        known = (lambda caption: None) if self.cache is None else self.cache.get
        return [known(caption) if caption else self._null for caption in captions]

    def encode(self, captions: Sequence[str]) -> list[Row]:
        """Rows of captions, by the encoder."""
        if not captions:
            return []
        text, rows = self.encoder(captions), []
        for k, caption in enumerate(captions):
            row = {} if text.pooled is None else {"pooled": text.pooled[k : k + 1].float().cpu()}
            for i, (tokens, kind) in enumerate(zip(text.sequences, self._types, strict=True)):
                states = tokens.states[k] if self._padding else tokens.states[k][tokens.mask[k]]
                row[f"states{i}"] = (states.to(kind) if states.is_floating_point() else states).cpu()
                if not row[f"states{i}"].isfinite().all():
                    raise InputError(f"text encoder: caption {caption!r:.100} has states beyond {kind}")
            rows.append(row)
        return rows

    def gathered(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """Rows in the least bytes, for `padded`: `tokens{i}` N D, those of all rows one after another, behind
        one of zeros; `places{i}` B L, where they stand, 0 for padding; `pooled` B D where there is one."""
        return self._gathered(rows, self.max_length)

    def means(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """As `gathered`, of each row one token, the mean of its own."""
        names = [f"states{i}" for i in range(len(self.dims))]
        return self._gathered([row | {name: mean_token(row[name]) for name in names} for row in rows], 1)

    def _gathered(self, rows: Sequence[Row], length: int) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for i, width in enumerate(self.dims):
            parts = [row[f"states{i}"] for row in rows]
            lengths = torch.tensor([len(part) for part in parts])[:, None]  # B 1
            column = torch.arange(length)  # L
            places = 1 + lengths.cumsum(0) - lengths + column  # B L
            found[f"tokens{i}"] = torch.cat([parts[0].new_zeros(1, width), *parts])
            found[f"places{i}"] = places.where(column < lengths, 0).int()
        if "pooled" in rows[0]:
            found["pooled"] = torch.cat([row["pooled"] for row in rows])
        return found

    def listed(self, shard: int) -> list[str]:
        """The captions of its pictures, each once."""
        return list(dict.fromkeys(c for i in self.span(shard) for c in self.pictures.captions(i)))

    def encoded(self, shard: int) -> tuple[list[str], list[Row]]:
        captions = self.listed(shard)
        parts = [captions[i : i + CHUNK] for i in range(0, len(captions), CHUNK)]
        return captions, [row for part in parts for row in self.encode(part)]


class ImageStore(Store):
    """Pictures to CLIP image embeddings."""

    def __init__(self, pictures: PictureSet, clip: CLIP | OpenCLIP, clip_about: dict[str, Any]) -> None:
        """clip_about: what tells this CLIP from others. Raises InputError where the cache is another's."""
        self.clip = clip
        super().__init__(pictures, {"kind": "image", "clip": clip_about})

    def __call__(self, index: int) -> Tensor:
        """The embedding of a picture in the cache, D. Raises BadPicture where it has none."""
        assert self.cache is not None
        row = self.cache.get(self.pictures.name(index))
        if row is None:
            raise BadPicture(self.pictures.name(index), "it has no CLIP embedding")
        return row["embed"][0]

    def to(self, device: torch.device | str) -> Self:
        self.clip.to(device)
        return self

    def view(self, index: int) -> Tensor:
        """The picture as CLIP is shown it: 3 px px, uint8. Raises BadPicture."""
        return self._view(index)

    @cached_property
    def _view(self) -> View:
        return self.pictures.view(self.clip.image_px, enlarge=True)

    @torch.no_grad()
    def encode(self, views: Tensor) -> Tensor:
        """Embeddings of views, B 3 px px uint8: B D, float32, on the device of the views."""
        return self.clip.encode_image(from_uint8(views))

    def sample(self) -> Tensor:
        """Embeddings for statistics: of all training pictures or, where there are many, of so many keyed
        draws. N D."""
        train, rows = self.pictures.train, []
        draws = range(len(train))
        if len(train) > STATISTICS:
            draws = [random.key(0, "statistics", i) % len(train) for i in range(STATISTICS)]
        for at in range(0, len(draws), CHUNK):
            rows.append(self.embeds([int(train[i]) for i in draws[at : at + CHUNK]]))
        return torch.cat(rows)

    def embeds(self, indices: list[int]) -> Tensor:
        """Embeddings of pictures, cached or not; those that cannot be read are left out. N D."""
        if self.cache is None:
            return self._encoded(indices)[1]
        rows = (self.cache.get(self.pictures.name(i)) for i in indices)
        return torch.cat([row["embed"] for row in rows if row is not None])

    def listed(self, shard: int) -> list[str]:
        return [self.pictures.name(i) for i in self.span(shard)]

    def encoded(self, shard: int) -> tuple[list[str], list[Row]]:
        names, rows = [], []
        span = self.span(shard)
        for start in span[::CHUNK]:
            found, embeds = self._encoded(list(span)[start - span[0] : start - span[0] + CHUNK])
            names += [self.pictures.name(i) for i in found]
            rows += [{"embed": embed[None]} for embed in embeds]
        return names, rows

    def _encoded(self, indices: list[int]) -> tuple[list[int], Tensor]:
        """Which of the pictures can be read, and their embeddings. The others are listed as bad."""
        quarantine, found, views = self.pictures.quarantine(), [], []
        for index in indices:
            try:
                views.append(self.view(index))
                found.append(index)
            except BadPicture as bad:
                quarantine.add(bad)
        device = next(self.clip.parameters()).device
        return found, self.encode(torch.stack(views).to(device)).cpu() if views else torch.zeros(0, 1)


def mean_token(states: Tensor) -> Tensor:
    """L D to 1 D, float32; zero where there is none."""
    return states.float().sum(0, keepdim=True) / max(1, len(states))


def padded(gathered: dict[str, Tensor]) -> TextEmbedding:
    """Texts as networks take them: states B L D, float32, zero where they are padded, and masks B L."""
    sequences = []
    while (places := gathered.get(f"places{len(sequences)}")) is not None:
        tokens = gathered[f"tokens{len(sequences)}"]  # N D
        tokens = tokens.float() if tokens.is_floating_point() else tokens  # ids stay what they are
        sequences.append(Tokens(F.embedding(places, tokens), places > 0))
    return TextEmbedding(tuple(sequences), gathered.get("pooled"))


def fingerprint(reference: dict[str, Any]) -> dict[str, Any]:
    """What an encoder's output depends on. Files that are known by their hash may have any name."""
    if reference.get("encoders"):
        return reference | {"encoders": [fingerprint(r) for r in reference["encoders"]]}
    names = ("name", "revision", "pretrained") if reference.get("sha256") else ()
    return {key: value for key, value in reference.items() if key not in names}


def stored_types(encoder: TextEncoder) -> list[torch.dtype]:
    """The type in which each sequence is kept: bfloat16 where the encoder computes in it, else float16."""
    parts = getattr(encoder, "encoders", None)
    if parts is not None:
        return [kind for part in parts for kind in stored_types(part)]
    exact = getattr(encoder, "dtype", None) == torch.bfloat16
    return [torch.bfloat16 if exact else torch.float16 for _ in encoder.dims]
