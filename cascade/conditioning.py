"""What a stage is conditioned on. Text may come as several token sequences (T5 and CLIP side by side)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tokens:
    """One encoder's token states. `mask` is True at real tokens; padding always reaches the encoder's
    fixed maximum length, so that shapes (and hence kernels) do not depend on the other prompts."""

    states: Tensor  # B L D
    mask: Tensor  # B L, bool

    def mean(self, dtype: torch.dtype) -> Tensor:
        """The mean of each row's real tokens, B D, computed in `dtype`; 0 where there is none."""
        kept = self.mask[..., None].to(dtype)  # B L 1
        return (self.states.to(dtype) * kept).sum(1) / kept.sum(1).clamp(min=1)


@dataclass(frozen=True)
class TextEmbedding:
    """Encoded prompts: one `Tokens` an encoder, and the CLIP text embedding where a CLIP is loaded."""

    sequences: tuple[Tokens, ...]
    pooled: Tensor | None = None  # B D_clip, unit norm

    def __len__(self) -> int:
        return self.sequences[0].states.shape[0]

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> TextEmbedding:
        return self._map(
            lambda x: x.to(device=device, dtype=dtype if x.is_floating_point() else None)  # masks stay bool
        )

    def __getitem__(self, index: Tensor | slice | list[int]) -> TextEmbedding:
        """Rows of the batch; `index` is a slice, a list or an integer tensor."""
        return self._map(lambda x: x[index])

    def select(self, sequences: tuple[int, ...] | None) -> TextEmbedding:
        """Some of the token sequences, by place; None: all."""
        if sequences is None:
            return self
        return TextEmbedding(tuple(self.sequences[i] for i in sequences), self.pooled)

    def repeat(self, times: int) -> TextEmbedding:
        """Each row `times` times in a row (a a b b), the order in which the pipeline draws pictures."""
        return self._map(lambda x: x.repeat_interleave(times, dim=0))

    def _map(self, function) -> TextEmbedding:
        sequences = tuple(Tokens(function(s.states), function(s.mask)) for s in self.sequences)
        return TextEmbedding(sequences, None if self.pooled is None else function(self.pooled))

    @staticmethod
    def cat(parts: list[TextEmbedding]) -> TextEmbedding:
        """Concatenate along the batch."""
        sequences = tuple(
            Tokens(torch.cat([s.states for s in same]), torch.cat([s.mask for s in same]))
            for same in zip(*(p.sequences for p in parts), strict=True)
        )
        pooled = (
            None if parts[0].pooled is None else torch.cat([p.pooled for p in parts if p.pooled is not None])
        )
        return TextEmbedding(sequences, pooled)


@dataclass(frozen=True)
class Conditioning:
    """Everything a network is told beside x_t and the noise level.

    A field that is None, or a row whose `keep` flag is False, is replaced by the network's learned null:
    this is both the dropout of training and the unconditional half of classifier-free guidance.
    """

    text: TextEmbedding | None = None
    image_embed: Tensor | None = None  # B D_clip
    lowres: Tensor | None = None  # B 3 H W, already at the stage's size and corrupted to aug_level
    aug_level: Tensor | None = None  # B, in [0, 1]
    inpaint: Tensor | None = (
        None  # B 4 H W, the known part: the picture times its mask, and the mask (1: known)
    )
    text_keep: Tensor | None = None  # B S bool, one column a token sequence; None keeps all
    image_keep: Tensor | None = None  # B bool; None keeps all

    def with_(self, **changes) -> Conditioning:
        return replace(self, **changes)
