"""Samplers: functions of a callable and a grid of log-SNRs.

`denoise(x, logsnr)` estimates x_0 from x (B ...) at log-SNRs (B, float64, on the CPU: coefficients are
computed there, and nothing waits for the accelerator). It returns x0_hat, or (x0_hat, variance fraction).
A grid holds N + 1 log-SNRs, noisiest first; the last is only a target. It is +inf for a whole run; a grid
that ends at a finite log-SNR returns x at that noise level, and a run may start at any level whose x is at
hand.

`noise(i)` gives unit Gaussian noise like x for step i (default: torch's global generator).
`on_step(i, N, x0_hat)` is called after each step.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from itertools import pairwise
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from cascade.diffusion.schedule import alpha_sigma, step_log_variances
from cascade.errors import InputError, unknown

Denoise = Callable[[Tensor, Tensor], "Tensor | tuple[Tensor, Tensor]"]
Noise = Callable[[int], Tensor]
OnStep = Callable[[int, int, Tensor], object]
Variance = Literal["small", "large", "learned"]

HEUN_LOGSNR = -2 * math.log(200.0)  # below it, sigma_edm above 200, Heun takes an Euler step


class Sampler(Protocol):
    def __call__(
        self,
        denoise: Denoise,
        x: Tensor,
        logsnrs: Tensor,
        *,
        noise: Noise | None = None,
        on_step: OnStep | None = None,
        eta: float = 1.0,
    ) -> Tensor: ...


class Level(NamedTuple):
    """A noise level in plain floats."""

    logsnr: float
    alpha: float
    sigma: float


def ddpm(
    denoise: Denoise,
    x: Tensor,
    logsnrs: Tensor,
    *,
    noise: Noise | None = None,
    on_step: OnStep | None = None,
    variance: Variance | float | None = None,
) -> Tensor:
    """Ancestral sampling. Ho et al. 2020, algorithm 2, in the form of Imagen, equations 3 to 6.

    `variance` of the reverse step: "small" (beta-tilde), "large" (beta), "learned" (between the two by the
    fraction the network gives), or a number gamma in [0, 1], small^(1 - gamma) large^gamma. The default is
    learned where the network gives a fraction, else small."""
    levels = _levels(logsnrs)
    if isinstance(variance, str) and variance not in ("small", "large", "learned"):
        raise unknown("variance", variance, ["small", "large", "learned"])
    if isinstance(variance, float) and not 0 <= variance <= 1:
        raise InputError(f"variance is {variance}: expected gamma in [0, 1]")
    for i, (here, there) in enumerate(pairwise(levels)):
        x0, fraction = _call(denoise, x, here)
        ratio = math.exp(here.logsnr - there.logsnr)  # SNR_t / SNR_s
        x = ratio * (there.alpha / here.alpha) * x + (1 - ratio) * there.alpha * x0
        if there.sigma > 0:
            x = x + _ddpm_std(variance, fraction, here, there) * _draw(noise, i, x)
        _report(on_step, i, levels, x0)
    return x


def _ddpm_std(
    variance: Variance | float | None, fraction: Tensor | None, here: Level, there: Level
) -> Tensor | float:
    """Standard deviation of the reverse step. Improved DDPM, equation 15; Imagen, equations 3 to 6."""
    low, high = step_log_variances(*torch.tensor([here.logsnr, there.logsnr], dtype=torch.float64))
    low, high = float(low), float(high)
    if variance is None:
        variance = "small" if fraction is None else "learned"
    if variance == "learned":
        if fraction is None:
            raise InputError(
                "variance 'learned': this network gives no variance; expected 'small' or 'large'"
            )
        return (0.5 * (low + fraction * (high - low))).exp()
    gamma = {"small": 0.0, "large": 1.0}[variance] if isinstance(variance, str) else variance
    return math.exp(0.5 * (low + gamma * (high - low)))


def ddim(
    denoise: Denoise,
    x: Tensor,
    logsnrs: Tensor,
    *,
    noise: Noise | None = None,
    on_step: OnStep | None = None,
    eta: float = 0.0,
) -> Tensor:
    """DDIM. Song et al. 2020 (arXiv:2010.02502), equations 12 and 16: eta 0 is deterministic, 1 is DDPM."""
    levels = _levels(logsnrs)
    _check_eta(eta, 1.0)
    for i, (here, there) in enumerate(pairwise(levels)):
        x0, _ = _call(denoise, x, here)
        eps = (x - here.alpha * x0) / here.sigma
        fresh = eta * math.sqrt(-math.expm1(here.logsnr - there.logsnr))  # share of sigma_s drawn anew
        x = there.alpha * x0 + there.sigma * math.sqrt(1 - fresh**2) * eps
        if fresh * there.sigma > 0:
            x = x + there.sigma * fresh * _draw(noise, i, x)
        _report(on_step, i, levels, x0)
    return x


def ddim_invert(denoise: Denoise, x0: Tensor, logsnrs: Tensor, *, on_step: OnStep | None = None) -> Tensor:
    """The x at logsnrs[0] from which `ddim` with eta 0 on the same grid returns to `x0`, up to the error of
    the discretisation: the same update with time reversed (arXiv:2010.02502, 4.3; unCLIP 3).

    The noise of the first step, which would have to be judged on the clean picture, is judged at the
    cleanest level of the grid."""
    levels = _levels(logsnrs)
    x, rising = x0, levels[::-1]
    for i, (here, there) in enumerate(pairwise(rising)):
        judged = here if here.sigma > 0 else there
        estimate, _ = _call(denoise, x, judged)
        eps = (x - judged.alpha * estimate) / judged.sigma
        x = there.alpha * (x - here.sigma * eps) / here.alpha + there.sigma * eps
        _report(on_step, i, levels, estimate)
    return x


def dpmpp_2m(
    denoise: Denoise,
    x: Tensor,
    logsnrs: Tensor,
    *,
    noise: Noise | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """DPM-Solver++(2M), deterministic, second order. Lu et al. 2022 (arXiv:2211.01095), algorithm 2."""
    return dpmpp_2m_sde(denoise, x, logsnrs, noise=noise, on_step=on_step, eta=0.0)


def dpmpp_2m_sde(
    denoise: Denoise,
    x: Tensor,
    logsnrs: Tensor,
    *,
    noise: Noise | None = None,
    on_step: OnStep | None = None,
    eta: float = 1.0,
) -> Tensor:
    """SDE-DPM-Solver++(2M), midpoint form. Lu et al. 2022 (arXiv:2211.01095); eta scales the noise as in
    k-diffusion: 0 is DPM-Solver++(2M), 1 the reverse SDE."""
    levels = _levels(logsnrs)
    _check_eta(eta, math.inf)
    previous: tuple[Tensor, float] | None = None  # estimate of x_0 and step length, one step ago
    for i, (here, there) in enumerate(pairwise(levels)):
        x0, _ = _call(denoise, x, here)
        h = (there.logsnr - here.logsnr) / 2  # step in lambda = log(alpha / sigma)
        direction = x0
        if previous is not None and math.isfinite(h):  # the step to the clean picture is of first order
            old, old_h = previous
            direction = x0 + (h / (2 * old_h)) * (x0 - old)
        reverse = eta * h if eta > 0 else 0.0  # h may be infinite
        kept = there.sigma / here.sigma * math.exp(-reverse)
        x = kept * x - there.alpha * math.expm1(-h - reverse) * direction
        fresh = there.sigma * math.sqrt(-math.expm1(-2 * reverse))
        if fresh > 0:
            x = x + fresh * _draw(noise, i, x)
        previous = x0, h
        _report(on_step, i, levels, x0)
    return x


def heun(
    denoise: Denoise,
    x: Tensor,
    logsnrs: Tensor,
    *,
    noise: Noise | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """Heun's second-order method on the probability-flow ODE, deterministic. Karras et al. 2022, algorithm 1,
    in sigma_edm = sigma / alpha and x_edm = x / alpha, where dx_edm / dsigma_edm = eps.

    Two evaluations a step; one in the step to the clean picture, and in steps from sigma_edm above 200, where
    sigma_edm grows without bound and the trapezoid is worse than Euler. Meant for the grid spacing "edm"."""
    levels = _levels(logsnrs)
    for i, (here, there) in enumerate(pairwise(levels)):
        x0, _ = _call(denoise, x, here)
        eps = (x - here.alpha * x0) / here.sigma
        euler = there.alpha * x0 + there.sigma * eps
        if there.sigma > 0 and here.logsnr > HEUN_LOGSNR:
            ahead, _ = _call(denoise, euler, there)
            eps_ahead = (euler - there.alpha * ahead) / there.sigma
            step = there.sigma - there.alpha * (
                here.sigma / here.alpha
            )  # alpha_s times the step in sigma_edm
            x = euler + 0.5 * step * (eps_ahead - eps)
        else:
            x = euler
        _report(on_step, i, levels, x0)
    return x


def _without_eta(sampler: Callable[..., Tensor]) -> Sampler:
    """The same sampler under the common signature: what eta would set is fixed in it."""

    @functools.wraps(sampler)
    def run(
        denoise: Denoise,
        x: Tensor,
        logsnrs: Tensor,
        *,
        noise: Noise | None = None,
        on_step: OnStep | None = None,
        eta: float = 1.0,
    ) -> Tensor:
        del eta
        return sampler(denoise, x, logsnrs, noise=noise, on_step=on_step)

    return run


SAMPLERS: dict[str, Sampler] = {
    "ddpm": _without_eta(ddpm),
    "ddim": ddim,
    "dpmpp_2m": _without_eta(dpmpp_2m),
    "dpmpp_2m_sde": dpmpp_2m_sde,
    "heun": _without_eta(heun),
}


def _levels(logsnrs: Tensor) -> list[Level]:
    """The grid in plain floats, so that no step touches the accelerator for a coefficient."""
    logsnrs = logsnrs.double().cpu()
    if logsnrs.dim() != 1 or len(logsnrs) < 2 or not bool((logsnrs.diff() > 0).all()):
        raise InputError(
            "grid: expected at least two log-SNRs in one dimension, strictly rising, noisiest first"
        )
    alphas, sigmas = alpha_sigma(logsnrs)
    return [Level(*level) for level in zip(logsnrs.tolist(), alphas.tolist(), sigmas.tolist(), strict=True)]


def _call(denoise: Denoise, x: Tensor, level: Level) -> tuple[Tensor, Tensor | None]:
    estimate = denoise(x, torch.full((x.shape[0],), level.logsnr, dtype=torch.float64))
    return estimate if isinstance(estimate, tuple) else (estimate, None)


def _draw(noise: Noise | None, step: int, like: Tensor) -> Tensor:
    return torch.randn_like(like) if noise is None else noise(step)


def _report(on_step: OnStep | None, step: int, levels: list[Level], x0: Tensor) -> None:
    if on_step is not None:
        on_step(step, len(levels) - 1, x0)


def _check_eta(eta: float, largest: float) -> None:
    if not 0 <= eta <= largest or math.isinf(eta):
        raise InputError(
            f"eta is {eta}: expected a number from 0" + ("" if math.isinf(largest) else f" to {largest:g}")
        )
