"""What every frozen text encoder is, and the chunking, checks and notices that they share."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from cascade.conditioning import TextEmbedding, Tokens
from cascade.errors import InputError

CHUNK = 64  # prompts a forward: bounds memory, whatever the number of prompts

_log = logging.getLogger("cascade")


class TextEncoder(Protocol):
    """A frozen text encoder: prompts to token states, padded to a fixed length.

    It loads nothing until it is first used, has no gradients, and is never saved inside a stage; a
    model folder holds its `reference`.
    """

    @property
    def max_length(self) -> int:
        """Tokens a prompt, special tokens included."""
        ...

    @property
    def dims(self) -> tuple[int, ...]:
        """Width of each token sequence."""
        ...

    def __call__(self, prompts: Sequence[str]) -> TextEmbedding:
        """Encode a list of prompts: one `Tokens` a sequence, float32 states (B, max_length, dim). "" is
        allowed (the unconditional text); prompts that are too long are cut, with one notice a call."""
        ...

    def to(self, device: torch.device | str) -> Self:
        """Move it or, while nothing is loaded, choose where it will be loaded."""
        ...

    def release(self) -> None:
        """Give back the memory of what is loaded; the next use loads it again."""
        ...

    def reference(self) -> dict[str, Any]:
        """Plain data from which `load_text_encoder` makes the same encoder."""
        ...


@dataclass(frozen=True)
class TokenIds:
    """Tokenised prompts, padded and cut to the maximum length."""

    ids: Tensor  # B L, int64
    mask: Tensor  # B L, bool, True at real tokens
    lengths: list[int]  # tokens of each prompt before the cut, special tokens included


class FrozenEncoder(ABC):
    """The shared half of the encoders with one token sequence: a subclass loads, tokenises and encodes."""

    _loaded: Any = None  # tokeniser and network, once they are used

    def __init__(self, device: torch.device | str, dtype: torch.dtype) -> None:
        self.device = torch.device(device)
        self.dtype = dtype

    def release(self) -> None:
        self._loaded = None

    def __call__(self, prompts: Sequence[str]) -> TextEmbedding:
        states, mask = self.encode(prompts)[:2]
        return TextEmbedding((Tokens(states, mask),))

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor, *tuple[Tensor, ...]]:
        """States (B L D, float32), mask (B L) and whatever else the encoder's `forward` returns."""
        prompts = check_prompts(prompts)
        tokens = self.tokenise(prompts)
        notify_truncated(prompts, tokens.lengths, self.max_length)
        parts = [
            self.forward(ids.to(self.device), mask.to(self.device))
            for ids, mask in zip(tokens.ids.split(CHUNK), tokens.mask.split(CHUNK), strict=True)
        ]
        states, *others = (torch.cat(same).float() for same in zip(*parts, strict=True))
        return states, tokens.mask.to(self.device), *others

    @property
    @abstractmethod
    def max_length(self) -> int: ...

    @abstractmethod
    def tokenise(self, prompts: list[str]) -> TokenIds:
        """Token ids of the prompts; loads the encoder where that has not happened."""

    @abstractmethod
    def forward(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        """States (B L D) of tokens (B L), and further tensors with B rows."""


def check_prompts(prompts: Sequence[str]) -> list[str]:
    """The prompts as a list. Raises InputError for a lone string, for other types and for no prompt."""
    if isinstance(prompts, str):
        raise InputError("prompts: expected a list of strings, got one string")
    if not prompts or not all(isinstance(p, str) for p in prompts):
        raise InputError(f"prompts: expected a list of at least one string, got {prompts!r:.100}")
    return list(prompts)


def notify_truncated(prompts: list[str], lengths: list[int], max_length: int) -> None:
    """One log line a call that says which prompt was cut, and how many others were."""
    cut = [i for i, length in enumerate(lengths) if length > max_length]
    if cut:
        others = f" (and {len(cut) - 1} more prompts)" if len(cut) > 1 else ""
        _log.warning(
            "prompt %.60r has %d tokens%s: the text encoder reads the first %d",
            prompts[cut[0]], lengths[cut[0]], others, max_length,
        )  # fmt: skip
