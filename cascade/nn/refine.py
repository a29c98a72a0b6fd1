"""Convolutions over single pixels at the end of a network that works on patches."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cascade.config import UNetConfig
from cascade.nn.layers import activation, zero_init


class Refiner(nn.Module):
    """What to add to the prediction of a network with `patch` > 1, seen from its pixels.

    Such a network tells a patch's pixels from one vector a patch, through layers that are narrow beside the
    noise they have to pass on at low noise levels: flat areas come out mottled, with the patches' seams. A
    few channels at full resolution, which see the noisy input, the prediction and the network's last
    features, take a little of that out at a small part of the price of the whole: 8% of the squared error at
    low noise levels, where it was measured (docs/log.md). It starts as the identity.
    """

    def __init__(self, cfg: UNetConfig, picture_channels: int, emb_dim: int) -> None:
        """picture_channels: of the network's input at full resolution."""
        super().__init__()
        self.patch, width = cfg.patch, cfg.refine_width
        inputs = picture_channels + cfg.out_channels + cfg.channels[0] // cfg.patch**2
        self.stem = nn.Conv2d(inputs, width, 3, padding=1)
        self.emb = nn.Linear(emb_dim, 2 * width)
        self.act = activation(cfg.act)
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.conv_out = zero_init(nn.Conv2d(width, cfg.out_channels, 3, padding=1))

    def forward(self, x: Tensor, prediction: Tensor, features: Tensor, emb: Tensor) -> Tensor:
        """x: B picture_channels H W; prediction: B out H W; features: B C H/patch W/patch, before they are
        normalised; emb: B E, activated. Returns B out H W."""
        h = self.stem(torch.cat([x, prediction, F.pixel_shuffle(features, self.patch)], dim=1))
        scale, shift = self.emb(emb)[:, :, None, None].chunk(2, dim=1)  # B width 1 1 each
        h = self.act(torch.addcmul(shift, h, 1 + scale))  # not normalised: how much noise there is, counts
        return self.conv_out(self.act(self.conv(h)))
