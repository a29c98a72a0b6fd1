"""Encoders side by side (T5 and CLIP): one token sequence each, which training can drop on its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import torch

from cascade.conditioning import TextEmbedding
from cascade.text.base import TextEncoder


class PairEncoder:
    """Two encoders (or more) on the same prompts. `pooled` is the first one that an encoder gives."""

    def __init__(self, encoders: Sequence[TextEncoder]) -> None:
        self.encoders = tuple(encoders)

    @property
    def max_length(self) -> int:
        """Of the encoder that reads furthest; each cuts and says so at its own length."""
        return max(encoder.max_length for encoder in self.encoders)

    @property
    def dims(self) -> tuple[int, ...]:
        return tuple(dim for encoder in self.encoders for dim in encoder.dims)

    def __call__(self, prompts: Sequence[str]) -> TextEmbedding:
        parts = [encoder(prompts) for encoder in self.encoders]
        pooled = next((part.pooled for part in parts if part.pooled is not None), None)
        return TextEmbedding(tuple(tokens for part in parts for tokens in part.sequences), pooled)

    def to(self, device: torch.device | str) -> Self:
        for encoder in self.encoders:
            encoder.to(device)
        return self

    def release(self) -> None:
        for encoder in self.encoders:
            encoder.release()

    def reference(self) -> dict[str, Any]:
        return {"kind": "pair", "encoders": [encoder.reference() for encoder in self.encoders]}
