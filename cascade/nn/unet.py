"""One U-Net for every stage: the Imagen / ADM base and both Efficient U-Net super-resolution stages.

A level is a resolution. The two layouts differ in where they resample and what they keep for the decoder:
"efficient" convolves down before a level's blocks and up after them and keeps one skip a level (Imagen B.1);
"adm" resamples in residual blocks after a level's blocks and keeps every block's output (arXiv:2105.05233).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
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
from cascade.nn.check import check, head_width
from cascade.nn.condition import ConditionEncoder, context_width, middle_attention
from cascade.nn.context import Context
from cascade.nn.fine import Fine, fine_config
from cascade.nn.guess import Guess
from cascade.nn.layers import LevelEmbedding, ResBlock, Upsample, activation, norm2d, zero_init

Block = Callable[..., ResBlock]


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
            groups=cfg.norm_groups,
            modulation=cfg.modulation,
        )
        self.time = LevelEmbedding(channels[0], emb_dim, cfg.act)
        self.condition = ConditionEncoder(cfg, emb_dim)
        self.emb_act = activation(cfg.act)
        self.guess = Guess(cfg) if cfg.guess_width else None
        guessed = cfg.in_channels if cfg.guess_width else 0
        in_channels = cfg.in_channels + cfg.inpaint_channels + cfg.lowres_channels + guessed
        kernel = cfg.stem_kernel
        self.stem = nn.Conv2d(in_channels * cfg.patch**2, channels[0], kernel, padding=kernel // 2)
        self.positions = nn.ParameterList(position_maps(cfg))
        if self.efficient:
            self.down, self.middle, self.up = self._efficient(block)
        else:
            self.down, self.middle, self.up = self._adm(block)
        self.norm_out = norm2d(cfg.norm, channels[0], cfg.norm_groups)
        self.conv_out = zero_init(nn.Conv2d(channels[0], cfg.out_channels * cfg.patch**2, 3, padding=1))
        self.fine = Fine(UNet(fine_config(cfg))) if cfg.fine_channels else None
        # In order of use: prepare() makes their keys and values, forward() hands them out.
        self.token_attentions = [m for m in self._in_order() if m.kv_context is not None]

    # -- layouts ---------------------------------------------------------------------------------------------

    def _attention(self, level: int, sees: tuple[bool, bool] | None = None) -> Attention2d | None:
        """One attention of a level; `sees`: itself, tokens (default: as the level is configured)."""
        cfg = self.cfg
        own, text = sees or (cfg.self_attention[level], cfg.text_attention[level])
        if not own and not text:
            return None
        return Attention2d(
            cfg.channels[level],
            head_width(cfg, level),
            cfg.norm,
            self_attention=own,
            context_dim=context_width(cfg) if text else 0,
            context_norm=cfg.context_norm,
            groups=cfg.norm_groups,
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

    def _adm(self, block: Block) -> tuple[nn.ModuleList, Level | None, nn.ModuleList]:
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
        middle, n = None, cfg.middle_blocks
        if n > 0:
            blocks = [block(c_in, c_in) for _ in range(n)]
            middle = Level(blocks, [self._attention(last, middle_attention(cfg))] + [None] * (n - 1))
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
        guess = None
        if self.guess is not None:
            with torch.no_grad():  # it learns from its own loss alone
                guess = self.guess(cond, batch)
        return Context(vector, kv, mask if kv else None, cond.lowres, cond.inpaint, guess)

    def forward(self, x: Tensor, time: Tensor, cond: Conditioning | Context) -> Tensor:
        context = cond if isinstance(cond, Context) else self.prepare(cond, x.shape[0])
        x = self._with_pictures(x, context)
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
                    skip, scale = skips.pop(), self.cfg.skip_scale
                    h = torch.cat([h, skip if scale == 1.0 else skip * scale], dim=1)
                h = self._attend(attention, self._run(block, h, emb), tokens, context.mask)
            if level.resample is not None:
                h = level.resample(h) if self.efficient else self._run(level.resample, h, emb)

        out = self.conv_out(self.emb_act(self.norm_out(h)))
        return F.pixel_shuffle(out, self.cfg.patch) if self.cfg.patch > 1 else out

    def _with_pictures(self, x: Tensor, context: Context) -> Tensor:
        """x and the pictures that are concatenated to it. Without an inpainting mask nothing is known."""
        parts = [x]
        if self.cfg.inpaint_channels:
            known = context.inpaint
            size = (x.shape[0], self.cfg.inpaint_channels, *x.shape[2:])
            parts.append(x.new_zeros(size) if known is None else known.to(x.dtype))
        if self.cfg.lowres_channels:
            if context.lowres is None:
                raise InputError("a super-resolution network needs lowres, got none")
            parts.append(context.lowres.to(x.dtype))
        if context.guess is not None:
            parts.append(resized(context.guess, x).to(x.dtype))
        return torch.cat(parts, dim=1) if len(parts) > 1 else x

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
    """A position map or guess at the size of `like` (B C H W): other sizes than in training stretch it."""
    if position.shape[-2:] == like.shape[-2:]:
        return position
    return F.interpolate(position.float(), like.shape[-2:], mode="bilinear", antialias=True)
