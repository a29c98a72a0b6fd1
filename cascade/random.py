"""Randomness as a function: every draw is keyed by (seed, purpose, stage, step), never by hidden state.

A draw for one picture depends on that picture's key alone, so it does not change with the batch the
picture is in, the number of processes, or a resume. Draws on one device type repeat bit for bit.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from cascade.errors import InputError

MAX_SEED = 2**63 - 1


def key(seed: int, *parts: str | int) -> int:
    """A 63-bit integer that is a pure function of the seed and the parts (BLAKE2b of their text)."""
    text = "\x1f".join(map(str, (int(seed), *parts)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def generator(seed: int, *parts: str | int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator started at `key(seed, *parts)`."""
    return torch.Generator(device=device).manual_seed(key(seed, *parts))


def normal(
    shape: Sequence[int], seeds: Sequence[int], *parts: str | int, device: torch.device | str = "cpu"
) -> Tensor:
    """Unit Gaussian noise, float32, of shape (len(seeds), *shape); row i is keyed by (seeds[i], parts)."""
    rows = torch.empty(len(seeds), *shape, device=device)
    for row, draws in zip(rows, _generators(seeds, *parts, device=device), strict=True):
        row.normal_(generator=draws)
    return rows


def uniform(seeds: Sequence[int], *parts: str | int, count: int = 1) -> Tensor:
    """Uniform draws in [0, 1), float64, of shape (len(seeds), count), on the CPU."""
    rows = torch.empty(len(seeds), count, dtype=torch.float64)
    for row, draws in zip(rows, _generators(seeds, *parts), strict=True):
        row.uniform_(generator=draws)
    return rows


def _generators(
    seeds: Sequence[int], *parts: str | int, device: torch.device | str = "cpu"
) -> Iterator[torch.Generator]:
    """For each seed the generator of `generator(seed, *parts)`, which is one, started anew each time."""
    draws = torch.Generator(device=device)
    for seed in seeds:
        yield draws.manual_seed(key(seed, *parts))


def seed_list(seed: int | Sequence[int], count: int) -> list[int]:
    """One seed a picture: seed + i, or the given ones. Raises InputError outside 0 .. 2**63 - 1."""
    if isinstance(seed, bool | str) or not isinstance(seed, int | Sequence):
        raise InputError(f"seed {seed!r}: expected an integer, or one a picture")
    seeds = [seed + i for i in range(count)] if isinstance(seed, int) else list(seed)
    if len(seeds) != count:
        raise InputError(f"seed: expected one integer or {count}, one a picture, got {len(seeds)}")
    for value in seeds:
        if isinstance(value, bool) or not isinstance(value, int):
            raise InputError(f"seed {value!r}: expected an integer")
        if not 0 <= value <= MAX_SEED:
            nearest = 0 if value < 0 else MAX_SEED
            raise InputError(f"seed {value}: expected 0 to {MAX_SEED}, the nearest is {nearest}")
    return seeds
