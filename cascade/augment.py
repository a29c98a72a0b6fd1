"""Corruption of the low-resolution picture on which a super-resolution stage is conditioned.

One implementation for training and sampling. `condition_lowres` is what both call: upsample, then add
variance-preserving Gaussian noise of a level that the network is told (Imagen section 2.4). In training,
`corrupt_training` comes before it and blurs (CDM section 4.4) or degrades (BSRGAN, as unCLIP appendix C).
Pictures are B 3 H W in [-1, 1]; levels are B in [0, 1].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from cascade import random
from cascade.config import AugmentConfig, ScheduleConfig
from cascade.diffusion.schedule import BETAS, TRAIN_STEPS, alpha_sigma, make_schedule
from cascade.errors import InputError, unknown
from cascade.images import downsample, from_uint8, jpeg, to_uint8

PICTURE_VARIANCE = (
    0.5  # of pixels in [-1, 1]; only the share of noise that `residual_base` keeps depends on it
)
LevelSchedule = Literal["cosine", "linear", "discrete_cosine", "discrete_linear"]
UpsampleMode = Literal["bicubic", "bilinear", "bilinear_aligned"]


@dataclass(frozen=True)
class Lowres:
    """A low-resolution picture on its way into a network."""

    picture: Tensor  # B 3 h w
    level: Tensor  # B
    seeds: list[int]
    size: tuple[int, int]  # H, W of the stage's pictures
    augment: AugmentConfig
    stage: str  # its name keys the noise
    dtype: torch.dtype

    def noised(self, *parts: str | int) -> Tensor:
        """B 3 H W at the stage's size and noise level; another draw for other `parts`."""
        noise = random.normal((self.picture.shape[1], *self.size), self.seeds, "lowres", self.stage, *parts)
        noise = noise.to(self.picture.device)
        corrupted = condition_lowres(self.picture, self.size, self.augment, self.level, noise)
        return corrupted.to(dtype=self.dtype, memory_format=torch.channels_last)


def condition_lowres(
    lowres: Tensor, size: tuple[int, int], cfg: AugmentConfig, level: Tensor, noise: Tensor
) -> Tensor:
    """The picture that is concatenated to x_t: clamped, upsampled to `size` (H, W), noised to `level`.

    `noise` is unit Gaussian, of the shape of the result (Imagen: noise after upsampling) or of the shape
    of `lowres` (CDM algorithm 1: noise before upsampling, which `truncated_grid` needs).
    """
    lowres = lowres.clamp(-1, 1)  # guidance overshoots, real pictures do not
    if cfg.eight_bit:
        lowres = from_uint8(to_uint8(lowres)).to(lowres.dtype)
    if noise.shape[-2:] == tuple(size):
        return noise_lowres(upsample(lowres, size, cfg.upsample), level, noise, cfg.schedule)
    if noise.shape != lowres.shape:
        expected = f"{(len(lowres), 3, *size)} or {tuple(lowres.shape)}"
        raise InputError(f"noise: expected shape {expected}, got {tuple(noise.shape)}")
    return upsample(noise_lowres(lowres, level, noise, cfg.schedule), size, cfg.upsample)


def residual_base(corrupted: Tensor, level: Tensor, cfg: AugmentConfig) -> Tensor:
    """What a stage with `cfg.residual` is spared: its target is x_0 minus this, which is added to its result.

    The best linear guess of x_0 from the corrupted picture alpha x + sigma noise: gain times it, with
    gain = alpha v / (alpha^2 v + sigma^2) for pictures of variance v. At level 0 it is the enlarged picture
    itself, at level 1 nothing, so a network never has to learn to copy its input or to undo its noise.
    corrupted: B 3 H W, from `condition_lowres`; level: B."""
    alpha, sigma = level_alpha_sigma(level, cfg.schedule)
    gain = alpha * PICTURE_VARIANCE / (alpha**2 * PICTURE_VARIANCE + sigma**2)
    return gain.to(corrupted.dtype)[:, None, None, None] * corrupted


def residual_variance(level: Tensor, cfg: AugmentConfig) -> Tensor:
    """How much the noise of each level B adds to the variance of the residual: the error of the best linear
    guess above, v sigma^2 / (alpha^2 v + sigma^2), B. It is 0 at level 0 and v at level 1."""
    alpha, sigma = level_alpha_sigma(level, cfg.schedule)
    return PICTURE_VARIANCE * sigma**2 / (alpha**2 * PICTURE_VARIANCE + sigma**2)


