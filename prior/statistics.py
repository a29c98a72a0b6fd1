"""Statistics of the image embeddings that a prior is trained on, stored with its weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cascade.errors import InputError

MIN_STD = 1e-4  # a dimension that never varies stays at its mean


class Standardizer(nn.Module):
    """Per-dimension standardisation (Karlo): the image noise schedules assume data of unit variance."""

    mean: Tensor  # D
    std: Tensor  # D

    def __init__(self, dim: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("std", torch.ones(dim))

    def fit(self, embeds: Tensor) -> None:
        """Take mean and standard deviation from N D embeddings. Raises InputError on fewer than two rows,
        another width or numbers that are not finite."""
        check_embeds(embeds, len(self.mean), least=2)
        embeds = embeds.double()
        self.mean.copy_(embeds.mean(dim=0))
        self.std.copy_(embeds.std(dim=0, correction=0).clamp(min=MIN_STD))

    def forward(self, embeds: Tensor) -> Tensor:
        """B D in CLIP's scale to B D of zero mean and unit variance, float32."""
        return (embeds.float() - self.mean.float()) / self.std.float()

    def inverse(self, standard: Tensor) -> Tensor:
        return standard.float() * self.std.float() + self.mean.float()


def check_embeds(embeds: Tensor, dim: int, least: int) -> None:
    """Raise InputError unless `embeds` is N dim with N >= least, all finite."""
    if embeds.ndim != 2 or embeds.shape[1] != dim or len(embeds) < least:
        raise InputError(
            f"image embeddings: expected at least {least} rows of width {dim}, got {tuple(embeds.shape)}"
        )
    if not torch.isfinite(embeds).all():
        raise InputError("image embeddings: expected finite numbers")
