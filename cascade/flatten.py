"""Flat areas of drawings made flat: mean shift of a picture's colours."""

from __future__ import annotations

from types import EllipsisType

import torch
from torch import Tensor

RADIUS = 2  # px: in one round a pixel sees the 5 x 5 around it
# How many of these (by weight) must be like it for a pixel to begin to move, and to move all the way.
FEW, ENOUGH = 5.0, 7.5

Part = tuple[EllipsisType, slice, slice]  # rows and columns of pictures


def flattened(drawn: Tensor, bandwidth: float, rounds: int = 8) -> Tensor:
    """Pictures whose neighbouring colours have moved together where they were alike. B 3 H W, like `drawn`.

    Blurring mean shift (Fukunaga & Hostetler 1975; on pictures Comaniciu & Meer 2002): in each round a pixel
    becomes the mean of its window, weighted by exp(-d^2 / (2 bandwidth^2)), where d is the distance between
    the two colours, in the units of `drawn`. What differs by a few bandwidths does not mix, a gradient stays
    one, and the unevenness that a network leaves in an area of one colour goes. A pixel that in the end has
    few of its colour around it, as along an antialiased edge, stays as it was drawn: among one another such
    pixels would make steps of the edge.

    A denoiser under squared error has little to gain in flat areas; a feature network sees them at one level
    of 255. Unevenness as wide as a base network's patches takes more rounds than the grain of a
    super-resolution stage.
    """
    pairs = _pairs(*drawn.shape[-2:])
    x, weights = drawn, torch.ones_like(drawn[:, :1])
    for _ in range(rounds):
        total, weights = x.clone(), torch.ones_like(x[:, :1])  # each pixel's own share
        for here, there in pairs:
            distance = (x[here] - x[there]).square().sum(dim=1, keepdim=True)
            weight = torch.exp(distance / (-2 * bandwidth**2))  # the same for both of the pair
            total[here] += weight * x[there]
            total[there] += weight * x[here]
            weights[here] += weight
            weights[there] += weight
        x = total / weights
    return torch.lerp(drawn, x, ((weights - FEW) / (ENOUGH - FEW)).clamp(0, 1))


def _pairs(height: int, width: int) -> list[tuple[Part, Part]]:
    """Parts of a picture, two and two, whose pixels are one another's neighbours: one of each two opposite
    offsets in the window, as both make the same pairs."""
    pairs = []
    for dy in range(min(RADIUS, height - 1) + 1):
        for dx in range(-min(RADIUS, width - 1), min(RADIUS, width - 1) + 1):
            if dy > 0 or dx > 0:
                here = (..., slice(dy, height), slice(max(dx, 0), width + min(dx, 0)))
                there = (..., slice(0, height - dy), slice(max(-dx, 0), width - max(dx, 0)))
                pairs.append((here, there))
    return pairs
