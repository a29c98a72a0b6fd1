"""The configuration of a U-Net of the original repositories (DeepFloyd IF, Karlo, GLIDE), from its tensors.

Widths, depths, attention and conditions follow from names and shapes. What does not (activation, heads) is
in DeepFloyd IF's config.yml, whose other entries must agree with the tensors; Karlo and GLIDE keep such a
file in their code, and all of their networks have SiLU and heads of 64.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, takewhile
from typing import Any, Literal

from cascade.config import TextTransformerConfig, UNetConfig, from_dict
from cascade.errors import InputError
from cascade.pretrained.unet_tensors import Tensors, check_public

INPUTS = {3: (0, 0), 6: (3, 0), 7: (0, 4), 10: (3, 4)}  # in_channels -> low-resolution, inpainting channels


@dataclass(frozen=True, kw_only=True)
class FloydParams:
    """`params` of DeepFloyd IF's config.yml. Lists may be strings ("1,2,3,4")."""

    image_size: int | None = None
    in_channels: int
    out_channels: int
    model_channels: int
    channel_mult: str | tuple[int, ...]
    num_res_blocks: int | tuple[int, ...]
    attention_resolutions: Any = None  # this and the next: the tensors tell
    disable_self_attentions: Any = None
    activation: Literal["silu", "gelu", "gelu_jit"]
    encoder_dim: int
    encoder_channels: int
    att_pool_heads: int
    num_heads: int = 1
    num_head_channels: int = -1
    num_heads_upsample: int = -1
    use_scale_shift_norm: bool = False
    resblock_updown: Literal[True]
    efficient_activation: Any = False  # activates the embedding once instead of in every block: the same
    scale_skip_connection: bool = False
    dropout: float = 0.0
    conv_resample: Any = True  # of networks without resblock_updown
    dims: Literal[2] = 2
    num_classes: None = None
    precision: Any = "32"
    interpolate_mode: Any = "bilinear"  # of the low-resolution picture: the stage's matter
    low_res_diffusion: Any = None


def unet_from_original(
    tensors: Tensors, params: dict[str, Any] | None = None, *, head_channels: int = 64
) -> UNetConfig:
    """The network that holds `tensors` (names without a wrapper's prefix such as Karlo's "model.").

    params: those of DeepFloyd IF's config.yml, which its networks need. head_channels: of the attention of
    the others, and of GLIDE's text transformer. Raises InputError, one line, that names the first tensor or
    entry that does not fit."""
    if ("encoder_pooling.0.weight" in tensors) != (params is not None):
        raise InputError("config.yml: expected beside a network with encoder_pooling, and beside no other")
    levels = list(_levels(tensors))[::-1]
    middle, sees = _middle(tensors)
    fields: dict[str, Any] = dict(
        layout="adm",
        out_channels=_rows(tensors, "out.2.bias"),
        channels=tuple(level.channels for level in levels),
        blocks=tuple(level.blocks for level in levels),
        strides=(1, *[2] * (len(levels) - 1)),
        self_attention=tuple(level.sees[0] for level in levels),
        text_attention=tuple(level.sees[1] for level in levels),
        middle_blocks=middle,
        middle_attention=None if sees == levels[-1].sees else sees,
        head_channels=head_channels,
        time_dim=_rows(tensors, "time_embed.0.bias"),
        modulation=_modulation(tensors),
        learned_null=False,
        **_inputs(tensors),
        **_text(tensors, max(1, head_channels)),
    )
    if params is not None:
        fields |= _floyd(from_dict(FloydParams, params, "config.yml"), fields)
    cfg = UNetConfig(**fields)
    check_public(cfg)
    return cfg


@dataclass(frozen=True)
class _Level:
    channels: int
    blocks: int
    sees: tuple[bool, bool]  # attends to itself, to tokens


def _levels(tensors: Tensors) -> Iterator[_Level]:
    """From low to high resolution. The output blocks tell: each level ends in an upsampling block, a third
    module (a second without attention) that is a residual block, and has one block more than going down."""
    blocks, sees, channels = 0, (False, False), 0
    for i in takewhile(lambda i: f"output_blocks.{i}.0.in_layers.0.weight" in tensors, count()):
        block = f"output_blocks.{i}"
        channels, blocks = _rows(tensors, f"{block}.0.out_layers.3.bias"), blocks + 1
        sees = _sees(tensors, f"{block}.1")
        if any(f"{block}.{last}.conv.weight" in tensors for last in (1, 2)):
            raise InputError(
                f"{block} upsamples by a convolution: expected a residual block (resblock_updown)"
            )
        if any(f"{block}.{last}.in_layers.0.weight" in tensors for last in (1, 2)):
            yield _Level(channels, blocks - 1, sees)
            blocks = 0
    if blocks == 0:
        raise InputError(
            "missing tensor output_blocks.0.0.in_layers.0.weight: expected a guided-diffusion U-Net"
        )
    yield _Level(channels, blocks - 1, sees)


def _sees(tensors: Tensors, attention: str) -> tuple[bool, bool]:
    """Whether an attention is there, and attends to its own pixels (3 C rows: queries, keys, values; C rows
    are queries alone) and to tokens."""
    if f"{attention}.qkv.weight" not in tensors:
        return False, False
    rows, columns = tensors[f"{attention}.qkv.weight"].shape[:2]
    return rows == 3 * columns, f"{attention}.encoder_kv.weight" in tensors


def _middle(tensors: Tensors) -> tuple[int, tuple[bool, bool]]:
    names = {
        match[1] for name in tensors if (match := re.match(r"middle_block\.(\d+)\.in_layers\.0\.", name))
    }
    return len(names), _sees(tensors, "middle_block.1")


