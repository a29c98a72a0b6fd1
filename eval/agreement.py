"""What votes show: shares with intervals when several votes are on one prompt, and agreement of raters."""

from __future__ import annotations

import torch
from scipy.special import stdtrit
from torch import Tensor

from eval.statistics import wilson


def clustered_share(shares: Tensor, votes: int) -> tuple[float, float, float]:
    """Mean and 95% interval of a share, or of a score in [0, 1], that was measured by `votes` votes on N
    prompts. shares: N, the mean of each prompt.

    Votes on one prompt are no independent evidence, so the interval is Wilson's at the effective sample size:
    the number of independent votes whose mean would vary as that of the prompts does (Korn and Graubard 1998,
    Survey Methodology 24:193), with Student's quantile for N prompts. It has a width even where all agree."""
    shares = shares.double()
    count, mean = len(shares), shares.mean().item()
    if count < 2:
        return mean, 0.0, 1.0
    variance = shares.var().item() / count  # of the mean
    effective = mean * (1 - mean) / variance if variance > 1e-12 else 0.0
    effective = min(max(effective, count), votes)  # one vote a prompt at least, and no more than were given
    low, high = wilson(mean * effective, effective, float(stdtrit(count - 1, 0.975)))
    return mean, low, high


def krippendorff_alpha(ratings: Tensor, levels: int) -> float | None:
    """Agreement of raters on ordered levels: 1 is perfect, 0 is chance, below 0 is worse than chance
    (Krippendorff 2011, Computing Krippendorff's Alpha-Reliability, ordinal difference).

    ratings: R U integers from 0 to levels - 1, raters by units, -1 where there is none. None where no unit
    has two ratings or all ratings are of one level, which says nothing about agreement."""
    counts = torch.stack([(ratings == level).sum(dim=0) for level in range(levels)], dim=1).double()  # U L
    given = counts.sum(dim=1)  # U
    counts, given = counts[given >= 2], given[given >= 2]
    # pairs of two ratings of one unit, each unit weighing as much as it has ratings
    both = counts[:, :, None] * counts[:, None, :] - torch.diag_embed(counts)  # U L L
    pairs = (both / (given - 1)[:, None, None]).sum(dim=0)
    totals = pairs.sum(dim=0)  # L
    between = _between(totals)
    expected = (torch.outer(totals, totals) * between).sum()
    if expected == 0:
        return None
    return (1 - (totals.sum() - 1) * (pairs * between).sum() / expected).item()


def _between(totals: Tensor) -> Tensor:
    """Squared ordinal difference of two levels: the ratings from one to the other, both ends counted half."""
    middle = totals.cumsum(0) - totals / 2
    return (middle[:, None] - middle[None, :]).square()
