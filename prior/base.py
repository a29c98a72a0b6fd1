"""What both priors share: rows and seeds of a call, and the choice of the best candidate (unCLIP 2.2)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cascade import random
from cascade.conditioning import TextEmbedding
from cascade.errors import InputError

MAX_STEPS = 10_000

# on_step(step, total, estimate): step counts from 0; estimate is the current embedding, (B * candidates) D
OnStep = Callable[[int, int, Tensor], None]


def candidate_noise(dim: int, seeds: Sequence[int], candidates: int, *parts: str | int) -> Tensor:
    """Unit Gaussian noise, (B * candidates) D, on the CPU: candidates of one row stand together. Candidate j
    of a row is the same however many are drawn."""
    draws = [random.normal((dim,), seeds, *parts, j) for j in range(candidates)]
    return torch.stack(draws, dim=1).flatten(0, 1)


def negative_rows(negative: TextEmbedding, count: int) -> TextEmbedding:
    """The negative prompts, one a row; a single one stands for every row."""
    if len(negative) not in (1, count):
        raise InputError(f"negative prompt: expected 1 or {count} rows, got {len(negative)}")
    return negative.repeat(count) if len(negative) == 1 else negative


def pick_best(embeds: Tensor, pooled: Tensor, candidates: int, unit_norm: bool = True) -> Tensor:
    """(B * candidates) D to B D: of each row's candidates the one with the largest cosine to the CLIP text
    embedding `pooled`, B D; brought to unit norm, or as it is."""
    embeds = embeds.float().unflatten(0, (-1, candidates))  # B N D
    directions = F.normalize(embeds, dim=-1)
    score = (directions * pooled.float()[:, None]).sum(-1)  # B N
    rows = torch.arange(len(embeds), device=embeds.device)
    return (directions if unit_norm else embeds)[rows, score.argmax(dim=1)]


def check_number(name: str, value: float, holds: bool, expected: str) -> None:
    """Raise InputError unless `value` is finite and `holds`."""
    if not math.isfinite(value) or not holds:
        raise InputError(f"prior.{name}: expected {expected}, got {value!r}")


def device_of(module: nn.Module) -> torch.device:
    return next(module.parameters()).device
