"""Measures of a whole set of pictures against real ones, with intervals that hold for the prompts.

The real set is taken as it is; what varies is which prompts were asked. Intervals come from leaving out one
of twenty groups of prompts at a time (see `statistics.jackknife_half_width`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from cascade import random
from eval.metrics import kernel
from eval.metrics.frechet import Moments, frechet_distance, moments
from eval.metrics.prdc import Neighbours
from eval.statistics import jackknife_half_width

FEW = 2048  # pictures below which the field does not quote these measures
NEAREST = 5  # neighbours of precision, recall, density and coverage
MOST = 10_000  # pictures a side for these four, whose cost grows with the square


@dataclass(frozen=True)
class Value:
    value: float
    low: float | None = None
    high: float | None = None


def frechet(real: Moments, fake: Tensor, groups: Tensor) -> dict[str, Value]:
    """fake: M D. groups: the group of each row's prompt, M integers."""
    replicates = (frechet_distance(real, moments(fake[groups != group])) for group in range(_count(groups)))
    return {"fd": _around(frechet_distance(real, moments(fake)), replicates, groups, least=0.0)}


def kid(real: Tensor, fake: Tensor, groups: Tensor, seed: int) -> dict[str, Value]:
    """real: N D. The value is the mean over random subsets as published; the interval is of all pictures."""
    sums = kernel.kernel_sums(kernel.polynomial, real, fake, groups)
    replicates = (sums.without(group).unbiased() for group in range(_count(groups)))
    return {"kid": _around(kernel.kid(real, fake, seed), replicates, groups)}


def cmmd(real: Tensor, fake: Tensor, groups: Tensor, seed: int) -> dict[str, Value]:
    """Of embeddings of any length."""
    real, fake = F.normalize(real.double(), dim=1), F.normalize(fake.double(), dim=1)
    sums = kernel.kernel_sums(kernel.gaussian, real, fake, groups)
    replicates = (kernel.CMMD_SCALE * sums.without(group).biased() for group in range(_count(groups)))
    return {"cmmd": _around(kernel.CMMD_SCALE * sums.biased(), replicates, groups, least=0.0)}


def neighbours(real: Tensor, fake: Tensor, groups: Tensor, seed: int) -> dict[str, Value]:
    """Precision, recall, density and coverage; nothing where a set has too few pictures."""
    some = _some(len(fake), seed, "fake")
    real, fake, groups = real[_some(len(real), seed, "real")], fake[some], groups[some]
    if min(len(real), len(fake) - _largest(groups)) <= NEAREST:
        return {}
    found = Neighbours(real, fake, NEAREST)
    without = [found.measure(groups != group) for group in range(_count(groups))]
    return {
        name: _around(
            value, (values[name] for values in without), groups, 0.0, math.inf if name == "density" else 1.0
        )
        for name, value in found.measure().items()
    }


OF_FEATURES: dict[str, Callable[[Tensor, Tensor, Tensor, int], dict[str, Value]]] = {
    "kid": kid,
    "cmmd": cmmd,
    "prdc": neighbours,
}


def _some(count: int, seed: int, *parts: str) -> Tensor:
    """MOST of `count` at random, in order."""
    order = torch.randperm(count, generator=random.generator(seed, "neighbours", *parts))
    return order[:MOST].sort().values


def _count(groups: Tensor) -> int:
    return int(groups.max()) + 1


def _largest(groups: Tensor) -> int:
    return int(groups.bincount().max())


def _around(
    value: float,
    replicates: Iterable[float],
    groups: Tensor,
    least: float = -math.inf,
    most: float = math.inf,
) -> Value:
    if len(groups) - _largest(groups) < 2:  # nothing is left without a group
        return Value(value)
    half = jackknife_half_width(torch.tensor(list(replicates), dtype=torch.float64))
    return Value(value, max(least, value - half), min(most, value + half))
