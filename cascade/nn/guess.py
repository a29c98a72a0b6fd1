"""A first guess of a picture from its conditions alone, concatenated to a base network's noisy input."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cascade.conditioning import Conditioning
from cascade.config import UNetConfig

COARSE = 2  # places of the grid a side that share one entry of the dense layer's map


class Guess(nn.Module):
    """E[x_0 | conditions], the answer of a perfect denoiser at t = 1, where x_t tells nothing.

    A U-Net that knows its conditions by channel scales and a few tokens learns slowly where in the picture
    things belong, and each example costs it a whole forward pass; a dense layer with a few convolutions
    learns it from its own squared error at a hundredth of the price. The guess is concatenated to x_t, as a
    super-resolution stage's input is. It is a picture of `position_grid * patch` px, blurred where the
    conditions leave something open.
    """

    def __init__(self, cfg: UNetConfig) -> None:
        super().__init__()
        width, grid = cfg.guess_width, cfg.position_grid
        self.patch, self.scale = cfg.patch, cfg.image_embed_scale
        self.map_shape = (width, grid // COARSE, grid // COARSE)
        self.text_norms = nn.ModuleList(nn.LayerNorm(dim) for dim in cfg.text_dims)
        self.text_nulls = nn.ParameterList(torch.zeros(dim) for dim in cfg.text_dims)
        self.image_null = nn.Parameter(torch.zeros(cfg.image_embed_dim)) if cfg.image_embed_dim else None
        inputs = sum(cfg.text_dims) + (cfg.image_embed_dim or 0)
        self.hidden = nn.Linear(inputs, 8 * width)
        self.dense = nn.Linear(8 * width, width * (grid // COARSE) ** 2)
        self.conv_coarse = nn.Conv2d(width, width, 3, padding=1)
        self.conv_fine = nn.Conv2d(width, width, 3, padding=1)
        self.conv_out = nn.Conv2d(width, cfg.in_channels * cfg.patch**2, 3, padding=1)

    def forward(self, cond: Conditioning, batch: int) -> Tensor:
        """B C H W in the range of x_0. A condition that is absent or dropped is its learned null."""
        vectors = []
        for i, (norm, null) in enumerate(zip(self.text_norms, self.text_nulls, strict=True)):
            pooled, keep = None, None
            if cond.text is not None:
                pooled = norm(cond.text.sequences[i].mean(null.dtype))
                keep = None if cond.text_keep is None else cond.text_keep[:, i]
            vectors.append(_or_null(pooled, keep, null, batch))
        if self.image_null is not None:
            embed = None
            if cond.image_embed is not None:
                embed = cond.image_embed.to(self.image_null.dtype) * self.scale
            vectors.append(_or_null(embed, cond.image_keep, self.image_null, batch))
        h = F.silu(self.hidden(torch.cat(vectors, dim=1)))
        h = F.silu(self.dense(h).unflatten(1, self.map_shape))
        h = F.interpolate(F.silu(self.conv_coarse(h)), scale_factor=float(COARSE))
        return F.pixel_shuffle(self.conv_out(F.silu(self.conv_fine(h))), self.patch)


def _or_null(vector: Tensor | None, keep: Tensor | None, null: Tensor, batch: int) -> Tensor:
    if vector is None:
        return null.expand(batch, -1)
    return vector if keep is None else torch.where(keep[:, None], vector, null)
