"""What a `UNetConfig` must fulfil."""

from __future__ import annotations

import math

from cascade.config import UNetConfig
from cascade.errors import InputError
from cascade.nn.condition import attends_to_tokens, context_width, middle_attention
from cascade.nn.guess import COARSE


def check(cfg: UNetConfig) -> None:
    """Refuse an inconsistent configuration with one line."""
    levels = len(cfg.channels)
    if levels == 0:
        raise InputError("unet.channels is empty: expected one width a level")
    for name in ("blocks", "strides", "self_attention", "text_attention"):
        if len(getattr(cfg, name)) != levels:
            raise InputError(f"unet.{name} has {len(getattr(cfg, name))} entries, channels has {levels}")
    if attends_to_tokens(cfg) and not context_width(cfg):
        raise InputError("unet.text_attention is set, but there are neither text_dims nor image_embed_dim")
    if cfg.layout == "adm" and cfg.strides != (1, *[2] * (levels - 1)):
        raise InputError(f"unet.strides {cfg.strides}: the adm layout needs {(1, *[2] * (levels - 1))}")
    for name in ("channels", "blocks", "strides"):
        if min(getattr(cfg, name)) < 1:
            raise InputError(f"unet.{name} {getattr(cfg, name)}: expected positive integers")
    for name in ("patch", "pool_heads", "norm_groups", "stem_kernel"):
        if getattr(cfg, name) < 1:
            raise InputError(f"unet.{name} {getattr(cfg, name)}: expected a positive integer")
    for name in ("image_tokens", "middle_blocks", "inpaint_channels"):
        if getattr(cfg, name) < 0:
            raise InputError(f"unet.{name} {getattr(cfg, name)}: expected 0 or a positive integer")
    if cfg.stem_kernel % 2 == 0:
        raise InputError(f"unet.stem_kernel {cfg.stem_kernel}: expected an odd number")
    grid, least = cfg.position_grid, math.prod(cfg.strides[1:])
    if grid < 0 or grid % least:
        raise InputError(
            f"unet.position_grid {grid}: expected 0 or a multiple of {least}, as the strides are"
        )
    if cfg.guess_width < 0 or (cfg.guess_width and (not grid or grid % COARSE or cfg.text_transformer)):
        expected = f"0, or with a position_grid that {COARSE} divides a positive number of channels"
        raise InputError(f"unet.guess_width {cfg.guess_width}: expected {expected}")
    if cfg.fine_channels:
        _check_fine(cfg)
    if cfg.channels[0] % 2:
        raise InputError(f"unet.channels starts with {cfg.channels[0]}: the time embedding needs it even")
    _check_attention(cfg)
    _check_text(cfg)


def _check_fine(cfg: UNetConfig) -> None:
    widths, size = cfg.fine_channels, cfg.patch * math.prod(cfg.strides)
    if min(widths) < 1 or widths[0] % 2:
        raise InputError(f"unet.fine_channels {widths}: expected positive numbers, the first of them even")
    if size % 2 ** len(widths):  # it learns on halves of the sides
        most = int(math.log2(size & -size))
        raise InputError(
            f"unet.fine_channels has {len(widths)} levels: sides of {size} px times any number allow {most}"
        )
    if cfg.lowres_channels or cfg.in_channels != cfg.out_channels:
        raise InputError("unet.fine_channels: expected a base network, without learned variance")


def head_width(cfg: UNetConfig, level: int) -> int:
    """Width of a level's attention heads."""
    return cfg.head_channels if isinstance(cfg.head_channels, int) else cfg.head_channels[level]


def _check_attention(cfg: UNetConfig) -> None:
    levels, heads = len(cfg.channels), cfg.head_channels
    if isinstance(heads, tuple) and len(heads) != levels:
        raise InputError(f"unet.head_channels has {len(heads)} entries, channels has {levels}")
    if min((heads,) if isinstance(heads, int) else heads) < 1:
        raise InputError(f"unet.head_channels {heads}: expected a positive integer")
    attends = [own or text for own, text in zip(cfg.self_attention, cfg.text_attention, strict=True)]
    attends[-1] = attends[-1] or any(middle_attention(cfg))
    for i, c in enumerate(cfg.channels):
        if attends[i] and c % max(1, c // head_width(cfg, i)):
            raise InputError(f"unet.head_channels {head_width(cfg, i)} does not divide level {i}'s width {c}")
    if cfg.layout == "efficient" and (cfg.middle_attention is not None or cfg.middle_blocks != 2):
        raise InputError("unet.middle_blocks, middle_attention: the efficient layout has no middle")
    if cfg.middle_attention is not None and any(cfg.middle_attention) and cfg.middle_blocks == 0:
        raise InputError("unet.middle_attention is set, but middle_blocks is 0")


def _check_text(cfg: UNetConfig) -> None:
    transformer = cfg.text_transformer
    if transformer is not None and cfg.text_dims != (1,):
        raise InputError(
            f"unet.text_dims {cfg.text_dims}: with a text_transformer expected (1,), its token ids"
        )
    if transformer is not None and transformer.width % transformer.heads:
        raise InputError(
            f"unet.text_transformer.heads {transformer.heads} does not divide its width {transformer.width}"
        )
    if cfg.learned_null and not cfg.text_masked and cfg.text_dims:
        raise InputError("unet.learned_null needs text_masked: a null is one token among masked ones")
    if cfg.pool_projected and not cfg.context_dim:
        raise InputError("unet.pool_projected is set, but there is no context_dim to project the tokens to")
    if cfg.text_pool != "attention":
        return
    widths = (transformer.width,) if transformer else cfg.text_dims
    for dim in (cfg.context_dim or 0,) if cfg.pool_projected else widths:
        if dim % cfg.pool_heads:
            raise InputError(f"unet.pool_heads {cfg.pool_heads} does not divide the pooled text width {dim}")
