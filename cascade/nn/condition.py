"""From a `Conditioning` to what the U-Net's blocks consume: tokens and one vector, with learned nulls."""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor, nn

from cascade.conditioning import Conditioning, Tokens
from cascade.config import UNetConfig
from cascade.errors import InputError
from cascade.nn.attention import AttentionPool
from cascade.nn.layers import LevelEmbedding, zero_init


class TextInput(nn.Module):
    """One token sequence to context tokens (B L C) and a pooled vector (B E). The pooled path is
    LayerNorm, attention pooling, Linear, LayerNorm (DeepFloyd IF; Imagen 2.5)."""

    def __init__(self, dim: int, cfg: UNetConfig, emb_dim: int) -> None:
        super().__init__()
        used = any(cfg.text_attention) or cfg.pool_projected
        context = cfg.context_dim if cfg.context_dim and used else dim
        self.project = nn.Linear(dim, context) if cfg.context_dim and used else nn.Identity()
        self.pool_projected = cfg.pool_projected
        pool_dim = context if cfg.pool_projected else dim
        self.pool_norm = nn.LayerNorm(pool_dim)
        self.pool = AttentionPool(pool_dim, cfg.pool_heads)
        self.pool_project = nn.Linear(pool_dim, emb_dim)
        self.pool_out_norm = nn.LayerNorm(emb_dim)
        self.learned_null = cfg.learned_null
        if cfg.learned_null:
            self.null_token = nn.Parameter(torch.randn(context) * 0.02, requires_grad=any(cfg.text_attention))
            self.null_pooled = nn.Parameter(torch.zeros(emb_dim))

    def forward(self, tokens: Tokens, keep: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        states = tokens.states.to(self.pool_norm.weight.dtype)
        context = self.project(states)  # B L C
        pool_in = self.pool_norm(context if self.pool_projected else states)
        pooled = self.pool_out_norm(self.pool_project(self.pool(pool_in, tokens.mask)))
        mask = tokens.mask
        if keep is not None:
            self._need_null()
            context = torch.where(keep[:, None, None], context, self.null_token.to(context.dtype))
            pooled = torch.where(keep[:, None], pooled, self.null_pooled.to(pooled.dtype))
            first = torch.zeros_like(mask)
            first[:, 0] = True  # a dropped sequence is one null token
            mask = torch.where(keep[:, None], mask, first)
        return context, mask, pooled

    def null(self, batch: int) -> tuple[Tensor, Tensor, Tensor]:
        """The learned null for a whole batch: one token, one vector."""
        self._need_null()
        context = self.null_token.expand(batch, 1, -1)
        return context, context.new_ones(batch, 1, dtype=torch.bool), self.null_pooled.expand(batch, -1)

    def _need_null(self) -> None:
        if not self.learned_null:
            raise InputError("this network has no learned null text: give the encoded empty prompt instead")


class ImageEmbedInput(nn.Module):
    """CLIP image embedding to extra tokens and a vector added to the time embedding (unCLIP 2.1)."""

    def __init__(self, cfg: UNetConfig, emb_dim: int) -> None:
        super().__init__()
        dim, context_dim = cfg.image_embed_dim or 0, context_width(cfg)
        self.tokens, self.scale = cfg.image_tokens, cfg.image_embed_scale
        self.to_tokens = nn.Linear(dim, self.tokens * context_dim) if context_dim else None
        self.to_vector = nn.Linear(dim, emb_dim)
        self.null = nn.Parameter(torch.zeros(dim))

    def forward(self, embed: Tensor, keep: Tensor | None) -> tuple[Tensor | None, Tensor]:
        embed = embed.to(self.null.dtype) * self.scale
        if keep is not None:
            embed = torch.where(keep[:, None], embed, self.null)
        tokens = None if self.to_tokens is None else self.to_tokens(embed).unflatten(-1, (self.tokens, -1))
        return tokens, self.to_vector(embed)  # B T C, B E


class ConditionEncoder(nn.Module):
    """All of a stage's conditions to (context B L C, mask B L, vector B E)."""

    def __init__(self, cfg: UNetConfig, emb_dim: int) -> None:
        super().__init__()
        self.sees_tokens = any(cfg.text_attention)
        self.text = nn.ModuleList(TextInput(dim, cfg, emb_dim) for dim in cfg.text_dims)
        self.image = ImageEmbedInput(cfg, emb_dim) if cfg.image_embed_dim else None
        self.aug = LevelEmbedding(cfg.channels[0], emb_dim, cfg.act) if cfg.lowres_channels else None
        if self.aug is not None:
            zero_init(self.aug.linear_2)

    def forward(self, cond: Conditioning, batch: int) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        contexts, masks, vectors = [], [], []
        if cond.text is not None and len(cond.text.sequences) != len(self.text):
            raise InputError(f"expected {len(self.text)} token sequences, got {len(cond.text.sequences)}")
        for i, reader in enumerate(self.text):
            assert isinstance(reader, TextInput)
            if cond.text is None:
                context, mask, vector = reader.null(batch)
            else:
                keep = None if cond.text_keep is None else cond.text_keep[:, i]
                context, mask, vector = reader(cond.text.sequences[i], keep)
            vectors.append(vector)
            if self.sees_tokens:
                contexts.append(context)
                masks.append(mask)
        if self.image is not None:
            embed, keep = cond.image_embed, cond.image_keep
            if embed is None:
                embed = self.image.null.new_zeros(batch, self.image.null.shape[0])
                keep = torch.zeros(batch, dtype=torch.bool, device=embed.device)
            context, vector = self.image(embed, keep)
            vectors.append(vector)
            if context is not None:
                contexts.append(context)
                masks.append(torch.ones(context.shape[:2], dtype=torch.bool, device=context.device))
        if self.aug is not None:
            if cond.aug_level is None:
                raise InputError("a super-resolution network needs aug_level, got none")
            vectors.append(self.aug(1000 * cond.aug_level))
        context, mask = (torch.cat(parts, dim=1) if parts else None for parts in (contexts, masks))
        return context, mask, reduce(torch.add, vectors) if vectors else None


def context_width(cfg: UNetConfig) -> int:
    """Width of the conditioning tokens; 0 where no level attends to any."""
    if not any(cfg.text_attention):
        return 0
    if cfg.context_dim and (cfg.text_dims or cfg.image_embed_dim):
        return cfg.context_dim
    widths = set(cfg.text_dims)
    if len(widths) > 1:
        raise InputError(f"text_dims {cfg.text_dims} differ: set context_dim, the width to project them to")
    if widths:
        return widths.pop()
    return cfg.channels[-1] if cfg.image_embed_dim else 0
