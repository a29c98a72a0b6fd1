"""Image embeddings as short sequences of integers: quantised principal components (unCLIP 2.2)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cascade.errors import InputError
from prior.statistics import check_embeds


class PCAQuantizer(nn.Module):
    """The first `codes` principal components, largest variance first, each cut into `buckets` equal parts of
    its range in the training set. Basis and ranges are stored with the weights."""

    mean: Tensor  # D
    basis: Tensor  # K D, orthonormal rows
    low: Tensor  # K
    high: Tensor  # K

    def __init__(self, embed_dim: int, codes: int, buckets: int):
        super().__init__()
        self.buckets = buckets
        self.register_buffer("mean", torch.zeros(embed_dim))
        self.register_buffer("basis", torch.eye(embed_dim)[:codes].clone())
        self.register_buffer("low", -torch.ones(codes))
        self.register_buffer("high", torch.ones(codes))

    def fit(self, embeds: Tensor) -> None:
        """Take basis and ranges from N D embeddings. Raises InputError on fewer rows than components."""
        check_embeds(embeds, len(self.mean), least=len(self.basis) + 1)
        mean, basis, _ = principal_components(embeds)
        basis = basis[: len(self.basis)]
        components = (embeds.double() - mean) @ basis.T  # N K
        self.mean.copy_(mean)
        self.basis.copy_(basis)
        self.low.copy_(components.amin(dim=0))
        self.high.copy_(components.amax(dim=0))

    def encode(self, embeds: Tensor) -> Tensor:
        """B D to codes B K, int64 in [0, buckets). What lies outside the range goes to the nearest bucket."""
        components = (embeds.float() - self.mean.float()) @ self.basis.float().T
        share = (components - self.low.float()) / (self.high - self.low).float().clamp(min=1e-12)
        return (share * self.buckets).long().clamp(0, self.buckets - 1)

    def decode(self, codes: Tensor) -> Tensor:
        """Codes B k to embeddings B D, float32: bucket centres. k may be less than K; the components that are
        missing are then at their mean."""
        k = codes.shape[1]
        low, high = self.low[:k].float(), self.high[:k].float()
        components = low + (codes.float() + 0.5) / self.buckets * (high - low)
        return self.mean.float() + components @ self.basis[:k].float()


def principal_components(embeds: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean (D), orthonormal directions (rows, largest variance first) and variances, float64, of N D rows."""
    embeds = embeds.double()
    mean = embeds.mean(dim=0)
    _, scale, basis = torch.linalg.svd(embeds - mean, full_matrices=False)
    return mean, basis, scale.square() / len(embeds)


def components_for(embeds: Tensor, share: float = 0.99) -> int:
    """How many principal components keep `share` of the variance of N D embeddings (the paper: 319 of 1024
    for 99%). Raises InputError on a share outside (0, 1]."""
    if not 0 < share <= 1:
        raise InputError(f"share of variance {share!r}: expected more than 0, at most 1")
    check_embeds(embeds, embeds.shape[-1], least=2)
    _, _, variances = principal_components(embeds)
    kept = variances.cumsum(0) / variances.sum()
    return min(int((kept < share).sum()) + 1, len(kept))
