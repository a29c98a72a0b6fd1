"""What the judge sees of a picture: EfficientNet-Lite0 at several depths, and its pixels, at one size."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from cascade.images import downsample, from_uint8, to_uint8
from eval.extractors.vision import EfficientNetLite0

FINAL = slice(0, 1280)  # of a row: pooled features of the last layer, those of distances
LAYERS = slice(1280, 6400)  # of a row of `PooledLayers`: what its heads read beside them
PIXELS = slice(6400, 9472)  # of the same: the picture at PIXELS_PX, as shares of the range
GRIDS = (0, 4, 4, 4, 2)  # places a side kept of the outputs at the five resolutions, beside their means
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
    """The same features, then means, maxima and coarse grids of the outputs at the five resolutions, then
    pixels. The last layer tells objects apart and forgets colours; the first ones know what colour there is,
    and where."""

    def __init__(self, px: int) -> None:
        super().__init__(px)
        self.network += ", last layer, pooled outputs of five resolutions, pixels"

    def features(self, pixels: Tensor) -> Tensor:
        last, layers = self.module.forward_intermediates(pixels)  # B C H W each
        pooled = [x.mean((2, 3)) for x in layers] + [x.amax((2, 3)) for x in layers]
        grids = [F.adaptive_avg_pool2d(x, n).flatten(1) for x, n in zip(layers, GRIDS, strict=True) if n]
        small = F.adaptive_avg_pool2d(pixels, PIXELS_PX).flatten(1) * (128 / 255)  # of levels / 128
        return torch.cat([self.module.forward_head(last), *pooled, *grids, small], dim=1)  # B D
