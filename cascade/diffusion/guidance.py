"""Guidance and thresholding: transforms of the estimate of x_0.

x_0, eps and v are affine in one another at a given x_t, so guiding any of them guides all; x_0 is the one
that can be thresholded. Always guide first, then threshold, once.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from cascade.config import SamplingConfig
from cascade.diffusion.denoiser import Denoiser
from cascade.diffusion.schedule import Schedule
from cascade.errors import InputError, unknown

# Adaptive projected guidance: eta and momentum as arXiv:2410.02416 recommends. The norm bound there is
# given for latents of one size (15 for 4 x 128 x 128); here it is that bound a root of the entries, so that
# one setting serves every resolution.
APG_ETA = 0.0
APG_MOMENTUM = -0.5
APG_RMS = 15.0 / math.sqrt(4 * 128 * 128)


class GuidedDenoiser:
    """A denoiser with its conditions and sampling settings: what a sampler calls.

    Make a new one for every sampling run: adaptive projected guidance keeps a running average.

    denoiser   gives (x0_hat, variance fraction or None) through `with_variance`
    cond       condition of B samples, used where guidance is off
    pair       the same followed by the unconditional (or negative) one: condition of 2B samples, in which
               guidance is one batched forward. May be None when `settings.guidance` is 1. Where conditions
               change from step to step, both are functions of the number of the evaluation, from 0
    schedule   turns the guidance interval, given in t, into log-SNRs
    """

    def __init__(
        self, denoiser: Denoiser, cond: object, pair: object, settings: SamplingConfig, schedule: Schedule
    ) -> None:
        _check(settings)
        if settings.guidance != 1 and pair is None:
            raise InputError("guidance other than 1 needs the pair of conditions")
        self._denoiser, self._cond, self._pair = denoiser, cond, pair
        self._settings = settings
        low, high = settings.guidance_interval
        self._always = low <= 0 and high >= 1
        bounds = schedule.logsnr(torch.tensor([low, high], dtype=torch.float64))
        self._cleanest, self._noisiest = float(bounds[0]) + 1e-6, float(bounds[1]) - 1e-6
        self._momentum: Tensor | None = None
        self._evaluations = 0

    def __call__(self, x_t: Tensor, logsnr: Tensor | float) -> Tensor | tuple[Tensor, Tensor]:
        """Guided, thresholded estimate of x_0, float32, like x_t (B ...); with learned variance also the
        variance fraction of the conditional half. `logsnr` is one number, or B equal ones: on the CPU, lest
        a guidance interval wait for the accelerator."""
        levels = logsnr if isinstance(logsnr, Tensor) else torch.tensor(logsnr, dtype=torch.float64)
        levels = levels.expand(x_t.shape[0])
        if self._guides(levels):
            x0, fraction = self._guided(x_t, levels)
        else:
            x0, fraction = self._denoiser.with_variance(x_t, levels, self._now(self._cond))
        self._evaluations += 1
        x0 = self._threshold(x0)
        return x0 if fraction is None else (x0, fraction)

    def _now(self, condition: object) -> object:
        return condition(self._evaluations) if callable(condition) else condition

    def _guides(self, logsnr: Tensor) -> bool:
        if self._settings.guidance == 1:
            return False
        return self._always or self._noisiest <= float(logsnr[0]) <= self._cleanest

    def _guided(self, x_t: Tensor, logsnr: Tensor) -> tuple[Tensor, Tensor | None]:
        both, fraction = self._denoiser.with_variance(
            torch.cat([x_t, x_t]), torch.cat([logsnr, logsnr]), self._now(self._pair)
        )
        cond, uncond = both.chunk(2)
        settings = self._settings
        if settings.apg:
            bound = APG_RMS * math.sqrt(cond[0].numel())
            guided, self._momentum = apg(
                cond, uncond, settings.guidance, APG_ETA, bound, APG_MOMENTUM, self._momentum
            )
        else:
            guided = cfg(cond, uncond, settings.guidance)
        if settings.guidance_rescale:
            guided = rescale(guided, cond, settings.guidance_rescale)
        return guided, None if fraction is None else fraction.chunk(2)[0]

    def _threshold(self, x0: Tensor) -> Tensor:
        settings = self._settings
        if settings.threshold == "none":
            return x0
        if settings.threshold == "static":
            return static_threshold(x0)
        return dynamic_threshold(x0, settings.threshold_percentile, settings.threshold_cap)


def cfg(cond: Tensor, uncond: Tensor, weight: float) -> Tensor:
    """Classifier-free guidance, uncond + w (cond - uncond); w = 1 is off. Imagen, equation 2."""
    if weight == 1:
        return cond
    return uncond + weight * (cond - uncond)


def rescale(guided: Tensor, cond: Tensor, phi: float) -> Tensor:
    """Bring each sample's standard deviation a share `phi` of the way back to the conditional estimate's.
    arXiv:2305.08891, equations 15 and 16, applied to x_0."""
    ratio = _over_sample(cond, torch.std) / _over_sample(guided, torch.std).clamp(min=1e-8)
    return guided * (phi * ratio + (1 - phi))


def apg(
    cond: Tensor,
    uncond: Tensor,
    weight: float,
    eta: float = APG_ETA,
    norm_bound: float = math.inf,
    momentum: float = 0.0,
    average: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Adaptive projected guidance, arXiv:2410.02416, algorithm 1. Returns (guided, the new running average).

    The direction cond - uncond is added to `momentum` times the running average, cut to an L2 norm of
    `norm_bound` a sample, and its part parallel to `cond`, which oversaturates, is scaled by `eta`."""
    direction = cond - uncond
    if average is not None:
        direction = direction + momentum * average
    average = direction
    norm = _over_sample(direction, torch.linalg.vector_norm).clamp(min=1e-12)
    direction = direction * (norm_bound / norm).clamp(max=1)
    unit = cond / _over_sample(cond, torch.linalg.vector_norm).clamp(min=1e-12)
    parallel = _over_sample(direction * unit, torch.sum) * unit
    return cond + (weight - 1) * (direction - (1 - eta) * parallel), average


