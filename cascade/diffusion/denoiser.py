"""The one place where a network meets a schedule: scaling, time input, dtype, and what its output means."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from cascade.config import DiffusionConfig
from cascade.diffusion.prediction import edm_norm, levels, to_x0
from cascade.diffusion.schedule import DiscreteSchedule, make_schedule, to_device
from cascade.errors import InputError


class Denoiser(nn.Module):
    """Turns `net(x, time[B], cond) -> output` into an estimate of x_0.

    `net` may be any module, also one already wrapped for data parallelism or compiled. It is fed x_t in its
    own dtype; everything around it is float32. `cond` is passed on untouched.
    """

    def __init__(self, net: nn.Module, config: DiffusionConfig) -> None:
        super().__init__()
        if config.prediction == "eps" and config.schedule.zero_terminal_snr:
            raise InputError(
                "prediction 'eps' says nothing at zero SNR: use 'v' or 'x0' with zero_terminal_snr"
            )
        self.net = net
        self.config = config
        self.schedule = make_schedule(config.schedule)

    def forward(self, x_t: Tensor, logsnr: Tensor, cond: object = None) -> Tensor:
        """Estimate of x_0, float32, like x_t (B ...). `logsnr` (B): any device, float32 or float64."""
        return self.with_variance(x_t, logsnr, cond)[0]

    def with_variance(self, x_t: Tensor, logsnr: Tensor, cond: object = None) -> tuple[Tensor, Tensor | None]:
        """The estimate of x_0, and the learned variance fraction or None (see `raw`)."""
        output, fraction = self.raw(x_t, logsnr, cond)
        config = self.config
        x0_hat = to_x0(config.prediction, output, x_t.float(), logsnr, config.sigma_data)
        fine = getattr(self.net, "fine", None)
        if fine is not None and (asked := logsnr >= -2 * math.log(fine.noisiest)).any():
            better = fine(*self.fine_input(x_t.float(), logsnr, fine.cleanest), x0_hat)
            x0_hat = torch.where(asked.to(x_t.device)[:, None, None, None], better, x0_hat)
        return x0_hat, fraction

    def fine_input(self, x_t: Tensor, logsnr: Tensor, cleanest: float) -> tuple[Tensor, Tensor, Tensor]:
        """What a network's fine network is told of x_t and its level: x_t / alpha, the standard deviation of
        the noise in that, B 1 1 1, and the time input. Less noise than `cleanest` is told as so much."""
        alpha, sigma = levels(logsnr, x_t)
        time = self.time_input(logsnr.clamp(max=-2 * math.log(cleanest)))
        return x_t / alpha, (sigma / alpha).clamp(min=cleanest), to_device(time, x_t.device)

    def raw(self, x_t: Tensor, logsnr: Tensor, cond: object = None) -> tuple[Tensor, Tensor | None]:
        """The network's output in the space of `config.prediction`, float32, and the variance fraction.

        With learned variance the network emits twice the channels; the second half, mapped from [-1, 1] to
        [0, 1], interpolates the log variance of a reverse step between its smallest and its largest
        (Nichol & Dhariwal 2021, equation 15). Without it the fraction is None."""
        logsnr = to_device(logsnr, x_t.device)
        x_in = x_t.float()
        if self.config.prediction == "edm":
            x_in = x_in / edm_norm(*levels(logsnr, x_in), self.config.sigma_data)
        output = self.net(x_in.to(self._dtype()), self.time_input(logsnr), cond).float()
        if not self.config.learned_variance:
            return output, None
        output, variance = output.chunk(2, dim=1)
        return output, (variance + 1) / 2

    def time_input(self, logsnr: Tensor) -> Tensor:
        """What the network is told of the noise level, float32, in [0, 1000]: the index on a discrete grid,
        else the log-SNR, reversed and scaled from [20, -20], so that one sinusoid embedding suits both."""
        if isinstance(self.schedule, DiscreteSchedule):
            return self.schedule.index(logsnr).float()
        return (20 - logsnr.float().clamp(-20, 20)) * 25

    def _dtype(self) -> torch.dtype:
        parameter = next(self.net.parameters(), None)
        return torch.float32 if parameter is None else parameter.dtype