def upsample(lowres: Tensor, size: tuple[int, int], mode: UpsampleMode = "bicubic") -> Tensor:
    """B 3 h w to B 3 H W, corners aligned in mode "bilinear_aligned" alone. Bicubic is Pillow's (a = -0.5:
    Catmull-Rom, less ringing than torch's default -0.75). The result may leave [-1, 1] by a few percent at
    edges, on purpose: clamping would make it disagree with the low-resolution picture."""
    if mode not in get_args(UpsampleMode):
        raise unknown("upsampling", mode, get_args(UpsampleMode))
    if mode == "bilinear_aligned":
        aligned = F.interpolate(lowres.float(), tuple(size), mode="bilinear", align_corners=True)
        return aligned.to(lowres.dtype)
    # antialias selects a = -0.5; when enlarging it filters nothing
    return F.interpolate(lowres.float(), tuple(size), mode=mode, antialias=True).to(lowres.dtype)


def level_alpha_sigma(level: Tensor, schedule: LevelSchedule = "cosine") -> tuple[Tensor, Tensor]:
    """alpha and sigma, float64, of an augmentation level; level 0 is exactly (1, 0).

    cosine: alpha = cos(pi/2 level), so level 1 is pure noise. linear: alpha^2 = exp(-10 level^2), the
    continuous linear schedule of Imagen's public reimplementations without its offset of 1e-4, so that
    level 0 is clean; level 1 keeps alpha = 0.007. discrete_cosine, discrete_linear: step floor(1000 level) of
    the 1000-step grid (DeepFloyd IF); level 0 is its first step, nearly clean, level 1 its last.
    """
    level = level.double()
    if schedule in BETAS:
        middle = (_level_step(level) + 0.5) / TRAIN_STEPS
        return alpha_sigma(make_schedule(ScheduleConfig(name=schedule)).logsnr(middle))
    if schedule == "cosine":
        return torch.cos(math.pi / 2 * level), torch.sin(math.pi / 2 * level)
    if schedule == "linear":
        return torch.exp(-5 * level**2), torch.sqrt(-torch.expm1(-10 * level**2))
    raise unknown("schedule of the augmentation level", schedule, get_args(LevelSchedule))


def told_level(level: Tensor, schedule: LevelSchedule) -> Tensor:
    """The level as the network is told it: on a discrete grid, that of the step that is used."""
    return (_level_step(level) / TRAIN_STEPS).to(level.dtype) if schedule in BETAS else level


def _level_step(level: Tensor) -> Tensor:
    """floor(1000 level), forgiving the rounding of 0.001 n in float32; B, float64."""
    return (TRAIN_STEPS * level.double() + 1e-3).floor().clamp(max=TRAIN_STEPS - 1)


def noise_lowres(picture: Tensor, level: Tensor, noise: Tensor, schedule: LevelSchedule = "cosine") -> Tensor:
    """alpha(level) picture + sigma(level) noise, row by row; level is B, noise is like picture."""
    alpha, sigma = (x.to(picture.dtype)[:, None, None, None] for x in level_alpha_sigma(level, schedule))
    return alpha * picture + sigma * noise.to(picture.dtype)


def truncated_grid(logsnrs: Tensor, level: float, schedule: LevelSchedule = "cosine") -> Tensor:
    """The sampler grid of the LOW-resolution stage, cut where its state is the conditioning picture.

    CDM section 3.2: rather than draw x_0 and noise it again, stop the low-resolution reverse process at
    the step s whose log-SNR is that of `level` and condition on x_s itself: `upsample(x_s, size)` then
    stands for `condition_lowres` with noise before upsampling, and the super-resolution network must
    have been trained that way. `logsnrs` rises from the noisiest entry to +inf (N + 1 entries); the
    result keeps the entries noisier than `level` and ends in its log-SNR, +inf at level 0.
    """
    if not 0 <= level < 1:
        raise InputError(f"level of a truncated process: expected 0 <= level < 1, got {level}")
    alpha, sigma = level_alpha_sigma(torch.tensor(level), schedule)
    target = 2 * (alpha.log() - sigma.log())
    noisier = logsnrs[logsnrs < target]
    if len(noisier) == 0:
        raise InputError(f"level {level} is noisier than the first step: expected a lower level")
    return torch.cat([noisier, target[None].to(logsnrs)])


def corrupt_training(lowres: Tensor, cfg: AugmentConfig, seeds: Sequence[int], *parts: str | int) -> Tensor:
    """Blur and degrade the shares of examples that `cfg` asks for. Row i depends on (seeds[i], parts)
    alone. Nothing of this happens at sampling."""
    if cfg.blur_prob > 0:
        chance, place = random.uniform(seeds, *parts, "blur", count=2).unbind(1)  # B, B
        low, high = cfg.blur_sigma
        sigma = (low + (high - low) * place) * (chance < cfg.blur_prob)  # 0 leaves a row as it is
        lowres = blur(lowres, sigma.to(lowres.device))
    if cfg.degrade_prob > 0:
        chance = random.uniform(seeds, *parts, "degrade")[:, 0]
        rows = [
            degrade(row, random.generator(seed, *parts, "degradation")) if chosen else row
            for row, seed, chosen in zip(lowres, seeds, (chance < cfg.degrade_prob).tolist(), strict=True)
        ]
        lowres = torch.stack(rows)
    return lowres


