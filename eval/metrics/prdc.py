"""How far two sets of features cover each other, by nearest neighbours: precision and recall
(arXiv:1904.06991 eq. 1-2), density and coverage (arXiv:2002.09797 eq. 3-4)."""

from __future__ import annotations

import torch
from torch import Tensor

NAMES = ("precision", "recall", "density", "coverage")


class Neighbours:
    """Distances between a real set N D and a fake one M D, float64. Keeps N N, N M and M M numbers."""

    def __init__(self, real: Tensor, fake: Tensor, k: int = 5) -> None:
        """k: whose distance is a row's radius, the k-th nearest of its own set, itself left out."""
        if min(len(real), len(fake)) <= k:
            raise ValueError(f"expected more than {k} rows in both sets, got {len(real)} and {len(fake)}")
        self.k = k
        self.across = _distances(real.double(), fake.double())  # N M
        self.within_fake = _distances(fake.double(), fake.double()).fill_diagonal_(torch.inf)  # M M
        self.real_radii = _radii(_distances(real.double(), real.double()).fill_diagonal_(torch.inf), k)  # N

    def measure(self, kept: Tensor | None = None) -> dict[str, float]:
        """The four shares (density may pass 1). kept: which fake rows to count, M booleans; None: all."""
        across, within = self.across, self.within_fake
        if kept is not None:
            across, within = across[:, kept], within[kept][:, kept]
        near_real = across < self.real_radii[:, None]  # N m: the fake lies in the real one's sphere
        near_fake = across < _radii(within, self.k)  # N m
        values = (
            near_real.any(dim=0).double().mean(),
            near_fake.any(dim=1).double().mean(),
            near_real.sum(dim=0).double().mean() / self.k,
            (across.amin(dim=1) < self.real_radii).double().mean(),
        )
        return {name: value.item() for name, value in zip(NAMES, values, strict=True)}


def _distances(x: Tensor, y: Tensor) -> Tensor:
    """Euclidean, N M."""
    return torch.cdist(x, y, compute_mode="use_mm_for_euclid_dist")


def _radii(distances: Tensor, k: int) -> Tensor:
    """k-th smallest of each row."""
    return distances.kthvalue(k, dim=1).values