def _modulation(tensors: Tensors) -> str:
    block = "middle_block.0"
    rows = _rows(tensors, f"{block}.emb_layers.1.bias")
    return "scale_shift" if rows == 2 * _rows(tensors, f"{block}.out_layers.0.bias") else "shift"


def _inputs(tensors: Tensors) -> dict[str, Any]:
    shape = _shape(tensors, "input_blocks.0.0.weight", 4)
    if shape[1] not in INPUTS:
        raise InputError(
            f"input_blocks.0.0.weight: {shape[1]} input channels, expected one of {list(INPUTS)}"
        )
    lowres, inpaint = INPUTS[shape[1]]
    return dict(
        in_channels=3,
        lowres_channels=lowres,
        inpaint_channels=inpaint,
        aug_embedding=not lowres or "aug_proj.0.weight" in tensors,
        stem_kernel=shape[2],
    )


def _text(tensors: Tensors, head_channels: int) -> dict[str, Any]:
    """The conditions: DeepFloyd IF's pooling, Karlo's projections, GLIDE's transformer, or none."""
    if "encoder_pooling.0.weight" in tensors:
        return _floyd_text(tensors)
    if "text_seq_proj.0.weight" in tensors:
        return _karlo_text(tensors)
    if "token_embedding.weight" in tensors:
        return _glide_text(tensors, head_channels)
    return {}


def _floyd_text(tensors: Tensors) -> dict[str, Any]:
    normed = any(name.endswith(".norm_encoder.weight") for name in tensors)
    projects = "encoder_proj.weight" in tensors
    return dict(
        text_dims=(_rows(tensors, "encoder_pooling.0.weight"),),
        text_masked=False,
        context_dim=_rows(tensors, "encoder_proj.bias") if projects else None,
        context_norm="group" if normed else "none",
    )


def _karlo_text(tensors: Tensors) -> dict[str, Any]:
    width, dim = _shape(tensors, "text_seq_proj.0.weight", 2)
    tokens = _rows(tensors, "clip_tok_proj.bias")
    if tokens % width:
        raise InputError(
            f"clip_tok_proj.bias has {tokens} rows: expected a multiple of {width}, a token's width"
        )
    return dict(
        text_dims=(dim,),
        context_dim=width,
        context_norm="projected",
        text_pool="none",
        text_embed_dim=_shape(tensors, "text_feat_proj.weight", 2)[1],
        image_embed_dim=_shape(tensors, "clip_emb.weight", 2)[1],
        image_tokens=tokens // width,
    )


def _glide_text(tensors: Tensors, head_channels: int) -> dict[str, Any]:
    vocab, width = _shape(tensors, "token_embedding.weight", 2)
    layers = takewhile(lambda i: f"transformer.resblocks.{i}.ln_1.weight" in tensors, count())
    transformer = TextTransformerConfig(
        vocab=vocab,
        length=_rows(tensors, "positional_embedding"),
        width=width,
        layers=sum(1 for _ in layers),
        heads=max(1, width // head_channels),
    )
    return dict(
        text_transformer=transformer,
        text_dims=(1,),
        text_masked=False,
        context_norm="none",
        text_pool="last",
    )


def _floyd(params: FloydParams, fields: dict[str, Any]) -> dict[str, Any]:
    """What config.yml adds. Raises InputError for an entry that contradicts the tensors."""
    channels, extra = fields["channels"], fields["lowres_channels"] + fields["inpaint_channels"]
    mult = _integers(params.channel_mult, "channel_mult")
    blocks = params.num_res_blocks
    found = {
        "in_channels": (params.in_channels, 3 + extra),
        "out_channels": (params.out_channels, fields["out_channels"]),
        "channel_mult": (tuple(m * params.model_channels for m in mult), channels),
        "num_res_blocks": (
            (blocks,) * len(channels) if isinstance(blocks, int) else blocks,
            fields["blocks"],
        ),
        "encoder_dim": (params.encoder_dim, fields["text_dims"][0]),
        "encoder_channels": (params.encoder_channels, fields["context_dim"] or params.encoder_dim),
        "use_scale_shift_norm": (params.use_scale_shift_norm, fields["modulation"] == "scale_shift"),
    }
    for name, (said, held) in found.items():
        if said != held:
            raise InputError(f"config.yml: {name} means {said}, the tensors hold {held}")
    heads = params.num_head_channels
    if heads == -1:
        if params.num_heads_upsample not in (-1, params.num_heads):
            raise InputError(
                f"config.yml: num_heads_upsample {params.num_heads_upsample}: expected num_heads"
            )
        heads = tuple(c // max(1, params.num_heads) for c in channels)
    return dict(
        head_channels=heads,
        act="gelu_tanh" if params.activation == "gelu_jit" else params.activation,
        pool_heads=params.att_pool_heads,
        residual_scale=0.7071 if params.scale_skip_connection else 1.0,  # the constant of its code
        dropout=params.dropout,
    )


def _integers(value: str | tuple[int, ...], name: str) -> tuple[int, ...]:
    if isinstance(value, tuple):
        return value
    try:
        return tuple(int(part) for part in value.split(","))
    except ValueError:
        raise InputError(f"config.yml: {name} {value!r}: expected integers, as in 1,2,3,4") from None


def _shape(tensors: Tensors, name: str, dimensions: int) -> tuple[int, ...]:
    if name not in tensors:
        raise InputError(f"missing tensor {name}")
    shape = tuple(tensors[name].shape)
    if len(shape) != dimensions:
        raise InputError(f"{name}: expected {dimensions} dimensions, got shape {list(shape)}")
    return shape


def _rows(tensors: Tensors, name: str) -> int:
    if name not in tensors:
        raise InputError(f"missing tensor {name}")
    return tensors[name].shape[0]
