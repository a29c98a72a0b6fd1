"""Further pictures out of those there are: mirrored, moved, with their colour channels exchanged.

A decoder of CLIP image embeddings (unCLIP, arXiv:2204.06125) learns from pairs of a picture and its own
embedding, which need no caption. So any change that leaves a picture makes a further pair, though what the
caption says of colours and sides no longer holds. The changes here move pixels and mix none: what is sharp
stays so.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor
from torch.nn import functional as F

from cascade import random

CHANNELS = tuple(itertools.permutations(range(3)))
REACH = 8  # a picture is moved by up to its side divided by this, in each direction


def variants(x: Tensor, seeds: list[int]) -> Tensor:
    """One variant of each picture, B 3 H W, keyed by its seed. Where a picture moves away, its border is
    continued."""
    draws = random.uniform(seeds, "variant", count=4)  # B 4
    return torch.stack([_variant(row, *draw) for row, draw in zip(x, draws.tolist(), strict=True)])


def _variant(x: Tensor, mirror: float, channels: float, down: float, right: float) -> Tensor:
    height, width = x.shape[-2:]
    x = x[list(CHANNELS[int(channels * len(CHANNELS))])]
    x = x.flip(-1) if mirror < 0.5 else x
    dy, dx = height // REACH, width // REACH
    around = F.pad(x[None], (dx, dx, dy, dy), mode="replicate")[0]
    top, left = int(down * (2 * dy + 1)), int(right * (2 * dx + 1))
    return around[:, top : top + height, left : left + width]
