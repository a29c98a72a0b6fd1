"""From a `Conditioning` to what the U-Net's blocks consume: tokens and one vector, with learned nulls."""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor, nn

from cascade.conditioning import Conditioning, TextEmbedding, Tokens
from cascade.config import UNetConfig
from cascade.errors import InputError
from cascade.nn.attention import AttentionPool, LastToken
from cascade.nn.layers import MLP, LevelEmbedding, zero_init
from cascade.nn.transformer import TextTransformer


class TextInput(nn.Module):
    """One token sequence to context tokens (B L C) and a pooled vector (B E, or None). The pooled path is
    LayerNorm, attention pooling, Linear, LayerNorm (DeepFloyd IF; Imagen 2.5), or a Linear of the last."""

    def __init__(self, dim: int, cfg: UNetConfig, emb_dim: int) -> None:
        super().__init__()
        self.transformer = TextTransformer(cfg.text_transformer) if cfg.text_transformer else None
        if cfg.text_transformer:
            dim = cfg.text_transformer.width
        used = attends_to_tokens(cfg) or cfg.pool_projected
        context = cfg.context_dim if cfg.context_dim and used else dim
        self.project = nn.Linear(dim, context) if cfg.context_dim and used else nn.Identity()
        self.norm = nn.LayerNorm(context) if cfg.context_norm == "projected" else nn.Identity()
        self.masked, self.pool_projected = cfg.text_masked, cfg.pool_projected
        pool_dim = context if cfg.pool_projected else dim
        self.pool = None
        if cfg.text_pool != "none":
            attention = cfg.text_pool == "attention"
            self.pool_norm = nn.LayerNorm(pool_dim) if attention else nn.Identity()
            self.pool = AttentionPool(pool_dim, cfg.pool_heads) if attention else LastToken()
            self.pool_project = nn.Linear(pool_dim, emb_dim)
            self.pool_out_norm = nn.LayerNorm(emb_dim) if attention else nn.Identity()
        self.learned_null = cfg.learned_null
        if cfg.learned_null:
            self.null_token = nn.Parameter(
                torch.randn(context).mul_(0.02), requires_grad=attends_to_tokens(cfg)
            )
            if self.pool is not None:
                self.null_pooled = nn.Parameter(torch.zeros(emb_dim))

    def forward(self, tokens: Tokens, keep: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        states = tokens.states
        if self.transformer is not None:
            states = self.transformer(states[..., 0], tokens.mask)  # ids B L 1 -> B L D
        first = next(self.parameters(), None)
        states = states if first is None else states.to(first.dtype)
        mask = tokens.mask if self.masked else torch.ones_like(tokens.mask)
        context = self.norm(self.project(states))  # B L C
        pooled = self._pool(context if self.pool_projected else states, mask)
        if keep is not None:
            self._need_null()
            context = torch.where(keep[:, None, None], context, self.null_token.to(context.dtype))
            if pooled is not None:
                pooled = torch.where(keep[:, None], pooled, self.null_pooled.to(pooled.dtype))
            first = torch.zeros_like(mask)
            first[:, 0] = True  # a dropped sequence is one null token
            mask = torch.where(keep[:, None], mask, first)
        return context, mask, pooled

    def null(self, batch: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """The learned null for a whole batch: one token, one vector."""
        self._need_null()
        context = self.null_token.expand(batch, 1, -1)
        pooled = None if self.pool is None else self.null_pooled.expand(batch, -1)
        return context, context.new_ones(batch, 1, dtype=torch.bool), pooled

    def _pool(self, states: Tensor, mask: Tensor) -> Tensor | None:
        if self.pool is None:
            return None
        return self.pool_out_norm(self.pool_project(self.pool(self.pool_norm(states), mask)))

    def _need_null(self) -> None:
        if not self.learned_null:
            raise InputError("this network has no learned null text: give the encoded empty prompt instead")


class TextEmbedInput(nn.Module):
    """CLIP text embedding to a vector, B D -> B E; a dropped text adds nothing."""

    def __init__(self, dim: int, emb_dim: int) -> None:
        super().__init__()
        self.to_vector = nn.Linear(dim, emb_dim)

    def forward(self, text: TextEmbedding, keep: Tensor | None) -> Tensor:
        if text.pooled is None:
            raise InputError("this network takes the CLIP text embedding, the text was encoded without one")
        vector = self.to_vector(text.pooled.to(self.to_vector.weight.dtype))
        return vector if keep is None else vector * keep[:, None]


class ImageEmbedInput(nn.Module):
    """CLIP image embedding to extra tokens and a vector added to the time embedding (unCLIP 2.1)."""

    def __init__(self, cfg: UNetConfig, emb_dim: int) -> None:
        super().__init__()
        dim, context_dim = cfg.image_embed_dim or 0, context_width(cfg)
        self.dim, self.tokens, self.scale = dim, cfg.image_tokens, cfg.image_embed_scale
        seen = context_dim and cfg.image_tokens
        self.to_tokens = nn.Linear(dim, cfg.image_tokens * context_dim) if seen else None
        linear = cfg.image_vector == "linear"
        self.to_vector = nn.Linear(dim, emb_dim) if linear else MLP(dim, emb_dim, "silu")
        self.null = nn.Parameter(torch.zeros(dim)) if cfg.image_null else None

    def forward(self, embed: Tensor | None, keep: Tensor | None, batch: int) -> tuple[Tensor | None, Tensor]:
        """embed: B D; None stands for the null, as do rows that are not kept."""
        null = self.null if self.null is not None else next(self.parameters()).new_zeros(self.dim)
        if embed is None:
            embed = null.expand(batch, -1)
        else:
            embed = embed.to(null.dtype) * self.scale
            if keep is not None:
                embed = torch.where(keep[:, None], embed, null)
        tokens = None if self.to_tokens is None else self.to_tokens(embed).unflatten(-1, (self.tokens, -1))
        return tokens, self.to_vector(embed)  # B T C, B E


class ConditionEncoder(nn.Module):
    """All of a stage's conditions to (context B L C, mask B L, vector B E)."""

    def __init__(self, cfg: UNetConfig, emb_dim: int) -> None:
        super().__init__()
        self.sees_tokens, self.masked = attends_to_tokens(cfg), cfg.text_masked
        self.text = nn.ModuleList(TextInput(dim, cfg, emb_dim) for dim in cfg.text_dims)
        self.image = ImageEmbedInput(cfg, emb_dim) if cfg.image_embed_dim else None
        told = cfg.lowres_channels and cfg.aug_embedding
        self.aug = LevelEmbedding(cfg.channels[0], emb_dim, cfg.act) if told else None
        if self.aug is not None:
            zero_init(self.aug.linear_2)
        self.text_embed = TextEmbedInput(cfg.text_embed_dim, emb_dim) if cfg.text_embed_dim else None

    def forward(self, cond: Conditioning, batch: int) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """What there is none of is None; a mask of None means that every token is attended to."""
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
            contexts.append(context)
            masks.append(mask)
        if self.text_embed is not None and cond.text is not None:
            keep = None if cond.text_keep is None else cond.text_keep[:, 0]
            vectors.append(self.text_embed(cond.text, keep))
        if self.image is not None:
            context, vector = self.image(cond.image_embed, cond.image_keep, batch)
            vectors.append(vector)
            if context is not None:
                contexts.append(context)
                masks.append(torch.ones(context.shape[:2], dtype=torch.bool, device=context.device))
        if self.aug is not None:
            if cond.aug_level is None:
                raise InputError("a super-resolution network needs aug_level, got none")
            vectors.append(self.aug(1000 * cond.aug_level))
        vectors = [vector for vector in vectors if vector is not None]
        context = torch.cat(contexts, dim=1) if contexts and self.sees_tokens else None
        mask = torch.cat(masks, dim=1) if context is not None and self.masked else None
        return context, mask, reduce(torch.add, vectors) if vectors else None


def middle_attention(cfg: UNetConfig) -> tuple[bool, bool]:
    """Whether the middle of the adm layout attends to itself, and to tokens."""
    if cfg.layout == "efficient" or cfg.middle_blocks == 0:
        return False, False
    return cfg.middle_attention or (cfg.self_attention[-1], cfg.text_attention[-1])


def attends_to_tokens(cfg: UNetConfig) -> bool:
    return any(cfg.text_attention) or middle_attention(cfg)[1]


def context_width(cfg: UNetConfig) -> int:
    """Width of the conditioning tokens; 0 where no level attends to any."""
    if not attends_to_tokens(cfg):
        return 0
    if cfg.context_dim and (cfg.text_dims or cfg.image_embed_dim):
        return cfg.context_dim
    widths = {cfg.text_transformer.width} if cfg.text_transformer else set(cfg.text_dims)
    if len(widths) > 1:
        raise InputError(f"text_dims {cfg.text_dims} differ: set context_dim, the width to project them to")
    if widths:
        return widths.pop()
    return cfg.channels[-1] if cfg.image_embed_dim else 0
