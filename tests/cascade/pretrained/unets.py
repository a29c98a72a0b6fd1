"""What the tests of public U-Nets share: random weights, inputs, comparison."""

from __future__ import annotations

import random

import torch
from torch import Tensor, nn

from cascade.conditioning import Conditioning, TextEmbedding, Tokens

LENGTH = 6  # tokens


def randomise(net: nn.Module, seed: int) -> None:
    """Weights that keep the size of what they multiply, and norms and offsets that show."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in net.named_parameters():
        with torch.no_grad():
            if p.ndim > 1:
                p.normal_(std=p[0].numel() ** -0.5, generator=generator)
            else:
                p.normal_(mean=float("norm" in name and "weight" in name), std=0.3, generator=generator)


def picture(rng: random.Random, batch: int, channels: int, size: int = 8) -> Tensor:
    return torch.randn(
        batch, channels, size, size, generator=torch.Generator().manual_seed(rng.randrange(99))
    )


def states(rng: random.Random, batch: int, width: int) -> Tensor:
    return torch.randn(batch, LENGTH, width, generator=torch.Generator().manual_seed(rng.randrange(99)))


def some_mask(batch: int) -> Tensor:
    """B L: differing numbers of real tokens."""
    return torch.arange(LENGTH) < torch.arange(1, batch + 1)[:, None] * 2


def conditioning(tokens: Tensor, mask: Tensor, pooled: Tensor | None = None, **other: Tensor) -> Conditioning:
    return Conditioning(text=TextEmbedding((Tokens(tokens, mask),), pooled), **other)


def assert_same(ours: Tensor, theirs: Tensor) -> None:
    """Within 1e-5 in float32, of outputs of about unit size."""
    assert 0.1 < theirs.std() < 10
    error = (ours - theirs).abs().max() / theirs.abs().max().clamp(min=1)
    assert error < 1e-5, float(error)