def static_threshold(x0: Tensor) -> Tensor:
    """Clip to the range of pictures, [-1, 1]. Imagen 2.3."""
    return x0.clamp(-1, 1)


def dynamic_threshold(x0: Tensor, percentile: float = 0.995, cap: float = math.inf) -> Tensor:
    """Per sample: s = that percentile of |x_0|, at least 1 and at most `cap`; clip to [-s, s], divide by s.
    Imagen 2.3; the cap is DeepFloyd IF's. `percentile` is a share in (0, 1], interpolated."""
    magnitude = x0.abs().flatten(1)  # B N
    below, share = divmod(percentile * (magnitude.shape[1] - 1), 1)
    bound = magnitude.kthvalue(int(below) + 1, dim=1).values
    if share > 0:
        bound = bound.lerp(magnitude.kthvalue(int(below) + 2, dim=1).values, share)
    bound = bound.clamp(1, cap)
    bound = bound.reshape(-1, *(1 for _ in x0.shape[1:]))
    return torch.minimum(torch.maximum(x0, -bound), bound) / bound


def _over_sample(x: Tensor, reduce: Callable[..., Tensor]) -> Tensor:
    """A reduction over all dimensions but the batch, kept for broadcasting."""
    return reduce(x, dim=tuple(range(1, x.dim())), keepdim=True)


def _check(settings: SamplingConfig) -> None:
    low, high = settings.guidance_interval
    if not math.isfinite(settings.guidance):
        raise InputError(f"guidance is {settings.guidance}: expected a finite number (1 is off)")
    if not 0 <= low <= high <= 1:
        raise InputError(f"guidance_interval is {low}, {high}: expected 0 <= low <= high <= 1, in t")
    if not 0 <= settings.guidance_rescale <= 1:
        raise InputError(f"guidance_rescale is {settings.guidance_rescale}: expected 0 to 1")
    if settings.threshold not in ("none", "static", "dynamic"):
        raise unknown("threshold", settings.threshold, ["none", "static", "dynamic"])
    if not 0 < settings.threshold_percentile <= 1:
        raise InputError(
            f"threshold_percentile is {settings.threshold_percentile}: expected a share in (0, 1]"
        )
    if not settings.threshold_cap >= 1:
        raise InputError(f"threshold_cap is {settings.threshold_cap}: expected at least 1")
