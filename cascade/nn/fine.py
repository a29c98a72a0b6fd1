"""A second look, pixel by pixel, at what a base network makes of a picture that is nearly free of noise."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cascade.conditioning import Conditioning
from cascade.config import UNetConfig

# standard deviations of the noise at which it is trained: t from 0.39 to 0.06 of a cosine schedule
NOISIEST, CLEANEST = 0.7, 0.1
WINDOWS = (3, 7)  # px a side, of the local means
INPUTS = 2 + 2 * len(WINDOWS)  # pictures that it sees
ERROR, EXPONENT = 0.0785, 0.43  # of a base network's x_0_hat, as the embedded default's: ERROR noise^EXPONENT
DIFFERENCES = 0.5  # weight of the error of differences between neighbours, beside that of values


def fine_config(cfg: UNetConfig) -> UNetConfig:
    """The fine network of a base network: a small U-Net over pixels that is told no conditions."""
    count = len(cfg.fine_channels)
    return UNetConfig(
        in_channels=INPUTS * cfg.in_channels,
        out_channels=cfg.in_channels,
        channels=cfg.fine_channels,
        blocks=(2,) * count,
        strides=(1,) + (2,) * (count - 1),
        self_attention=(False,) * count,
        text_attention=(False,) * count,
        norm=cfg.norm,
        norm_groups=cfg.norm_groups,
        act=cfg.act,
        time_dim=128,
    )


class Fine(nn.Module):
    """Corrects x_0_hat at the lowest noise levels, up to `noisiest`; none is cleaner to it than `cleanest`.

    A network of patches has few channels for many pixels: what it leaves uneven there stays in the picture,
    as no step comes after. A network over pixels would see that no better, noise of a few levels of 255
    being little beside a picture, in bf16 nothing. So it is shown the picture and what x_t and x_0_hat are
    beyond their local means, in units of the noise and of the error that is to be expected: of order 1 on
    flat areas at every noise level. It answers in units of that error.
    """

    noisiest, cleanest = NOISIEST, CLEANEST

    def __init__(self, net: nn.Module) -> None:
        """net: a U-Net of `fine_config`."""
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, noise: Tensor, time: Tensor, x0_hat: Tensor) -> Tensor:
        """A better x_0_hat, float32, B C H W. x: B C H W, the picture plus noise of the standard deviation
        `noise`, B 1 1 1. time: B, the noise level as the base network is told it."""
        seen, error = self.seen(x, noise, x0_hat)
        return x0_hat.float().clamp(-1, 1) + error * self._answer(seen, time)

    def loss(
        self, x: Tensor, noise: Tensor, time: Tensor, x0_hat: Tensor, x0: Tensor, corner: Tensor
    ) -> Tensor:
        """Absolute error, of values and of differences between neighbours, in units of the expected one, B.
        Squared, the errors of flat areas, which are to be flat to a level of 255, would be nothing beside
        those of edges. corner: B 2, in [0, 1), of a window of half the sides, on which alone it learns: at a
        quarter of the price."""
        seen, error = self.seen(x, noise, x0_hat)
        target = (x0.float() - x0_hat.float().clamp(-1, 1)) / error
        count = seen.shape[1]
        both = windows(torch.cat([seen, target], dim=1), corner)
        seen, target = both[:, :count], both[:, count:]
        wrong = self._answer(seen, time) - target
        found = wrong.abs().flatten(1).mean(1)
        for side in (-2, -1):
            found = found + DIFFERENCES * wrong.diff(dim=side).abs().flatten(1).mean(1)
        return found

    def _answer(self, seen: Tensor, time: Tensor) -> Tensor:
        return self.net(seen.to(next(self.net.parameters()).dtype), time, Conditioning()).float()

    @staticmethod
    def seen(x: Tensor, noise: Tensor, x0_hat: Tensor) -> tuple[Tensor, Tensor]:
        """What the network is shown, B INPUTS*C H W, and the error to be expected, B 1 1 1; float32."""
        x, x0_hat = x.float(), x0_hat.float().clamp(-1, 1)
        error = ERROR * noise**EXPONENT
        parts = [x0_hat, ((x - x0_hat) / noise).clamp(-4, 4)]
        parts += [((x - local_mean(x, side)) / (2 * noise)).clamp(-3, 3) for side in WINDOWS]
        parts += [((x0_hat - local_mean(x0_hat, side)) / (2 * error)).clamp(-3, 3) for side in WINDOWS]
        return torch.cat(parts, dim=1), error


def windows(pictures: Tensor, corner: Tensor) -> Tensor:
    """Of each picture, B C H W, the part of half its sides at a corner, B 2, a share of the places."""
    height, width = (side // 2 for side in pictures.shape[-2:])
    rows = (corner[:, 0] * (pictures.shape[-2] - height + 1)).long()  # B
    columns = (corner[:, 1] * (pictures.shape[-1] - width + 1)).long()
    down, along = (torch.arange(side, device=pictures.device) for side in (height, width))
    batch = torch.arange(len(pictures), device=pictures.device)[:, None, None]
    places = batch, slice(None), (rows[:, None] + down)[:, :, None], (columns[:, None] + along)[:, None, :]
    return pictures[places].movedim(-1, 1)


def local_mean(x: Tensor, side: int) -> Tensor:
    """Mean of the `side` x `side` px around each pixel, of those that lie within the picture."""
    return F.avg_pool2d(x, side, stride=1, padding=side // 2, count_include_pad=False)
