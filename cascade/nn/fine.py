"""A second look, pixel by pixel, at what a base network makes of a picture that is nearly free of noise."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cascade.conditioning import Conditioning
from cascade.config import UNetConfig
from cascade.diffusion.prediction import levels

# log-SNRs at which it is trained: sigma / alpha from 0.5 to 0.04, t from 0.3 to 0.025 of a cosine schedule
NOISIEST, CLEANEST = -2 * math.log(0.5), -2 * math.log(0.04)
WINDOWS = (3, 7)  # px a side, of the local means
INPUTS = 2 + 2 * len(WINDOWS)  # pictures that it sees
# of a base network's x_0_hat, as the embedded default has it: ERROR (sigma / alpha)^EXPONENT, in [-1, 1]
ERROR, EXPONENT = 0.0785, 0.43

TimeInput = Callable[[Tensor], Tensor]


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
    """Corrects x_0_hat at the lowest noise levels.

    A network of patches has few channels for many pixels: what it leaves uneven there stays in the picture,
    as no step comes after. A network over pixels would see that no better, noise of a few levels of 255
    being little beside a picture, in bf16 nothing. So it is shown the picture and what x_t and x_0_hat are
    beyond their local means, in units of the noise and of the error that is to be expected: of order 1 on
    flat areas at every noise level. It answers in units of that error.
    """

    def __init__(self, net: nn.Module) -> None:
        """net: a U-Net of `fine_config`."""
        super().__init__()
        self.net = net

    def asked(self, logsnr: Tensor) -> Tensor:
        """Of which levels the network knows something, bool, B. A level cleaner than all that it was trained
        on is taken for the cleanest of these."""
        return logsnr >= NOISIEST

    def forward(self, x_t: Tensor, x0_hat: Tensor, logsnr: Tensor, time: TimeInput) -> Tensor:
        """A better x_0_hat, float32, B C H W, for log-SNRs B that it is asked of. time: log-SNR to what the
        networks of the stage are told of it."""
        seen, error = self.seen(x_t, x0_hat, logsnr)
        return x0_hat.float().clamp(-1, 1) + error * self._answer(seen, logsnr, time)

    def loss(
        self, x_t: Tensor, x0_hat: Tensor, logsnr: Tensor, time: TimeInput, x0: Tensor, corner: Tensor
    ) -> Tensor:
        """Absolute error in units of the expected one, B. Squared, the errors of flat areas, which are to be
        flat to a level of 255, would be nothing beside those of edges. corner: B 2, in [0, 1), of a window of
        half the sides, on which alone it learns: at a quarter of the price."""
        seen, error = self.seen(x_t, x0_hat, logsnr)
        target = (x0.float() - x0_hat.float().clamp(-1, 1)) / error
        count = seen.shape[1]
        both = windows(torch.cat([seen, target], dim=1), corner)
        seen, target = both[:, :count], both[:, count:]
        return (self._answer(seen, logsnr, time) - target).abs().flatten(1).mean(1)

    def _answer(self, seen: Tensor, logsnr: Tensor, time: TimeInput) -> Tensor:
        told = time(logsnr.clamp(max=CLEANEST)).to(seen.device)
        return self.net(seen.to(next(self.net.parameters()).dtype), told, Conditioning()).float()

    @staticmethod
    def seen(x_t: Tensor, x0_hat: Tensor, logsnr: Tensor) -> tuple[Tensor, Tensor]:
        """What the network is shown, B INPUTS*C H W, and the error to be expected, B 1 1 1; float32."""
        x_t, x0_hat = x_t.float(), x0_hat.float().clamp(-1, 1)
        alpha, sigma = levels(logsnr.clamp(max=CLEANEST), x_t)
        noise = sigma / alpha
        error = ERROR * noise**EXPONENT
        x = x_t / alpha
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
