"""Inpainting: a part of the picture is known, and a network with inpaint channels draws the rest.

As GLIDE does it (arXiv:2112.10741, section 2.3): the network sees the known part and the mask beside x_t,
and at every step the known part takes its place in the estimate of x_0. So it ends up in the result as it
was given.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL.Image import Image
from torch import Tensor

from cascade.diffusion.samplers import Denoise
from cascade.errors import InputError
from cascade.images import downsample, from_pil

Pictures = Tensor | Image | Sequence[Image]


@dataclass(frozen=True)
class Known:
    """The known part of B pictures."""

    picture: Tensor  # B 3 H W in [-1, 1]
    mask: Tensor  # B 1 H W bool, True where the picture is known

    def __len__(self) -> int:
        return len(self.picture)

    def __getitem__(self, rows: slice) -> Known:
        return Known(self.picture[rows], self.mask[rows])

    def to(self, device: torch.device) -> Known:
        return Known(self.picture.to(device), self.mask.to(device))

    def repeat(self, times: int) -> Known:
        """Each row `times` times in a row (a a b b)."""
        return Known(*(x.repeat_interleave(times, dim=0) for x in (self.picture, self.mask)))

    def fitted(self, count: int, size: tuple[int, int]) -> Known:
        """One row a picture of `count` of `size` (H, W). Raises InputError where this is of another size."""
        if self.picture.shape[-2:] != size:
            found = "{} x {}".format(*self.picture.shape[-2:])
            raise InputError(f"inpaint: a picture of {found}: expected {size[0]} x {size[1]}, as is drawn")
        return self.repeat(count) if len(self) == 1 else self

    def resized(self, size: tuple[int, int]) -> Known:
        """At a smaller size (H, W). A pixel is known where all that it is made of is."""
        if self.picture.shape[-2:] == size:
            return self
        unknown = F.adaptive_max_pool2d((~self.mask).float(), size) > 0
        return Known(downsample(self.picture, size), ~unknown)

    def channels(self) -> Tensor:
        """What the network is told, B 4 H W: the picture times its mask, and the mask."""
        mask = self.mask.to(self.picture.dtype)
        return torch.cat([self.picture * mask, mask], dim=1)

    def over(self, x: Tensor) -> Tensor:
        """`x`, B 3 H W, with the known part in its place."""
        return torch.where(self.mask, self.picture, x)

    def kept_by(self, denoise: Denoise, base: Tensor | None = None) -> Denoise:
        """`denoise` with the known part in its estimates of x_0, or of x_0 minus `base` where that is what
        it estimates."""
        known = self if base is None else Known(self.picture - base, self.mask)

        def kept(x: Tensor, logsnr: Tensor) -> Tensor | tuple[Tensor, Tensor]:
            estimate = denoise(x, logsnr)
            if isinstance(estimate, tuple):
                return known.over(estimate[0]), estimate[1]
            return known.over(estimate)

        return kept


def known_part(inpaint: object) -> Known:
    """`(picture, mask)` checked. picture: float B 3 H W in [-1, 1], or PIL pictures; mask: B 1 H W, bool or
    of zeros and ones, 1 where the picture is kept, or PIL pictures that are white there. One row of either
    may stand for all. Raises InputError, one line."""
    if not isinstance(inpaint, Sequence) or len(inpaint) != 2:
        raise InputError(f"inpaint: expected (picture, mask), got {type(inpaint).__name__}")
    picture, mask = _picture(inpaint[0]), _mask(inpaint[1])
    if picture.shape[-2:] != mask.shape[-2:]:
        sizes = [f"{height} x {width}" for height, width in (picture.shape[-2:], mask.shape[-2:])]
        raise InputError(f"inpaint: the picture is {sizes[0]}, the mask {sizes[1]}: expected one size")
    rows = max(len(picture), len(mask))
    if {len(picture), len(mask)} - {1, rows}:
        raise InputError(f"inpaint: {len(picture)} pictures and {len(mask)} masks: expected as many, or one")
    return Known(picture.expand(rows, -1, -1, -1), mask.expand(rows, -1, -1, -1))


def _picture(given: object) -> Tensor:
    x = _stacked(given, from_pil)
    if x is None or x.ndim != 4 or x.shape[1] != 3 or not len(x) or not x.is_floating_point():
        raise InputError(f"inpaint: picture: expected float B 3 H W in [-1, 1], got {_describe(given, x)}")
    if not bool((x.abs() <= 1).all()):
        raise InputError("inpaint: picture: expected values in [-1, 1]")
    return x.float()


def _mask(given: object) -> Tensor:
    x = _stacked(given, lambda image: torch.from_numpy(np.array(image.convert("L")) > 127)[None])
    if x is None or x.ndim != 4 or x.shape[1] != 1 or not len(x):
        raise InputError(f"inpaint: mask: expected B 1 H W, 1 where kept, got {_describe(given, x)}")
    if not bool(((x == 0) | (x == 1)).all()):
        raise InputError("inpaint: mask: expected 1 where the picture is kept, 0 elsewhere, nothing between")
    return x.bool()


def _stacked(given: object, read: Callable[[Image], Tensor]) -> Tensor | None:
    """A tensor as it is, PIL pictures of one size as a tensor, None for anything else."""
    if isinstance(given, Tensor):
        return given
    images = [given] if isinstance(given, Image) else given
    if not isinstance(images, Sequence) or not all(isinstance(image, Image) for image in images):
        return None
    if len({image.size for image in images}) != 1:
        raise InputError("inpaint: expected at least one picture and mask, all of one size")
    return torch.stack([read(image) for image in images])


def _describe(given: object, x: Tensor | None) -> str:
    return type(given).__name__ if x is None else f"{x.dtype} {tuple(x.shape)}"
