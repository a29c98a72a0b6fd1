"""What a finite number of prompts and pictures shows: intervals, paired tests, corrections.

The unit is the prompt: pictures of one prompt are averaged first, for they are no independent evidence.
Intervals of means are bootstrap intervals over prompts. Plain percentile intervals are too narrow for the 7
to 38 prompts of a DrawBench category (of normal scores they cover 88% at 7 and 93% at 20), and BCa, which
mends skewness, is as narrow; so the percentiles are moved out (93% at 7, 94 to 95% from 10 on).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from scipy.special import ndtr, stdtrit
from torch import Tensor

from cascade import random

Verdict = Literal["A better", "B better", "not significant"]

Z95 = 1.959964  # standard normal quantile at 0.975
RESAMPLES = 10_000
FLIPS = 20_000  # random sign vectors of a permutation test
EXACT = 14  # up to here all 2^(n-1) sign vectors are fewer than FLIPS
BLOCK = 2**22  # numbers drawn at a time


def wilson(hits: float, count: float, z: float = Z95) -> tuple[float, float]:
    """Score interval of a share (Wilson 1927, J. Am. Stat. Assoc. 22:209): unlike the mean +- z sd of the
    binomial it stays in [0, 1] and has a width at 0 and at `count` hits. z: the normal quantile."""
    if not 0 <= hits <= count or count < 1:
        raise ValueError(f"expected 0 <= hits <= count and count >= 1, got {hits} of {count}")
    share, z2 = hits / count, z * z
    centre = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = z / (1 + z2 / count) * math.sqrt(share * (1 - share) / count + z2 / (4 * count * count))
    # the ends are exact where rounding would leave a trace
    return 0.0 if hits == 0 else centre - half, 1.0 if hits == count else centre + half


# -- intervals -----------------------------------------------------------------------------------------------


def bootstrap_mean(
    values: Tensor, seed: int = 0, level: float = 0.95, resamples: int = RESAMPLES
) -> tuple[float, float]:
    """Bootstrap interval of the mean of `values` (N): see `bootstrap_means` and `percentiles`. For a paired
    comparison give the differences of the pairs. A function of `seed`."""
    replicates = bootstrap_means(values.flatten()[:, None], seed, resamples)
    low, high = percentiles(replicates, values.numel(), level)[:, 0].tolist()
    return low, high


def bootstrap_means(values: Tensor, seed: int = 0, resamples: int = RESAMPLES) -> Tensor:
    """Means of `resamples` draws of N rows with replacement (Efron 1979, Ann. Stat. 7:1). values: N M, of
    which all columns see the same draws. Returns R M, float64."""
    values, count = values.double(), len(values)
    generator = random.generator(seed, "bootstrap")
    means = []
    for rows in _blocks(resamples, count):
        chosen = torch.randint(count, (rows, count), generator=generator)  # r N
        times = torch.zeros(rows, count, dtype=torch.float64)  # how often a row was drawn
        times.scatter_add_(1, chosen, torch.ones_like(times))
        means.append(times @ values / count)
    return torch.cat(means)


def percentiles(replicates: Tensor, count: int, level: float = 0.95) -> Tensor:
    """Ends of the expanded percentile interval of replicates R M made from `count` values: 2 M.

    A resampled mean has variance (n - 1)/n s^2/n and normal tails, where the mean of n normal values calls
    for s^2/n and Student's. Percentiles at Phi(-sqrt(n/(n - 1)) t) mend both, and keep the asymmetry of
    skewed scores (Hesterberg 2015, Am. Stat. 69:371, "expanded percentile interval")."""
    if count < 2:
        return replicates[:1].expand(2, -1)
    quantile = stdtrit(count - 1, 0.5 + level / 2) * math.sqrt(count / (count - 1))
    tail = float(ndtr(-quantile))
    return replicates.quantile(torch.tensor([tail, 1 - tail], dtype=replicates.dtype), dim=0)


def jackknife_half_width(replicates: Tensor, level: float = 0.95) -> float:
    """Half the width of the interval of a statistic from its `replicates` (G), each computed without one of G
    groups of equal size (delete-a-group jackknife, Kott 2001, J. Off. Stat. 17:521).

    It serves distances between sets, for which the bootstrap is wrong: a picture drawn twice is no second
    picture, and every such distance takes the copies for a fault of the set."""
    groups = len(replicates)
    deviation = replicates.double() - replicates.double().mean()
    error = math.sqrt((groups - 1) / groups * deviation.square().sum().item())
    return float(stdtrit(groups - 1, 0.5 + level / 2)) * error


def make_groups(count: int, groups: int, seed: int = 0) -> Tensor:
    """The group of each of `count` prompts, at random and of equal sizes up to one: `count` integers."""
    order = torch.randperm(count, generator=random.generator(seed, "groups"))
    return order.argsort() % min(groups, count)


# -- tests ---------------------------------------------------------------------------------------------------


def permutation_test(differences: Tensor, seed: int = 0) -> Tensor:
    """Two-sided paired permutation test that A and B are alike (Fisher 1935, The Design of Experiments,
    section 21): under it each difference A - B could as well have had the other sign.

    differences: N M, one row a prompt, columns tested apart. Returns M p-values: the share of sign vectors
    whose sum is at least as far from 0 as the observed one. Up to EXACT rows all sign vectors count; beyond,
    FLIPS random ones and the observed one, which keeps the test valid (Phipson and Smyth 2010)."""
    differences = differences.double()
    count = len(differences)
    observed = differences.sum(dim=0).abs() * (1 - 1e-9)  # M; equal sums differ by rounding
    signs, itself = (_all_signs(count), 0) if count <= EXACT else (_random_signs(count, seed), 1)
    hits, total = torch.full_like(observed, itself), itself
    for block in signs:  # r N
        hits += ((block @ differences).abs() >= observed).sum(dim=0)
        total += len(block)
    return hits / total


def smallest_p(count: int) -> float:
    """The least p-value that `permutation_test` can give to `count` differences."""
    return 1 / 2 ** (count - 1) if count <= EXACT else 1 / (FLIPS + 1)


def holm(p: Sequence[float]) -> list[float]:
    """p-values corrected for their number, step-down (Holm 1979, Scand. J. Stat. 6:65)."""
    order = sorted(range(len(p)), key=lambda i: p[i])
    corrected, least = [0.0] * len(p), 0.0
    for rank, index in enumerate(order):
        least = max(least, min(1.0, (len(p) - rank) * p[index]))
        corrected[index] = least
    return corrected


def effect_size(differences: Tensor) -> float | None:
    """Mean of paired differences (N) over their standard deviation, Cohen's d_z; None where that is 0."""
    if len(differences) < 2:
        return None
    mean, spread = differences.double().mean().item(), differences.double().std().item()
    return mean / spread if spread > 1e-12 * abs(mean) else None


def verdict(difference: float, p: float, higher_is_better: bool, level: float = 0.05) -> Verdict:
    """What a difference A - B with that p-value shows, in words."""
    if p >= level or difference == 0:
        return "not significant"
    return "A better" if (difference > 0) == higher_is_better else "B better"


def _all_signs(count: int) -> Iterator[Tensor]:
    """Every sign vector of `count` up to a change of all signs, which the test does not see: 2^(count-1)."""
    numbers = torch.arange(2 ** (count - 1))[:, None]
    yield 1 - 2 * (numbers >> torch.arange(count) & 1).double()  # the last sign is always +


def _random_signs(count: int, seed: int) -> Iterator[Tensor]:
    generator = random.generator(seed, "flips")
    for rows in _blocks(FLIPS, count):
        yield 1 - 2 * torch.randint(2, (rows, count), generator=generator).double()


def _blocks(rows: int, width: int) -> Iterator[int]:
    """`rows` in parts of at most BLOCK numbers."""
    step = max(1, BLOCK // width)
    for start in range(0, rows, step):
        yield min(step, rows - start)
