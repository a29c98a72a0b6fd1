"""Optimisers, the learning rate, and one update that a gradient which is not finite cannot spoil."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from cascade.errors import InputError
from train.adafactor import Adafactor
from train.recipe import TrainConfig

# of a parameter; the factors of a large weight are thousandths of it
MOMENT_BYTES = {"adamw": 8.0, "adamw8bit": 2.0, "adafactor": 0.0}


def learning_rate(cfg: TrainConfig, images: int) -> float:
    """Linear warm-up, constant, linear to zero at the end; in training images."""
    rise = min(1.0, (images + cfg.batch) / cfg.warmup_images) if cfg.warmup_images else 1.0
    left = (cfg.images - images) / cfg.cooldown_images if cfg.cooldown_images else 1.0
    return cfg.lr * rise * max(0.0, min(1.0, left))


def make_optimizer(cfg: TrainConfig, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """Raises InputError where the optimiser's package is missing."""
    trained = [p for p in parameters if p.requires_grad]
    if cfg.optimizer == "adafactor":
        return Adafactor(trained, cfg.lr, cfg.weight_decay)
    settings: dict[str, Any] = dict(lr=cfg.lr, betas=cfg.betas, eps=cfg.eps, weight_decay=cfg.weight_decay)
    if cfg.optimizer == "adamw":
        return torch.optim.AdamW(trained, fused=True, **settings)
    try:
        from bitsandbytes.optim.adamw import AdamW8bit  # an extra, which imports slowly
    except ImportError:
        expected = "bitsandbytes (pip install bitsandbytes), or optimizer: adamw"
        raise InputError(f"train.optimizer adamw8bit: expected {expected}") from None
    for p in trained:  # as its first step would: a resumed run must not begin in another layout
        p.data = p.data.contiguous()
    return AdamW8bit(trained, **settings)


def guarded_mean(losses: Tensor) -> Tensor:
    """The mean, whose gradient is not finite where one of the losses is not: then the norm of the
    gradient, which all processes share, is not finite either, and `update` makes none on any of them."""
    finite = torch.isfinite(losses).all()
    return losses.mean() * torch.where(finite, 1.0, math.nan)


def update(
    accelerator: Accelerator, optimizer: AcceleratedOptimizer, parameters: Iterable[nn.Parameter], clip: float
) -> Tensor:
    """Clip the gradient and step, unless its norm is not finite. Returns the norm before clipping, a
    scalar on the device. The device itself skips the step, so that the host need not wait to decide."""
    norm = accelerator.clip_grad_norm_(parameters, clip)
    norm = norm.full_tensor() if isinstance(norm, DTensor) else cast(Tensor, norm)
    inner = optimizer.optimizer
    if accelerator.distributed_type == DistributedType.DEEPSPEED:  # `backward` did all else
        return torch.tensor(math.inf if inner.overflow else norm, device=accelerator.device)
    if accelerator.scaler is not None:
        optimizer.step()  # the scaler of fp16 saw what `norm` shows
    elif inner.defaults.get("fused"):
        inner.found_inf = (~torch.isfinite(norm)).float()  # what the scaler would set
        optimizer.step()
    elif bool(torch.isfinite(norm)):
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm
