"""Attention over pixels and conditioning tokens, and attention pooling of text."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from cascade.nn.layers import norm2d, zero_init


def extend_mask(mask: Tensor, before: int = 0, after: int = 0) -> Tensor:
    """B L to B before+L+after, True at the new places.

    By index, not by padding: torch 2.15's compiler reads before the start of a padded boolean tensor on the
    CPU, and crashes when that address is not mapped."""
    length = mask.shape[1]
    place = torch.arange(-before, length + after, device=mask.device)
    return mask[:, place.clamp(0, length - 1)] | (place < 0) | (place >= length)


def split_heads(x: Tensor, heads: int) -> Tensor:
    return rearrange(x, "b n (h d) -> b h n d", h=heads)


class TokenGroupNorm(nn.GroupNorm):
    """Group norm of a token sequence, B L C: its statistics run over all tokens, padding included."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (the name that torch gives it)
        return super().forward(input.transpose(1, 2)).transpose(1, 2)


def token_norm(kind: str, dim: int) -> nn.Module:
    """The norm of the conditioning tokens in one attention; none if they are normed before it or never."""
    if kind == "group":
        return TokenGroupNorm(math.gcd(32, dim), dim)
    return nn.LayerNorm(dim) if kind == "layer" else nn.Identity()


class Attention2d(nn.Module):
    """Attention of a feature map to itself, to conditioning tokens, or to both in one softmax.

    With both, the tokens' keys and values are prepended to the pixels' own (Imagen D.3.1). They do not depend
    on the noise level: `context_kv` makes them once a prompt, `forward` takes them.
    """

    def __init__(
        self,
        channels: int,
        head_channels: int,
        norm: Literal["group", "rms"],
        *,
        self_attention: bool,
        context_dim: int,
        context_norm: str = "layer",
        groups: int = 32,
    ) -> None:
        super().__init__()
        self.heads = max(1, channels // head_channels)
        self.self_attention = self_attention
        self.norm = norm2d(norm, channels, groups)
        self.q = nn.Linear(channels, channels)
        self.kv = nn.Linear(channels, 2 * channels) if self_attention else None
        self.norm_context = token_norm(context_norm, context_dim) if context_dim else None
        self.kv_context = nn.Linear(context_dim, 2 * channels) if context_dim else None
        self.out = zero_init(nn.Linear(channels, channels))

    def context_kv(self, context: Tensor) -> Tensor:
        """Keys and values of the conditioning tokens: B L D -> B L 2C."""
        assert self.norm_context is not None and self.kv_context is not None
        return self.kv_context(self.norm_context(context.to(self.kv_context.weight.dtype)))

    def forward(self, x: Tensor, context_kv: Tensor | None, mask: Tensor | None) -> Tensor:
        """x: B C H W; context_kv: B L 2C; mask: B L, True at tokens that may be attended to."""
        height, width = x.shape[-2:]
        h = rearrange(self.norm(x), "b c h w -> b (h w) c")
        q = self.q(h)
        parts = []
        if context_kv is not None:
            parts.append(context_kv.to(q.dtype))
        if self.kv is not None:
            parts.append(self.kv(h))
        k, v = (torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]).chunk(2, dim=-1)
        attend = None
        if mask is not None and context_kv is not None:
            pixels = height * width if self.kv is not None else 0  # they come after the tokens
            attend = extend_mask(mask, after=pixels)[:, None, None, :]  # B 1 1 L
        h = F.scaled_dot_product_attention(
            *(split_heads(part, self.heads) for part in (q, k, v)), attn_mask=attend
        )
        h = self.out(rearrange(h, "b heads n d -> b n (heads d)"))
        return x + rearrange(h, "b (h w) c -> b c h w", h=height)


class LastToken(nn.Module):
    """The state of the last place, B L D -> B D: how GLIDE pools its transformer's output."""

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        return tokens[:, -1]


class AttentionPool(nn.Module):
    """Tokens to one vector: a class token (their mean plus a learned offset) attends to itself and to them.

    B L D -> B D. As DeepFloyd IF pools T5; masked tokens enter neither the mean nor the attention.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.position = nn.Parameter(torch.randn(1, dim).div_(dim**0.5))
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim)
        self.v = nn.Linear(dim, dim)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        weight = mask[..., None].to(tokens.dtype)  # B L 1
        mean = (tokens * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True).clamp(min=1)
        first = mean + self.position.to(tokens.dtype)  # B 1 D
        states = torch.cat([first, tokens], dim=1)
        attend = extend_mask(mask, before=1)[:, None, None, :]
        q = split_heads(self.q(first), self.heads)
        k, v = (split_heads(project(states), self.heads) for project in (self.k, self.v))
        pooled = F.scaled_dot_product_attention(q, k, v, attn_mask=attend)  # B h 1 d
        return pooled.flatten(1)
