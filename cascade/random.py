"""Randomness as a function: every draw is keyed by (seed, purpose, stage, step), never by hidden state.

A draw for one picture depends on that picture's key alone, so it does not change with the batch the
picture is in, the number of processes, or a resume. Draws on one device type repeat bit for bit.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

MAX_SEED = 2**63 - 1


def key(seed: int, *parts: str | int) -> int:
    """A 63-bit integer that is a pure function of the seed and the parts (BLAKE2b of their text)."""
    text = "\x1f".join([str(int(seed)), *(str(part) for part in parts)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def generator(seed: int, *parts: str | int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator started at `key(seed, *parts)`."""
    return torch.Generator(device=device).manual_seed(key(seed, *parts))


def normal(
    shape: Sequence[int], seeds: Sequence[int], *parts: str | int, device: torch.device | str = "cpu"
) -> Tensor:
    """Unit Gaussian noise, float32, of shape (len(seeds), *shape); row i is keyed by (seeds[i], parts)."""
    rows = [torch.randn(*shape, generator=generator(s, *parts, device=device), device=device) for s in seeds]
    return torch.stack(rows)


def uniform(seeds: Sequence[int], *parts: str | int, count: int = 1) -> Tensor:
    """Uniform draws in [0, 1), float64, of shape (len(seeds), count), on the CPU."""
    rows = [torch.rand(count, generator=generator(s, *parts), dtype=torch.float64) for s in seeds]
    return torch.stack(rows)