def blur(lowres: Tensor, sigma: Tensor) -> Tensor:
    """3x3 Gaussian blur, sigma (B) in px of `lowres`; sigma 0 leaves a row bit for bit. CDM section 4.4
    draws sigma from U(0.4, 0.6) for half of the examples, unCLIP appendix C uses 0.6."""
    side = torch.exp(-0.5 / sigma.double() ** 2)  # B; exp(-inf) = 0 at sigma 0
    taps = torch.stack([side, torch.ones_like(side), side], dim=1)  # B 3
    taps = taps / taps.sum(dim=1, keepdim=True)
    return _filter(lowres, taps[:, :, None] * taps[:, None, :])


def degrade(picture: Tensor, generator: Generator) -> Tensor:
    """BSR-style degradation of ONE picture (3 h w), which keeps its size (arXiv:2103.14006 section 3).

    An isotropic and an anisotropic blur, a resize down and back, Gaussian noise (colour or grey,
    sd 2/255 to 25/255) and JPEG run in random order, then JPEG once more. The paper degrades the large
    picture and shrinks it fourfold; here the picture is small already, so widths in px are a quarter.
    """
    steps: list[Callable[[Tensor, Generator], Tensor]] = [
        _blur_round,
        _blur_oval,
        _resize,
        _add_noise,
        _compress,
    ]
    device, out = picture.device, picture.cpu().float()
    for index in torch.randperm(len(steps), generator=generator).tolist():
        out = steps[index](out, generator)
    return _compress(out, generator).to(device=device, dtype=picture.dtype)


def _blur_round(x: Tensor, generator: Generator) -> Tensor:
    sigma = _draw(generator, 0.1, 0.7)
    return _gaussian(x, sigma, sigma, 0.0)


def _blur_oval(x: Tensor, generator: Generator) -> Tensor:
    angle = _draw(generator, 0.0, math.pi)
    return _gaussian(x, _draw(generator, 0.1, 0.7), _draw(generator, 0.1, 0.7), angle)


def _gaussian(x: Tensor, sigma_u: float, sigma_v: float, angle: float, radius: int = 2) -> Tensor:
    """Gaussian with axes sigma_u, sigma_v turned by `angle`; 2 px cover three sd at the widest 0.7."""
    grid = torch.arange(-radius, radius + 1, dtype=torch.float64)
    y, x_ = torch.meshgrid(grid, grid, indexing="ij")
    u = math.cos(angle) * x_ + math.sin(angle) * y
    v = math.cos(angle) * y - math.sin(angle) * x_
    kernel = torch.exp(-0.5 * ((u / sigma_u) ** 2 + (v / sigma_v) ** 2))
    return _filter(x[None], (kernel / kernel.sum())[None])[0]


def _resize(x: Tensor, generator: Generator) -> Tensor:
    scale = _draw(generator, 0.5, 1.0)
    height, width = x.shape[-2:]
    small = downsample(x.clamp(-1, 1), (max(1, round(height * scale)), max(1, round(width * scale))))
    mode = "bicubic" if _draw(generator, 0, 1) < 0.5 else "bilinear"
    return upsample(small[None], (height, width), mode)[0]


def _add_noise(x: Tensor, generator: Generator) -> Tensor:
    sigma = _draw(generator, 2, 25) / 127.5  # of 255, in units of [-1, 1]
    channels = 3 if _draw(generator, 0, 1) < 0.5 else 1  # colour or grey
    return x + sigma * torch.randn(channels, *x.shape[-2:], generator=generator)


def _compress(x: Tensor, generator: Generator) -> Tensor:
    return jpeg(x, round(_draw(generator, 30, 95)))


def _draw(generator: Generator, low: float, high: float) -> float:
    return low + (high - low) * torch.rand((), generator=generator, dtype=torch.float64).item()


def _filter(x: Tensor, kernels: Tensor) -> Tensor:
    """Each row of x (B 3 H W) with its own kernel (B K K, K odd), edges repeated."""
    batch, channels, height, width = x.shape
    radius = kernels.shape[-1] // 2
    padded = F.pad(x.float(), [radius] * 4, mode="replicate").reshape(
        1, batch * channels, height + 2 * radius, -1
    )
    weights = kernels.float().repeat_interleave(channels, dim=0)[:, None]  # BC 1 K K
    return (
        F.conv2d(padded, weights, groups=batch * channels).reshape(batch, channels, height, width).to(x.dtype)
    )
