"""What a network may predict, and the linear maps between the predictions.

With x_t = alpha x_0 + sigma eps every prediction p is a linear function of (x_0, eps), so x_0 and eps are
linear functions of (x_t, p): one pair of coefficients a prediction describes it completely.

    eps   the noise (DDPM)
    x0    the picture
    v     alpha eps - sigma x_0 (arXiv:2202.00512)
    edm   the raw output F of EDM's preconditioned network (arXiv:2206.00364, equations 7 and 8) for data of
          standard deviation s: with n = sqrt(sigma^2 + s^2 alpha^2), F = (sigma x_0 - s^2 alpha eps) / (s n).
          This is EDM's own definition after x_edm = x_t / alpha, sigma_edm = sigma / alpha; for s = 1 it
          is -v.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cascade.config import Prediction
from cascade.diffusion.schedule import alpha_sigma, to_device
from cascade.errors import unknown

PREDICTIONS: tuple[Prediction, ...] = ("v", "eps", "x0", "edm")


@dataclass(frozen=True)
class Corrupted:
    """A noised sample and what each kind of network should answer for it."""

    x_t: Tensor  # B ...
    targets: dict[str, Tensor]  # by prediction, each like x_t; "edm" only when sigma_data was given


def corrupt(x0: Tensor, eps: Tensor, logsnr: Tensor, sigma_data: float | None = None) -> Corrupted:
    """Noise `x0` (B ...) with `eps` to the log-SNRs (B, or one for all)."""
    alpha, sigma = levels(logsnr, x0)
    targets = {"x0": x0, "eps": eps, "v": alpha * eps - sigma * x0}
    if sigma_data is not None:
        targets["edm"] = (sigma * x0 - sigma_data**2 * alpha * eps) / (
            sigma_data * edm_norm(alpha, sigma, sigma_data)
        )
    return Corrupted(alpha * x0 + sigma * eps, targets)


def to_x0(prediction: str, output: Tensor, x_t: Tensor, logsnr: Tensor, sigma_data: float = 0.5) -> Tensor:
    """The estimate of x_0 that a network output implies. For "eps" the log-SNR must leave some signal."""
    skip, scale = x0_coefficients(prediction, *levels(logsnr, x_t), sigma_data)
    return skip * x_t + scale * output


def to_eps(prediction: str, output: Tensor, x_t: Tensor, logsnr: Tensor, sigma_data: float = 0.5) -> Tensor:
    """The estimate of the noise that a network output implies. For "x0" the log-SNR must be finite."""
    skip, scale = eps_coefficients(prediction, *levels(logsnr, x_t), sigma_data)
    return skip * x_t + scale * output


def to_v(prediction: str, output: Tensor, x_t: Tensor, logsnr: Tensor, sigma_data: float = 0.5) -> Tensor:
    """The estimate of v = alpha eps - sigma x_0 that a network output implies."""
    alpha, sigma = levels(logsnr, x_t)
    if prediction == "v":
        return output
    if prediction == "x0":
        return (alpha * x_t - output) / sigma
    if prediction == "eps":
        return (output - sigma * x_t) / alpha
    skip_x0, scale_x0 = x0_coefficients(prediction, alpha, sigma, sigma_data)
    skip_eps, scale_eps = eps_coefficients(prediction, alpha, sigma, sigma_data)
    return (alpha * skip_eps - sigma * skip_x0) * x_t + (alpha * scale_eps - sigma * scale_x0) * output


def to_edm(prediction: str, output: Tensor, x_t: Tensor, logsnr: Tensor, sigma_data: float = 0.5) -> Tensor:
    """The EDM output F that gives the same estimate of x_0 as this network output."""
    if prediction == "edm":
        return output
    skip, scale = x0_coefficients("edm", *levels(logsnr, x_t), sigma_data)
    return (to_x0(prediction, output, x_t, logsnr, sigma_data) - skip * x_t) / scale


def x0_coefficients(
    prediction: str, alpha: Tensor, sigma: Tensor, sigma_data: float = 0.5
) -> tuple[Tensor, Tensor]:
    """(skip, scale) of x_0 = skip x_t + scale output."""
    if prediction == "v":
        return alpha, -sigma
    if prediction == "eps":
        return 1 / alpha, -sigma / alpha
    if prediction == "x0":
        return torch.zeros_like(alpha), torch.ones_like(alpha)
    if prediction == "edm":  # c_skip / alpha and c_out
        norm = edm_norm(alpha, sigma, sigma_data)
        return sigma_data**2 * alpha / norm**2, sigma * sigma_data / norm
    raise unknown("prediction", prediction, PREDICTIONS)


def eps_coefficients(
    prediction: str, alpha: Tensor, sigma: Tensor, sigma_data: float = 0.5
) -> tuple[Tensor, Tensor]:
    """(skip, scale) of eps = skip x_t + scale output."""
    if prediction == "v":
        return sigma, alpha
    if prediction == "eps":
        return torch.zeros_like(alpha), torch.ones_like(alpha)
    if prediction == "x0":
        return 1 / sigma, -alpha / sigma
    if prediction == "edm":
        norm = edm_norm(alpha, sigma, sigma_data)
        return sigma / norm**2, -alpha * sigma_data / norm
    raise unknown("prediction", prediction, PREDICTIONS)


def edm_norm(alpha: Tensor, sigma: Tensor, sigma_data: float) -> Tensor:
    """Standard deviation of x_t when that of the data is sigma_data; x_t over it is EDM's c_in x_edm."""
    return (sigma**2 + (sigma_data * alpha) ** 2).sqrt()


def levels(logsnr: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """alpha and sigma of B (or one) log-SNRs, of the device and dtype of `like`, broadcastable to it."""
    alpha, sigma = alpha_sigma(to_device(logsnr, like.device))
    shape = (-1, *(1 for _ in like.shape[1:]))
    return alpha.to(like.dtype).reshape(shape), sigma.to(like.dtype).reshape(shape)
