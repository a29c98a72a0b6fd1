"""One U-Net for every stage: the Imagen / ADM base and both Efficient U-Net super-resolution stages.

A level is a resolution. The two layouts differ in where they resample and what they keep for the decoder:
"efficient" convolves down before a level's blocks and up after them and keeps one skip a level (Imagen B.1);
"adm" resamples in residual blocks after a level's blocks and keeps every block's output (arXiv:2105.05233).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cascade.conditioning import Conditioning
from cascade.config import UNetConfig
from cascade.errors import InputError
from cascade.nn.attention import Attention2d
from cascade.nn.condition import ConditionEncoder, context_width
from cascade.nn.layers import LevelEmbedding, ResBlock, Upsample, activation, norm2d, zero_init

Block = Callable[..., ResBlock]


@dataclass(frozen=True)
class Context:
    """A `Conditioning` as the blocks consume it, made once a prompt by `UNet.prepare`."""

    vector: Tensor | None  # B E, added to the time embedding
    kv: tuple[Tensor, ...]  # B L 2C for each attention that sees tokens, in order of use
    mask: Tensor | None  # B L bool
    lowres: Tensor | None  # B 3 H W

    @staticmethod
    def cat(parts: list[Context]) -> Context:
        """Concatenate along the batch; shorter token sequences are padded with masked tokens."""
        length = max((p.mask.shape[1] for p in parts if p.mask is not None), default=0)
        padded = [p._pad(length) for p in parts]
        kv = tuple(torch.cat(same) for same in zip(*(p.kv for p in padded), strict=True))
        vector, mask, lowres = (_cat([getattr(p, f) for p in padded]) for f in ("vector", "mask", "lowres"))
        return Context(vector, kv, mask, lowres)

    def _pad(self, length: int) -> Context:
        if self.mask is None or self.mask.shape[1] == length:
            return self
        extra = length - self.mask.shape[1]
        kv = tuple(F.pad(t, (0, 0, 0, extra)) for t in self.kv)
        return Context(self.vector, kv, F.pad(self.mask, (0, extra)), self.lowres)


def _cat(parts: list[Tensor | None]) -> Tensor | None:
    present = [p for p in parts if p is not None]
    return torch.cat(present) if present else None


class Level(nn.Module):
    """Residual blocks of one resolution with their attention, and the resampling before or after them."""

    def __init__(self, blocks: Sequence[ResBlock], attentions: Sequence[Attention2d | None]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.attentions = nn.ModuleList(a if a is not None else nn.Identity() for a in attentions)
        self.resample: nn.Module | None = None


class UNet(nn.Module):
    """x (B in H W), noise level (B, in [0, 1000]) and conditions to a prediction (B out H W).

    H and W must be multiples of `size_multiple`. Raises InputError for a configuration whose tuples differ in
    length or that attends to tokens it does not have.
    """

    def __init__(self, cfg: UNetConfig) -> None:
        super().__init__()
        check(cfg)
        self.cfg = cfg
        self.gradient_checkpointing = False
        self.efficient = cfg.layout == "efficient"
        self.size_multiple = cfg.patch * math.prod(cfg.strides)
        channels = cfg.channels
        emb_dim = cfg.time_dim or 4 * channels[0]
        block = partial(
            ResBlock,
            emb_dim=emb_dim,
            norm=cfg.norm,
            act=cfg.act,
            dropout=cfg.dropout,
            scale=cfg.residual_scale,
        )
        self.time = LevelEmbedding(channels[0], emb_dim, cfg.act)
        self.condition = ConditionEncoder(cfg, emb_dim)
        self.emb_act = activation(cfg.act)
        in_channels = (cfg.in_channels + cfg.lowres_channels) * cfg.patch**2
        self.stem = nn.Conv2d(in_channels, channels[0], 3, padding=1)
        self.positions = nn.ParameterList(position_maps(cfg))
        if self.efficient:
            self.down, self.middle, self.up = self._efficient(block)
        else:
            self.down, self.middle, self.up = self._adm(block)
        self.norm_out = norm2d(cfg.norm, channels[0])
        self.conv_out = zero_init(nn.Conv2d(channels[0], cfg.out_channels * cfg.patch**2, 3, padding=1))
        # In order of use: prepare() makes their keys and values, forward() hands them out.
        self.token_attentions = [m for m in self._in_order() if m.kv_context is not None]

    # -- layouts ---------------------------------------------------------------------------------------------

    def _attention(self, level: int) -> Attention2d | None:
        cfg = self.cfg
        own, text = cfg.self_attention[level], cfg.text_attention[level]
        if not own and not text:
            return None
        context = context_width(cfg) if text else 0
        return Attention2d(
            cfg.channels[level], cfg.head_channels, cfg.norm, self_attention=own, context_dim=context
        )

    def _efficient(self, block: Block) -> tuple[nn.ModuleList, None, nn.ModuleList]:
        cfg, last = self.cfg, len(self.cfg.channels) - 1
        down, up = nn.ModuleList(), nn.ModuleList()
        previous = cfg.channels[0]
        for i, (c, n, stride) in enumerate(zip(cfg.channels, cfg.blocks, cfg.strides, strict=True)):
            level = Level([block(c, c) for _ in range(n)], [None] * (n - 1) + [self._attention(i)])
            if stride > 1 or c != previous:
                level.resample = nn.Conv2d(previous, c, 3, stride=stride, padding=1)
            down.append(level)
            width = c if i == last else 2 * c  # the deepest level merges with no decoder below
            blocks = [block(width, c), *(block(c, c) for _ in range(n - 1))]
            level = Level(blocks, [None] * (n - 1) + [self._attention(i)])
            if stride > 1:
                level.resample = Upsample(c, previous, stride)
            elif c != previous:
                level.resample = nn.Conv2d(c, previous, 3, padding=1)
            up.insert(0, level)
            previous = c
        return down, None, up

    def _adm(self, block: Block) -> tuple[nn.ModuleList, Level, nn.ModuleList]:
        cfg, last = self.cfg, len(self.cfg.channels) - 1
        down, up = nn.ModuleList(), nn.ModuleList()
        skips, c_in = [cfg.channels[0]], cfg.channels[0]
        for i, (c, n) in enumerate(zip(cfg.channels, cfg.blocks, strict=True)):
            blocks = [block(c_in if j == 0 else c, c) for j in range(n)]
            level = Level(blocks, [self._attention(i) for _ in range(n)])
            skips += [c] * n
            if i < last:
                level.resample = block(c, c, resample="down")
                skips.append(c)
            down.append(level)
            c_in = c
        middle = Level([block(c_in, c_in), block(c_in, c_in)], [self._attention(last), None])
        for i in reversed(range(last + 1)):
            c, n = cfg.channels[i], cfg.blocks[i] + 1
            blocks = [block((c_in if j == 0 else c) + skips.pop(), c) for j in range(n)]
            level = Level(blocks, [self._attention(i) for _ in range(n)])
            if i > 0:
                level.resample = block(c, c, resample="up")
            up.append(level)
            c_in = c
        return down, middle, up

    def _in_order(self) -> list[Attention2d]:
        levels = [*self.down, *([self.middle] if self.middle is not None else []), *self.up]
        return [m for level in levels for m in level.attentions if isinstance(m, Attention2d)]

    # -- forward ---------------------------------------------------------------------------------------------

    def prepare(self, cond: Conditioning, batch: int) -> Context:
        """Project the conditions and make every attention's token keys and values, once for all steps."""
        context, mask, vector = self.condition(cond, batch)
        kv = tuple(m.context_kv(context) for m in self.token_attentions)
        return Context(vector, kv, mask if kv else None, cond.lowres)

    def forward(self, x: Tensor, time: Tensor, cond: Conditioning | Context) -> Tensor:
        context = cond if isinstance(cond, Context) else self.prepare(cond, x.shape[0])
        if self.cfg.lowres_channels:
            if context.lowres is None:
                raise InputError("a super-resolution network needs lowres, got none")
            x = torch.cat([x, context.lowres.to(x.dtype)], dim=1)
        emb = self.time(time)
        if context.vector is not None:
            emb = emb + context.vector
        emb = self.emb_act(emb)  # B E
        tokens = iter(context.kv)

        h = self.stem(F.pixel_unshuffle(x, self.cfg.patch) if self.cfg.patch > 1 else x)
        skips = [] if self.efficient else [h]
        for i, level in enumerate(cast(Sequence[Level], self.down)):
            if self.efficient and level.resample is not None:
                h = level.resample(h)
            if self.positions:
                h = h + resized(self.positions[i], h).to(h.dtype)
            for block, attention in zip(level.blocks, level.attentions, strict=True):
                h = self._attend(attention, self._run(block, h, emb), tokens, context.mask)
                if not self.efficient:
                    skips.append(h)
            if self.efficient:
                skips.append(h)
            elif level.resample is not None:
                h = self._run(level.resample, h, emb)
                skips.append(h)

        if self.middle is not None:
            for block, attention in zip(self.middle.blocks, self.middle.attentions, strict=True):
                h = self._attend(attention, self._run(block, h, emb), tokens, context.mask)
        elif self.efficient:
            skips.pop()  # the deepest level's output is h itself

        for i, level in enumerate(cast(Sequence[Level], self.up)):
            for j, (block, attention) in enumerate(zip(level.blocks, level.attentions, strict=True)):
                if not self.efficient or (j == 0 and i > 0):
                    h = torch.cat([h, skips.pop() * self.cfg.skip_scale], dim=1)
                h = self._attend(attention, self._run(block, h, emb), tokens, context.mask)
            if level.resample is not None:
                h = level.resample(h) if self.efficient else self._run(level.resample, h, emb)

        h = self.conv_out(self.emb_act(self.norm_out(h)))
        return F.pixel_shuffle(h, self.cfg.patch) if self.cfg.patch > 1 else h

    def _run(self, block: nn.Module, h: Tensor, emb: Tensor) -> Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, h, emb, use_reentrant=False)
        return block(h, emb)

    @staticmethod
    def _attend(attention: nn.Module, h: Tensor, tokens, mask: Tensor | None) -> Tensor:
        if not isinstance(attention, Attention2d):
            return h
        return attention(h, next(tokens) if attention.kv_context is not None else None, mask)


