"""Small networks and conditions that the tests of this folder share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from cascade.conditioning import Conditioning, TextEmbedding, Tokens
from cascade.config import UNetConfig
from cascade.nn.unet import UNet

WIDTH, LENGTH, EMBED = 24, 5, 12  # text width, tokens, image-embedding width


def config(layout: str = "efficient", **changes: Any) -> UNetConfig:
    """Two levels, text and image embedding; `changes` replace fields."""
    fields: dict[str, Any] = dict(
        layout=layout,
        channels=(16, 32),
        blocks=(1, 2),
        strides=(1, 2),
        self_attention=(False, True),
        text_attention=(False, True),
        head_channels=16,
        text_dims=(WIDTH,),
        pool_heads=4,
        image_embed_dim=EMBED,
    )
    return UNetConfig(**{**fields, **changes})


def network(layout: str = "efficient", seed: int = 0, **changes: Any) -> UNet:
    """A network whose zero-initialised layers are drawn at random: every input shows in the output."""
    torch.manual_seed(seed)
    net = UNet(config(layout, **changes))
    for parameter in net.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return net


def text(batch: int, lengths: list[int] | None = None, width: int = WIDTH, seed: int = 0) -> TextEmbedding:
    """`lengths` real tokens a row of LENGTH; all are real by default."""
    states = torch.randn(batch, LENGTH, width, generator=torch.Generator().manual_seed(seed))
    mask = torch.arange(LENGTH) < torch.tensor(lengths or [LENGTH] * batch)[:, None]  # B L
    return TextEmbedding((Tokens(states, mask),))


def inputs(batch: int, size: int | tuple[int, int] = 8, seed: int = 0) -> tuple[Tensor, Tensor]:
    """x (B 3 H W) and noise level (B)."""
    height, width = (size, size) if isinstance(size, int) else size
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, height, width, generator=generator), torch.linspace(100, 900, batch)


def conditions(batch: int, **changes: Any) -> Conditioning:
    """Text of differing lengths and an image embedding; `changes` replace fields."""
    embed = torch.randn(batch, EMBED, generator=torch.Generator().manual_seed(1))
    lengths = [1 + row % LENGTH for row in range(batch)]
    return Conditioning(**{"text": text(batch, lengths), "image_embed": embed, **changes})


def rows(cond: Conditioning, index: slice) -> Conditioning:
    """Part of a batch of conditions."""
    changes = {
        name: getattr(cond, name)[index]
        for name in ("text", "image_embed", "lowres", "aug_level", "text_keep", "image_keep")
        if getattr(cond, name) is not None
    }
    return cond.with_(**changes)
