"""A set of captioned pictures as training sees it, whatever it comes from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from cascade import random
from cascade.errors import InputError
from train.data.config import DataConfig
from train.data.decode import BadPicture, decode, square
from train.data.order import Order
from train.data.quarantine import Quarantine

T = TypeVar("T")

ATTEMPTS = 64  # to find a picture that can be read; at 20% bad ones all fail once in 10^45


class PictureSet(ABC):
    """Captioned pictures, numbered from 0. `train` and `heldout` are numbers, ascending; `folder` holds what
    is derived from the set: indices, caches, the quarantine."""

    train: Sequence[int] | np.ndarray
    heldout: Sequence[int] | np.ndarray
    subjects = False  # whether several pictures may be of one subject

    def __init__(self, cfg: DataConfig) -> None:
        self.cfg, self.folder = cfg, Path(cfg.folder)

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def name(self, index: int) -> str:
        """The picture's own name, which stays when others are added to the set."""

    @abstractmethod
    def encoded(self, index: int) -> bytes:
        """The picture's file. Raises BadPicture where there is none."""

    @abstractmethod
    def captions(self, index: int) -> list[str]:
        """The captions the picture has, the principal one first; at least one, which may be empty."""

    @abstractmethod
    def caption(self, index: int, seed: int) -> str:
        """The caption it is trained with at a draw of key `seed`, by the captions' weights."""

    @abstractmethod
    def order(self, seed: int, min_px: int = 1) -> Order:
        """The order in which training sees the pictures of at least `min_px` on their shorter side. Raises
        InputError where there is none."""

    def pixels(self, px: int) -> np.ndarray | None:
        """All pictures at px x px as one array (N px px 3, uint8) on disk; None: they are read one by one. It
        is mapped writable, as torch wants it, and what is written to it stays in memory."""
        return None

    def group(self, index: int) -> int:
        """Equal for pictures of the same principal caption, which are positives of each other in CLIP."""
        return random.key(0, self.captions(index)[0])

    def siblings(self, index: int) -> Sequence[int]:
        """The training pictures of the same subject, of which a set may have several, itself among them."""
        return [index]

    def picture(self, index: int) -> Tensor:
        """One picture at its full size: 3 H W, uint8. Raises BadPicture."""
        return decode(self.name(index), self.encoded(index), self.cfg.max_pixels)

    def resized(self, index: int, px: int, seed: int | None = None, enlarge: bool = False) -> Tensor:
        """A square of one picture at px x px: 3 px px, uint8; the middle one without a `seed`. Raises
        BadPicture, also where the picture is smaller and not to be enlarged."""
        full = self.picture(index)
        height, width = full.shape[1:]
        if min(height, width) < px and not enlarge:
            raise BadPicture(self.name(index), f"too small ({width}x{height} px, at least {px} are needed)")
        place = 0.5
        if seed is not None and self.cfg.crop == "random":
            place = random.uniform([seed], "square").item()
        return square(full, px, place)

    def view(self, px: int, enlarge: bool = False) -> View:
        """The pictures as squares of px a side; smaller ones are bad ones or are enlarged."""
        return View(self, px, enlarge)

    def quarantine(self) -> Quarantine:
        return Quarantine(self.folder / "quarantine.jsonl", self.cfg.max_bad, len(self))


class View:
    """Number of a picture -> a square of it, 3 px px, uint8, out of `pixels` where the set has them. Raises
    BadPicture."""

    def __init__(self, pictures: PictureSet, px: int, enlarge: bool) -> None:
        self._pictures, self._px, self._enlarge = pictures, px, enlarge
        pixels = pictures.pixels(px)
        self._pixels = None if pixels is None else torch.from_numpy(pixels).permute(0, 3, 1, 2)

    def __call__(self, index: int, seed: int | None = None) -> Tensor:
        if self._pixels is None:
            return self._pictures.resized(index, self._px, seed, self._enlarge)
        return self._pixels[index]


class Reader:
    """Position in the run -> a picture that can be read, and what was read of it. In the place of a bad one
    another stands, as a function of seed and position alone, so every process finds the same."""

    def __init__(self, pictures: PictureSet, order: Order) -> None:
        self.order, self._quarantine = order, pictures.quarantine()

    def __call__(self, position: int, read: Callable[[int], T]) -> T:
        """`read` gives what is wanted of a picture or raises BadPicture. Raises InputError where the
        quarantine is full, or where nothing can be read."""
        index, problem = self.order[position], None
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return read(index)
            except BadPicture as bad:
                self._quarantine.add(bad)
                problem, index = bad, self.order.replacement(position, attempt)
        raise InputError(f"{ATTEMPTS} pictures in a row cannot be used; the last: {problem}")


def weighted(weights: Sequence[float], seed: int) -> int:
    """A draw of key `seed` from so many choices."""
    edges = list(accumulate(weights))
    draw = random.uniform([seed], "caption").item() * edges[-1]
    return bisect_right(edges, draw, hi=len(edges) - 1)