def position_maps(cfg: UNetConfig) -> list[nn.Parameter]:
    """Learned maps 1 C n n added at the start of each level. A network of few steps of training learns where
    things belong much sooner with them than from the zero padding of its convolutions."""
    if not cfg.position_grid:
        return []
    side, maps = cfg.position_grid * cfg.strides[0], []
    # An adm level starts at the width of the level before it, from whose resampling block it comes.
    widths = cfg.channels if cfg.layout == "efficient" else (cfg.channels[0], *cfg.channels[:-1])
    for channels, stride in zip(widths, cfg.strides, strict=True):
        side //= stride
        maps.append(nn.Parameter(torch.zeros(1, channels, side, side)))
    return maps


def resized(position: Tensor, like: Tensor) -> Tensor:
    """A position map at the size of `like` (B C H W): pictures of other sizes than in training stretch it."""
    if position.shape[-2:] == like.shape[-2:]:
        return position
    return F.interpolate(position.float(), like.shape[-2:], mode="bilinear", antialias=True)


def check(cfg: UNetConfig) -> None:
    """Refuse an inconsistent configuration with one line."""
    levels = len(cfg.channels)
    if levels == 0:
        raise InputError("unet.channels is empty: expected one width a level")
    for name in ("blocks", "strides", "self_attention", "text_attention"):
        if len(getattr(cfg, name)) != levels:
            raise InputError(f"unet.{name} has {len(getattr(cfg, name))} entries, channels has {levels}")
    if any(cfg.text_attention) and not context_width(cfg):
        raise InputError("unet.text_attention is set, but there are neither text_dims nor image_embed_dim")
    if cfg.layout == "adm" and cfg.strides != (1, *[2] * (levels - 1)):
        raise InputError(f"unet.strides {cfg.strides}: the adm layout needs {(1, *[2] * (levels - 1))}")
    for name in ("channels", "blocks", "strides"):
        if min(getattr(cfg, name)) < 1:
            raise InputError(f"unet.{name} {getattr(cfg, name)}: expected positive integers")
    for name in ("patch", "head_channels", "pool_heads", "image_tokens"):
        if getattr(cfg, name) < 1:
            raise InputError(f"unet.{name} {getattr(cfg, name)}: expected a positive integer")
    grid, least = cfg.position_grid, math.prod(cfg.strides[1:])
    if grid < 0 or grid % least:
        raise InputError(
            f"unet.position_grid {grid}: expected 0 or a multiple of {least}, as the strides are"
        )
    if cfg.channels[0] % 2:
        raise InputError(f"unet.channels starts with {cfg.channels[0]}: the time embedding needs it even")
    for i, c in enumerate(cfg.channels):
        if (cfg.self_attention[i] or cfg.text_attention[i]) and c % max(1, c // cfg.head_channels):
            raise InputError(f"unet.head_channels {cfg.head_channels} does not divide level {i}'s width {c}")
    if cfg.pool_projected and not cfg.context_dim:
        raise InputError("unet.pool_projected is set, but there is no context_dim to project the tokens to")
    for dim in (cfg.context_dim or 0,) if cfg.pool_projected else cfg.text_dims:
        if dim % cfg.pool_heads:
            raise InputError(f"unet.pool_heads {cfg.pool_heads} does not divide the pooled text width {dim}")
