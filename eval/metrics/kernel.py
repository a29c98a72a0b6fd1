"""Distances of two sets of features by a kernel: squared maximum mean discrepancy (Gretton et al. 2012,
JMLR 13:723). KID (arXiv:1801.01401) and CMMD (arXiv:2401.09603) are two kernels and two estimators."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from cascade import random

Kernel = Callable[[Tensor, Tensor], Tensor]  # N D, M D -> N M
CMMD_SIGMA, CMMD_SCALE = 10.0, 1000.0
BLOCK = 2**24  # kernel values at a time


def polynomial(x: Tensor, y: Tensor) -> Tensor:
    """(x.y / D + 1)^3: N M (KID, section 3)."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def gaussian(x: Tensor, y: Tensor) -> Tensor:
    """exp(-|x - y|^2 / (2 sigma^2)) with sigma 10: N M (CMMD, section 4)."""
    squares = x.square().sum(dim=1)[:, None] + y.square().sum(dim=1) - 2 * x @ y.T
    return torch.exp(-squares.clamp(min=0) / (2 * CMMD_SIGMA**2))


def kid(real: Tensor, fake: Tensor, seed: int = 0, subsets: int = 100, size: int = 1000) -> float:
    """Kernel inception distance of N D and M D: the mean of the unbiased estimate over `subsets` draws of
    `size` rows of each without replacement. Where a set has no more rows than that, the estimate of both sets
    whole, which the subsets only approximate. A function of `seed`."""
    if min(len(real), len(fake)) <= size:
        return kernel_sums(polynomial, real, fake).unbiased()
    total = 0.0
    for number in range(subsets):
        x, y = (
            rows[torch.randperm(len(rows), generator=random.generator(seed, "kid", name, number))[:size]]
            for name, rows in (("real", real), ("fake", fake))
        )
        total += kernel_sums(polynomial, x, y).unbiased()
    return total / subsets


def cmmd(real: Tensor, fake: Tensor) -> float:
    """1000 times the biased (minimum variance) estimate between CLIP embeddings N D and M D of length 1."""
    return CMMD_SCALE * kernel_sums(gaussian, real, fake).biased()


@dataclass(frozen=True)
class KernelSums:
    """Sums of kernel values within and across two sets, the second cut into G groups. From them follow both
    estimates, of the whole and without any group."""

    real: float  # over all pairs of the first set
    real_diagonal: float
    real_count: int
    fake: Tensor  # G G, over the pairs of two groups
    fake_diagonal: Tensor  # G
    fake_count: Tensor  # G
    across: Tensor  # G

    def without(self, group: int) -> KernelSums:
        """The same sums as if the second set had no such group."""
        kept = torch.arange(len(self.across)) != group
        return replace(
            self,
            fake=self.fake[kept][:, kept],
            fake_diagonal=self.fake_diagonal[kept],
            fake_count=self.fake_count[kept],
            across=self.across[kept],
        )

    def unbiased(self) -> float:
        """Squared MMD without the diagonals (Gretton et al. 2012, eq. 3): it may be negative."""
        n, m = self.real_count, self.fake_count.sum()
        within = (self.real - self.real_diagonal) / (n * (n - 1))
        within += (self.fake.sum() - self.fake_diagonal.sum()) / (m * (m - 1))
        return (within - 2 * self.across.sum() / (n * m)).item()

    def biased(self) -> float:
        """Squared MMD with the diagonals (Gretton et al. 2012, eq. 5): at least 0 up to rounding."""
        n, m = self.real_count, self.fake_count.sum()
        within = self.real / n**2 + self.fake.sum() / m**2
        return (within - 2 * self.across.sum() / (n * m)).item()


def kernel_sums(kernel: Kernel, real: Tensor, fake: Tensor, groups: Tensor | None = None) -> KernelSums:
    """Of N D and M D. groups: the group of each row of `fake`, M integers from 0; None: one group."""
    real, fake = real.double(), fake.double()
    whole = torch.zeros(len(real), dtype=torch.long)
    of_fake = torch.zeros(len(fake), dtype=torch.long) if groups is None else groups
    within = _pair_sums(kernel, real, real, whole, whole)
    diagonals = [torch.vmap(lambda x: kernel(x[None], x[None])[0, 0])(rows) for rows in (real, fake)]
    empty = torch.zeros(int(of_fake.max()) + 1, dtype=torch.float64)
    return KernelSums(
        real=within.item(),
        real_diagonal=diagonals[0].sum().item(),
        real_count=len(real),
        fake=_pair_sums(kernel, fake, fake, of_fake, of_fake),
        fake_diagonal=empty.index_add(0, of_fake, diagonals[1]),
        fake_count=of_fake.bincount(),
        across=_pair_sums(kernel, real, fake, whole, of_fake)[0],
    )


def _pair_sums(kernel: Kernel, x: Tensor, y: Tensor, of_x: Tensor, of_y: Tensor) -> Tensor:
    """Sums of k(x, y) over the pairs of each group of x and each of y, in blocks of rows."""
    to_x, to_y = (F.one_hot(groups).double() for groups in (of_x, of_y))  # N G, M H
    total = torch.zeros(to_x.shape[1], to_y.shape[1], dtype=torch.float64)
    for rows in torch.arange(len(x)).split(max(1, BLOCK // len(y))):
        total += to_x[rows].T @ (kernel(x[rows], y) @ to_y)
    return total
