"""What the judge sees of a picture: EfficientNet-Lite0 at several depths, and its pixels, at one size."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor
from torch.nn import functional as F

from cascade.images import downsample, from_uint8, to_uint8
from eval.extractors.vision import EfficientNetLite0

FINAL = slice(0, 1280)  # of a row: pooled features of the last layer, those of distances
HEADS = slice(0, 7129)  # of a row of `PooledLayers`: what heads read
COLOURS = slice(6400, 7129)  # of these, how often each colour occurs
PIXELS = slice(7129, 10201)  # of the same: the picture at PIXELS_PX, as shares of the range
GRIDS = (0, 4, 4, 4, 2)  # places a side kept of the outputs at the five resolutions, beside their means
COLOURS_PX, LEVELS = 112, 9  # where colours are counted, and levels a channel
PIXELS_PX = 32


class Sized(EfficientNetLite0):
    """`EfficientNetLite0` of a picture at `px`, as a stage of that size would save it: 8 bits."""

    def __init__(self, px: int) -> None:
        super().__init__()
        self.px = px
        self.resize = f"to {px} px without aliasing, 8 bits, then {self.resize}"

    def prepare(self, picture: Tensor) -> Tensor:
        return super().prepare(from_uint8(to_uint8(downsample(picture, self.px))))


class PooledLayers(Sized):
    """The same features, then means, maxima and coarse grids of the outputs at the five resolutions, then how
    often each colour occurs, then pixels. The last layer tells objects apart and forgets colours, which are
    what skin tones and half of a style are made of."""

    def __init__(self, px: int) -> None:
        super().__init__(px)
        self.network += ", last layer, pooled outputs of five resolutions, colours, pixels"

    def features(self, pixels: Tensor) -> Tensor:
        last, layers = self.module.forward_intermediates(pixels)  # B C H W each
        pooled = [x.mean((2, 3)) for x in layers] + [x.amax((2, 3)) for x in layers]
        grids = [F.adaptive_avg_pool2d(x, n).flatten(1) for x, n in zip(layers, GRIDS, strict=True) if n]
        shares = (pixels * 128 + 127) / 255
        colours = histogram(F.adaptive_avg_pool2d(shares, COLOURS_PX).clamp(0, 1)).sqrt()
        small = F.adaptive_avg_pool2d(shares, PIXELS_PX).flatten(1)
        return torch.cat([self.module.forward_head(last), *pooled, *grids, colours, small], dim=1)  # B D


def histogram(pictures: Tensor) -> Tensor:
    """B 3 H W in [0, 1] to the share of each of LEVELS^3 colours: B L. A pixel counts for the eight colours
    around its own, the more the nearer they are."""
    place = pictures.flatten(2) * (LEVELS - 1)  # B 3 P
    low = place.floor().clamp(max=LEVELS - 2)
    above = place - low
    found = pictures.new_zeros(len(pictures), LEVELS**3)
    for corner in itertools.product((0, 1), repeat=3):
        up = pictures.new_tensor(corner)[:, None]  # 3 1
        weight = (up * above + (1 - up) * (1 - above)).prod(dim=1)  # B P
        red, green, blue = (low + up).long().unbind(dim=1)
        found.scatter_add_(1, (red * LEVELS + green) * LEVELS + blue, weight)
    return found / place.shape[2]
