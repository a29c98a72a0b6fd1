"""Training losses: a weighted mean squared error in the space the network predicts.

A weighting says how much the error of x_0 (or of eps) counts at a noise level. Errors of two predictions
differ by a factor that depends on the noise level alone, so one weighting serves every prediction.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cascade.config import DiffusionConfig
from cascade.diffusion.denoiser import Denoiser
from cascade.diffusion.prediction import corrupt, levels, to_x0, x0_coefficients
from cascade.diffusion.schedule import Schedule, alpha_sigma, make_schedule, precise, step_log_variances
from cascade.errors import unknown


def diffusion_loss(denoiser: Denoiser, x0: Tensor, cond: object, logsnr: Tensor, eps: Tensor) -> Tensor:
    """Loss of each sample, float32, shape [B]: the weighted squared error, averaged over all but the batch.

    x0 and eps: B ...; logsnr: B, on x0's device. With learned variance, the hybrid loss of Nichol &
    Dhariwal 2021, equation 16: plus 0.001 of the variational bound. No host synchronisation.
    """
    return loss_and_estimate(denoiser, x0, cond, logsnr, eps)[0]


def loss_and_estimate(
    denoiser: Denoiser, x0: Tensor, cond: object, logsnr: Tensor, eps: Tensor
) -> tuple[Tensor, Tensor]:
    """`diffusion_loss`, and the estimate of x_0 that was made for it, detached, like x0."""
    config = denoiser.config
    x0, eps = x0.float(), eps.float()
    corrupted = corrupt(x0, eps, logsnr, config.sigma_data if config.prediction == "edm" else None)
    output, fraction = denoiser.raw(corrupted.x_t, logsnr, cond)
    error = (output - corrupted.targets[config.prediction]).square().flatten(1).mean(1)  # B
    loss = loss_weight(logsnr, config, denoiser.schedule) * error
    x0_hat = to_x0(config.prediction, output.detach(), corrupted.x_t, logsnr, config.sigma_data)
    if fraction is not None:
        loss = loss + variational_bound(denoiser.schedule, x0, x0_hat, logsnr, fraction)
    return loss, x0_hat


def loss_weight(logsnr: Tensor, config: DiffusionConfig, schedule: Schedule | None = None) -> Tensor:
    """Weight of the squared error in the space of `config.prediction`, float32, shape of `logsnr`.

    none           1 in the predicted space
    min_snr        min(SNR, gamma) on the error of x_0 (Hang et al. 2023, arXiv:2303.09556)
    clamped_snr    SNR clamped to [1, gamma] on the error of x_0: the truncated SNR of Salimans & Ho 2022
                   (arXiv:2202.00512, section 4), which keeps the noisiest levels, where a picture's layout is
                   decided, under the upper bound of min-SNR
    soft_min_snr   SNR gamma / (SNR + gamma) on the error of x_0 (HDiT, arXiv:2401.11605, where gamma = 4)
    sigmoid        sigmoid(b - logsnr) on the error of eps, times -d logsnr / dt so that the loss does not
                   depend on the schedule it is sampled with (SiD2, arXiv:2410.19324; VDM++, arXiv:2303.00848)
    """
    if config.weighting == "none":
        return torch.ones_like(logsnr, dtype=torch.float32)
    logsnr, param = precise(logsnr), config.weighting_param
    snr = logsnr.exp()
    if config.weighting == "min_snr":
        weight = snr.clamp(max=param)
    elif config.weighting == "clamped_snr":
        weight = snr.clamp(min=1.0, max=param)
    elif config.weighting == "soft_min_snr":
        weight = snr * param / (snr + param)
    elif config.weighting == "sigmoid":
        slope = (schedule or make_schedule(config.schedule)).slope(logsnr)
        weight = slope * math.exp(param) * (logsnr - param).sigmoid()  # SNR sigmoid(b - logsnr)
    else:
        raise unknown(
            "weighting", config.weighting, ["none", "min_snr", "clamped_snr", "soft_min_snr", "sigmoid"]
        )
    return (weight * x0_error_ratio(logsnr, config)).float()


def x0_error_ratio(logsnr: Tensor, config: DiffusionConfig) -> Tensor:
    """Squared error of x_0 over squared error in the predicted space: the square of d x_0 / d output."""
    _, scale = x0_coefficients(config.prediction, *alpha_sigma(logsnr), config.sigma_data)
    return scale.square()


def variational_bound(
    schedule: Schedule, x0: Tensor, x0_hat: Tensor, logsnr: Tensor, fraction: Tensor
) -> Tensor:
    """One term of the variational bound, bits per dimension, shape [B]: what 0.001 L_vlb contributes on a
    chain of 1000 steps. `x0_hat` comes detached, so that the bound teaches the variance only.

    KL(q(x_s | x_t, x_0) || p(x_s | x_t)), or for the chain's first step the likelihood of 8-bit pixels.
    Nichol & Dhariwal 2021, equations 4 to 7 and 15.
    """
    logsnr = precise(logsnr)
    target, first = schedule.previous(logsnr)
    low, high = (_column(v, x0) for v in step_log_variances(logsnr, target))
    log_variance = fraction * high + (1 - fraction) * low
    alpha_s, _ = levels(target, x0)
    share = _column(-torch.expm1(logsnr - target), x0)  # 1 - SNR_t / SNR_s
    mean_gap = share * alpha_s * (x0 - x0_hat)  # x_t contributes the same to both means
    kl = 0.5 * (
        log_variance - low - 1 + (low - log_variance).exp() + mean_gap.square() * (-log_variance).exp()
    )
    likelihood = _pixel_log_likelihood(x0, x0_hat, 0.5 * log_variance)
    is_first = first.reshape(-1, *(1 for _ in x0.shape[1:]))
    return torch.where(is_first, -likelihood, kl).flatten(1).mean(1) / math.log(2)


def _pixel_log_likelihood(x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """log P of the 8-bit pixel x in [-1, 1] under a Gaussian, in nats: mass of its bin, whose outermost
    edges are open. Ho et al. 2020, equation 13."""
    inverse = (-log_std).exp()
    upper = torch.where(x > 0.999, 1.0, torch.special.ndtr((x - mean + 1 / 255) * inverse))
    lower = torch.where(x < -0.999, 0.0, torch.special.ndtr((x - mean - 1 / 255) * inverse))
    return (upper - lower).clamp(min=1e-12).log()


def _column(values: Tensor, like: Tensor) -> Tensor:
    return values.to(like.dtype).reshape(-1, *(1 for _ in like.shape[1:]))
