"""The text that stands in front of both priors: projected tokens, then the CLIP text embedding.

Its states never see what follows, because the mask is causal. So it is run once a prompt and its K and V
serve every sampling step.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cascade.conditioning import TextEmbedding
from cascade.errors import InputError
from prior.clip import select_tokens
from prior.transformer import KeyValue


@dataclass(frozen=True)
class Prefix:
    """What a transformer remembers of the positions seen so far."""

    past: list[KeyValue]  # one a layer, each B H P D
    mask: Tensor  # B P bool, True at positions that later ones may see
    guess: Tensor | None = None  # B D, of the standardised image embedding

    def repeat(self, times: int) -> Prefix:
        """Each row `times` times in a row (a a b b)."""
        past = [(k.repeat_interleave(times, 0), v.repeat_interleave(times, 0)) for k, v in self.past]
        guess = None if self.guess is None else self.guess.repeat_interleave(times, 0)
        return Prefix(past, self.mask.repeat_interleave(times, 0), guess)

    @staticmethod
    def cat(parts: list[Prefix]) -> Prefix:
        """Concatenate along the batch."""
        layers = zip(*(part.past for part in parts), strict=True)
        past = [(torch.cat([k for k, _ in layer]), torch.cat([v for _, v in layer])) for layer in layers]
        guesses = [part.guess for part in parts if part.guess is not None]
        return Prefix(past, torch.cat([part.mask for part in parts]), torch.cat(guesses) if guesses else None)


class TextPrefix(nn.Module):
    """Embeds text as the first positions of a sequence. A row that is dropped becomes one learned null token
    and a learned null text embedding."""

    def __init__(
        self,
        width: int,
        text_dim: int,
        text_sequence: int,
        text_length: int,
        embed_dim: int,
        *,
        text_norm: bool = True,
        pooled_scale: float | None = None,
        learned_null: bool = True,
    ):
        super().__init__()
        self.sequence = text_sequence
        self.length = text_length
        self.pooled_scale = embed_dim**0.5 if pooled_scale is None else pooled_scale
        self.learned_null = learned_null
        self.norm = nn.LayerNorm(text_dim) if text_norm else nn.Identity()
        self.tokens = nn.Linear(text_dim, width)
        self.pooled = nn.Linear(embed_dim, width)
        self.positions = nn.Parameter(torch.randn(text_length + 1, width).mul_(0.02))
        if learned_null:
            self.null_token = nn.Parameter(torch.randn(width).mul_(0.02))
            self.null_pooled = nn.Parameter(torch.randn(width).mul_(0.02))

    def forward(self, text: TextEmbedding, keep: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """keep: B bool, False where the text is dropped. Returns the positions, B L+1 width, and their
        padding mask, B L+1. Raises InputError where the text does not fit this prior. Padding may be cut off
        beforehand: positions are counted from the first token."""
        states, mask, pooled = self.check(text)
        x = self.tokens(self.norm(states)) + self.positions[: states.shape[1]]  # B L width
        clip = self.pooled(pooled * self.pooled_scale)
        if keep is not None:
            if not self.learned_null:
                raise InputError("this prior has no learned null text: give negative=, the encoded ''")
            null = self.null_token + self.positions[0]
            null_clip = self.null_pooled.expand_as(clip)
            first = F.one_hot(torch.zeros_like(keep, dtype=torch.long), mask.shape[1]).bool()  # B L
            x = torch.where(keep[:, None, None], x, null.to(x.dtype))
            mask = torch.where(keep[:, None], mask, first)
            clip = torch.where(keep[:, None], clip, null_clip.to(clip.dtype))
        x = torch.cat([x, (clip + self.positions[-1])[:, None]], dim=1)
        return x, F.pad(mask, (0, 1), value=True)

    def check(self, text: TextEmbedding) -> tuple[Tensor, Tensor, Tensor]:
        """Token states (B L text_dim) and mask, and the CLIP text embedding (B D), or InputError."""
        tokens = select_tokens(text, self.sequence, self.tokens.in_features, "prior")
        length, width = tokens.states.shape[1], self.pooled.in_features
        if length > self.length:
            raise InputError(f"prior: expected at most {self.length} text tokens, got {length}")
        if text.pooled is None:
            raise InputError("prior: the text has no CLIP embedding (`pooled`): encode it with the pipeline")
        if text.pooled.shape[-1] != width:
            raise InputError(
                f"prior: expected CLIP text embeddings of width {width}, got {text.pooled.shape[-1]}"
            )
        dtype = self.tokens.weight.dtype
        return tokens.states.to(dtype), tokens.mask, text.pooled.to(dtype)


def causal_mask(visible: Tensor, new: int) -> Tensor:
    """Attention mask of the last `new` of P positions, B 1 new P, True where attention is allowed: to earlier
    positions that are `visible` (B P), and always to oneself, so that no softmax is empty."""
    positions = torch.arange(visible.shape[1], device=visible.device)
    query = positions[-new:, None]
    return ((positions < query) & visible[:, None, :] | (positions == query))[:, None]
