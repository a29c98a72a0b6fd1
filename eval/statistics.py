"""Intervals of what a finite number of pictures shows."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cascade import random

Z95 = 1.959964  # standard normal quantile at 0.975


def wilson(hits: int, count: int, z: float = Z95) -> tuple[float, float]:
    """Score interval of a share (Wilson 1927, J. Am. Stat. Assoc. 22:209): unlike the mean +- z sd of the
    binomial it stays in [0, 1] and has a width at 0 and at `count` hits. z: the normal quantile."""
    if not 0 <= hits <= count or count < 1:
        raise ValueError(f"expected 0 <= hits <= count and count >= 1, got {hits} of {count}")
    share, z2 = hits / count, z * z
    centre = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = z / (1 + z2 / count) * math.sqrt(share * (1 - share) / count + z2 / (4 * count * count))
    # the ends are exact where rounding would leave a trace
    return 0.0 if hits == 0 else centre - half, 1.0 if hits == count else centre + half


def bootstrap_mean(
    values: Tensor, seed: int = 0, level: float = 0.95, resamples: int = 10_000
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of `values` (N), resampled with replacement (Efron 1979,
    Ann. Stat. 7:1). For a paired comparison give the differences of the pairs. A function of `seed`."""
    values = values.double().flatten()
    generator = random.generator(seed, "bootstrap")
    chosen = torch.randint(len(values), (resamples, len(values)), generator=generator)  # R N
    tail = (1 - level) / 2
    low, high = values[chosen].mean(dim=1).quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64))
    return low.item(), high.item()
