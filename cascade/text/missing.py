"""In place of a text encoder that a model folder does not hold: its stages can be seen, not told of text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch

from cascade.conditioning import TextEmbedding
from cascade.config import to_dict
from cascade.errors import InputError


@dataclass(frozen=True, kw_only=True)
class MissingReference:
    """How a model folder names it."""

    kind: Literal["missing"] = "missing"
    expected: str  # what the stages were trained on
    dims: tuple[int, ...]
    max_length: int = 77


class MissingEncoder:
    """Knows the widths that its model needs, and refuses to encode."""

    def __init__(self, config: MissingReference) -> None:
        self.config = config

    @property
    def max_length(self) -> int:
        return self.config.max_length

    @property
    def dims(self) -> tuple[int, ...]:
        return self.config.dims

    def __call__(self, prompts: Sequence[str]) -> TextEmbedding:
        raise InputError(
            f"this model has no text encoder: expected {self.config.expected}, from another source of "
            "`cascade convert SOURCE ... DEST`"
        )

    def to(self, device: torch.device | str) -> Self:
        return self

    def release(self) -> None: ...

    def reference(self) -> dict[str, Any]:
        return to_dict(self.config)
