"""Frechet distance between Gaussians fitted to two sets of features (arXiv:1706.08500 eq. 6).

    d^2 = |m1 - m2|^2 + tr(S1) + tr(S2) - 2 tr((S1 S2)^(1/2))

With S = F^T F for any factor F, the last trace is the sum of the singular values of F1 F2^T. So no matrix
root is taken, nothing is squared that a root would follow, and a covariance of fewer pictures than
dimensions needs no care: its factor is the centred features themselves.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Moments:
    """A Gaussian: mean (D) and a factor (any rows, D) of its covariance, float64."""

    mean: Tensor
    factor: Tensor


def moments(features: Tensor) -> Moments:
    """Mean and unbiased covariance of N >= 2 rows, N D."""
    features = features.double()
    count, width = features.shape
    if count < 2:
        raise ValueError(f"expected at least 2 rows of features, got {count}")
    mean = features.mean(dim=0)
    factor = (features - mean) / math.sqrt(count - 1)  # N D
    if count > width:
        factor = torch.linalg.qr(factor, mode="r").R  # D D, the same product
    return Moments(mean, factor)


def moments_of_covariance(mean: Tensor, covariance: Tensor) -> Moments:
    """From a mean (D) and a covariance (D D), as published reference statistics have them."""
    values, vectors = torch.linalg.eigh(covariance.double())
    return Moments(mean.double(), values.clamp(min=0).sqrt()[:, None] * vectors.T)


def frechet_distance(a: Moments, b: Moments) -> float:
    """The squared distance d^2, which the field calls FID or FD; at least 0."""
    traces = a.factor.square().sum() + b.factor.square().sum()
    cross = torch.linalg.svdvals(a.factor @ b.factor.T).sum()
    distance = (a.mean - b.mean).square().sum() + traces - 2 * cross
    return max(0.0, distance.item())
