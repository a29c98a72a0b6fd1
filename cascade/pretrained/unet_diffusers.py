"""Configurations of the U-Nets of diffusers folders, read and written: DeepFloyd IF (UNet2DConditionModel),
Karlo's decoder (that with an UnCLIPTextProjModel beside it) and its super-resolution (UNet2DModel).
"""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any, TypeVar, cast

from cascade.config import UNetConfig, from_dict, to_dict
from cascade.errors import InputError
from cascade.nn.condition import attends_to_tokens, context_width, middle_attention
from cascade.pretrained.unet_keys import (
    Act,
    ConditionModel,
    DownBlock,
    Norm,
    PlainModel,
    TextProjection,
    UpBlock,
)
from cascade.pretrained.unet_tensors import check_public

T = TypeVar("T")


# -- configuration, read -----------------------------------------------------------------------------------


def unet_from_diffusers(config: dict[str, Any], text_proj: dict[str, Any] | None = None) -> UNetConfig:
    """The network that a config.json describes, with that of the text_proj component where there is one.
    Raises InputError, one line, that names the first key that cannot be followed."""
    cls = config.get("_class_name", "UNet2DConditionModel")
    if cls == "UNet2DModel" and text_proj is None:
        cfg = _from_plain(_model(PlainModel, config, cls))
    elif cls == "UNet2DConditionModel":
        projection = None if text_proj is None else _model(TextProjection, text_proj, "UnCLIPTextProjModel")
        cfg = _from_condition(_model(ConditionModel, config, cls), projection)
    else:
        raise InputError(f"_class_name {cls!r}: expected UNet2DConditionModel or UNet2DModel")
    check_public(cfg)
    return cfg


def _model(cls: type[T], config: dict[str, Any], where: str) -> T:
    return from_dict(cls, {k: v for k, v in config.items() if not k.startswith("_")}, where)


def _from_plain(model: PlainModel) -> UNetConfig:
    return UNetConfig(
        **_common(model),
        blocks=(model.layers_per_block,) * len(model.block_out_channels),
        middle_blocks=2 if model.mid_block_type else 0,
        self_attention=(False,) * len(model.block_out_channels),
        text_attention=(False,) * len(model.block_out_channels),
        aug_embedding=model.in_channels in (3, 7),
    )


def _from_condition(model: ConditionModel, projection: TextProjection | None) -> UNetConfig:
    common = _common(model)
    levels = len(model.block_out_channels)
    attends = tuple(block.startswith("Simple") for block in model.down_block_types)
    mirror = tuple(block.startswith("Simple") for block in reversed(model.up_block_types))
    if mirror != attends:
        raise InputError("up_block_types: expected the down_block_types in reverse order")
    only = _per_level(model.only_cross_attention, levels, "only_cross_attention")
    self_attention = tuple(sees and not cross for sees, cross in zip(attends, only, strict=True))
    blocks = _per_level(model.layers_per_block, levels, "layers_per_block")
    middle, sees = _middle(model, self_attention[-1], attends[-1])
    cfg = UNetConfig(
        **common,
        blocks=blocks,
        self_attention=self_attention,
        text_attention=attends,
        middle_blocks=middle,
        middle_attention=sees,
        head_channels=_heads(model),
        stem_kernel=model.conv_in_kernel,
        residual_scale=_residual_scale(model),
        **_text(model, attends, projection),
        **_vector(model, projection),
    )
    _check_act(model)
    _check_cross(model, cfg)
    return cfg


def _common(model: ConditionModel | PlainModel) -> dict[str, Any]:
    """What both classes say in the same words."""
    channels = model.block_out_channels
    if len({len(channels), len(model.down_block_types), len(model.up_block_types)}) > 1:
        raise InputError(
            f"block_out_channels has {len(channels)} entries, down_block_types "
            f"{len(model.down_block_types)}, up_block_types {len(model.up_block_types)}: expected one a level"
        )
    if model.norm_eps != 1e-5:
        raise InputError(f"norm_eps {model.norm_eps}: expected 1e-05")
    for c in channels:
        if c < 1 or model.norm_num_groups < 1 or c % model.norm_num_groups:
            raise InputError(
                f"norm_num_groups {model.norm_num_groups} does not divide {c} block_out_channels"
            )
    inputs = {3: (0, 0), 6: (3, 0), 7: (0, 4), 10: (3, 4)}
    if model.in_channels not in inputs:
        raise InputError(
            f"in_channels {model.in_channels}: expected 3, or 6 with a low-resolution picture, 7 with a "
            "picture to inpaint, 10 with both (a network of 4 works on latents, not on pixels)"
        )
    lowres, inpaint = inputs[model.in_channels]
    return dict(
        layout="adm",
        in_channels=3,
        out_channels=model.out_channels,
        lowres_channels=lowres,
        inpaint_channels=inpaint,
        channels=channels,
        strides=(1, *[2] * (len(channels) - 1)),
        norm_groups=model.norm_num_groups,
        act="silu" if model.act_fn == "swish" else model.act_fn,
        modulation="shift" if model.resnet_time_scale_shift == "default" else "scale_shift",
        time_dim=model.time_embedding_dim,
        dropout=model.dropout,
        learned_null=False,
    )


def _middle(model: ConditionModel, own: bool, text: bool) -> tuple[int, tuple[bool, bool] | None]:
    """(residual blocks, attention) of the middle; None is an attention like the deepest level's."""
    if model.mid_block_type is None:
        return 0, None
    if model.mid_block_type == "UNetMidBlock2D":
        return 1, (False, False) if text else None
    only = model.mid_block_only_cross_attention
    if only is None:
        only = model.only_cross_attention is True
    return 2, None if (not only, True) == (own, text) else (not only, True)


def _heads(model: ConditionModel) -> int | tuple[int, ...]:
    """Widths of the heads; None stands for one head as wide as its level. diffusers gives the list to the up
    blocks as it stands, not reversed as it does with every other list."""
    dims = _per_level(model.attention_head_dim, len(model.block_out_channels), "attention_head_dim")
    mirrored = zip(dims, dims[::-1], model.down_block_types, strict=True)
    if any(down != up and block.startswith("Simple") for down, up, block in mirrored):
        raise InputError(
            f"attention_head_dim {list(dims)}: expected a list that reads the same backwards, as the up "
            "blocks take it in that order"
        )
    widths = tuple(c if d is None else d for c, d in zip(model.block_out_channels, dims, strict=True))
    return widths[0] if len(set(widths)) == 1 else widths


def _residual_scale(model: ConditionModel) -> float:
    factor = model.resnet_out_scale_factor
    if factor == 0 or (model.mid_block_type and model.mid_block_scale_factor != factor):
        raise InputError(
            f"mid_block_scale_factor {model.mid_block_scale_factor}: expected that of "
            f"resnet_out_scale_factor, {factor}, and not 0"
        )
    return 1 / factor


def _text(
    model: ConditionModel, attends: tuple[bool, ...], projection: TextProjection | None
) -> dict[str, Any]:
    """How text tokens are projected, normed, attended to and pooled."""
    width = _one(model.cross_attention_dim, "cross_attention_dim")
    sees = any(attends) or model.mid_block_type == "UNetMidBlock2DSimpleCrossAttn"
    if projection is not None:
        for key in ("encoder_hid_dim", "addition_embed_type", "cross_attention_norm"):
            if getattr(model, key) is not None:
                raise InputError(f"{key} {getattr(model, key)!r}: expected null beside a text_proj component")
        if projection.cross_attention_dim != width or not sees:
            raise InputError(
                f"text_proj: cross_attention_dim {projection.cross_attention_dim}: expected {width}, that of "
                "the unet, which must attend"
            )
        return dict(
            text_dims=(projection.clip_embeddings_dim,),
            context_dim=width,
            context_norm="projected",
            text_pool="none",
        )
    pooled = model.addition_embed_type == "text"
    if model.encoder_hid_dim is not None and not sees:
        raise InputError(f"encoder_hid_dim {model.encoder_hid_dim}: no block attends to the projected tokens")
    norms = {None: "none", "group_norm": "group", "layer_norm": "layer"}
    return dict(
        text_dims=(model.encoder_hid_dim or width,) if sees or pooled else (),
        context_dim=width if model.encoder_hid_dim is not None else None,
        context_norm=norms[model.cross_attention_norm],
        text_masked=False,
        text_pool="attention" if pooled else "none",
        pool_heads=model.addition_embed_type_num_heads,
    )


def _vector(model: ConditionModel, projection: TextProjection | None) -> dict[str, Any]:
    """What is added to the time embedding beside pooled text: class_embed_type."""
    kind, dim = model.class_embed_type, model.projection_class_embeddings_input_dim
    told = kind == "timestep"
    if (kind == "identity") != (projection is not None):
        raise InputError(
            f"class_embed_type {kind!r}: expected 'identity' with a text_proj component, and never without"
        )
    if told and model.in_channels in (3, 7):
        raise InputError(
            "class_embed_type 'timestep': expected 6 in_channels, of which 3 are the noised picture"
        )
    found: dict[str, Any] = dict(aug_embedding=told or model.in_channels in (3, 7))
    if projection is not None:
        embedding = model.time_embedding_dim or 4 * model.block_out_channels[0]
        if projection.time_embed_dim != embedding:
            raise InputError(
                f"text_proj: time_embed_dim {projection.time_embed_dim}: expected {embedding}, the unet's"
            )
        clip = projection.clip_embeddings_dim
        tokens = projection.clip_extra_context_tokens
        return found | dict(text_embed_dim=clip, image_embed_dim=clip, image_tokens=tokens)
    if kind in ("projection", "simple_projection"):
        if dim is None:
            raise InputError(
                f"projection_class_embeddings_input_dim: expected a width for {kind!r}, got null"
            )
        vector = "mlp" if kind == "projection" else "linear"
        found |= dict(image_embed_dim=dim, image_tokens=0, image_vector=vector, image_null=False)
    return found


def _check_act(model: ConditionModel) -> None:
    """Activated once, in the blocks or before them, is the same; twice or never is not."""
    once = (None, False), (model.act_fn, True)
    if (model.time_embedding_act_fn, model.resnet_skip_time_act) not in once:
        raise InputError(
            f"time_embedding_act_fn {model.time_embedding_act_fn!r} with resnet_skip_time_act "
            f"{model.resnet_skip_time_act}: expected null with false, or {model.act_fn!r} with true"
        )


def _check_cross(model: ConditionModel, cfg: UNetConfig) -> None:
    """The layer norm of tokens has the width of the pictures' features there, not that of the tokens."""
    if model.cross_attention_norm != "layer_norm":
        return
    width = _one(model.cross_attention_dim, "cross_attention_dim")
    sees = [c for c, text in zip(cfg.channels, cfg.text_attention, strict=True) if text]
    sees += [cfg.channels[-1]] if middle_attention(cfg)[1] else []
    if set(sees) - {width}:
        raise InputError(
            f"cross_attention_norm 'layer_norm': expected cross_attention_dim {width} at every level"
        )


def _per_level(value: Any, levels: int, key: str) -> tuple[Any, ...]:
    if not isinstance(value, tuple):
        return (value,) * levels
    if len(value) != levels:
        raise InputError(f"{key} has {len(value)} entries, block_out_channels has {levels}")
    return value


def _one(value: int | tuple[int, ...], key: str) -> int:
    if isinstance(value, int):
        return value
    if len(set(value)) != 1:
        raise InputError(f"{key} {list(value)}: expected one width for all levels")
    return value[0]


# -- configuration, written --------------------------------------------------------------------------------


def config_to_diffusers(cfg: UNetConfig, image_px: int) -> dict[str, dict[str, Any]]:
    """config.json of each component: "unet", and "text_proj" where the network takes CLIP embeddings as Karlo
    does. Raises InputError, one line, that names the first field that diffusers cannot express."""
    if cfg.text_transformer is not None:
        raise InputError("no U-Net of diffusers holds a text transformer, as GLIDE's do")
    attends = attends_to_tokens(cfg) or any(cfg.self_attention)
    plain = not (attends or cfg.text_dims or cfg.image_embed_dim or cfg.middle_blocks == 1 or _told(cfg))
    model = _to_plain(cfg, image_px) if plain else _to_condition(cfg, image_px)
    written = {"unet": {"_class_name": "UNet2DModel" if plain else "UNet2DConditionModel", **to_dict(model)}}
    if cfg.text_embed_dim:
        projection = TextProjection(
            clip_extra_context_tokens=cfg.image_tokens,
            clip_embeddings_dim=cfg.text_embed_dim,
            time_embed_dim=cfg.time_dim or 4 * cfg.channels[0],
            cross_attention_dim=context_width(cfg),
        )
        written["text_proj"] = {"_class_name": "UnCLIPTextProjModel", **to_dict(projection)}
    meant = unet_from_diffusers(written["unet"], written.get("text_proj"))
    for field in fields(UNetConfig):
        value, read = getattr(cfg, field.name), getattr(meant, field.name)
        if value != read and not (isinstance(value, float) and math.isclose(value, read)):
            raise InputError(
                f"unet.{field.name} {value!r}: diffusers' classes can express {read!r} alone here"
            )
    return written


def _to_plain(cfg: UNetConfig, image_px: int) -> PlainModel:
    levels = len(cfg.channels)
    return PlainModel(
        sample_size=image_px,
        in_channels=cfg.in_channels + cfg.lowres_channels + cfg.inpaint_channels,
        out_channels=cfg.out_channels,
        time_embedding_dim=cfg.time_dim,
        down_block_types=("ResnetDownsampleBlock2D",) * levels,
        mid_block_type="UNetMidBlock2D" if cfg.middle_blocks else None,
        up_block_types=("ResnetUpsampleBlock2D",) * levels,
        block_out_channels=cfg.channels,
        layers_per_block=cfg.blocks[0],
        dropout=cfg.dropout,
        norm_num_groups=cfg.norm_groups,
        resnet_time_scale_shift="default" if cfg.modulation == "shift" else "scale_shift",
        add_attention=False,
    )


def _to_condition(cfg: UNetConfig, image_px: int) -> ConditionModel:
    down: dict[bool, DownBlock] = {True: "SimpleCrossAttnDownBlock2D", False: "ResnetDownsampleBlock2D"}
    up: dict[bool, UpBlock] = {True: "SimpleCrossAttnUpBlock2D", False: "ResnetUpsampleBlock2D"}
    norms: dict[str, Norm | None] = {"group": "group_norm", "layer": "layer_norm"}
    own, text = middle_attention(cfg)
    projects = cfg.context_dim is not None and not cfg.text_embed_dim
    pooled = cfg.text_pool == "attention" and bool(cfg.text_dims)
    return ConditionModel(
        sample_size=image_px,
        in_channels=cfg.in_channels + cfg.lowres_channels + cfg.inpaint_channels,
        out_channels=cfg.out_channels,
        down_block_types=tuple(down[sees] for sees in cfg.text_attention),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn"
        if text
        else "UNetMidBlock2D"
        if cfg.middle_blocks
        else None,
        up_block_types=tuple(up[sees] for sees in reversed(cfg.text_attention)),
        only_cross_attention=tuple(
            sees and not own for own, sees in zip(cfg.self_attention, cfg.text_attention, strict=True)
        ),
        block_out_channels=cfg.channels,
        layers_per_block=cfg.blocks,
        mid_block_scale_factor=1 / cfg.residual_scale,
        dropout=cfg.dropout,
        act_fn=cast(Act, cfg.act),
        norm_num_groups=cfg.norm_groups,
        cross_attention_dim=context_width(cfg) or sum(cfg.text_dims[:1]),
        encoder_hid_dim=cfg.text_dims[0] if projects and cfg.text_dims else None,
        encoder_hid_dim_type="text_proj" if projects else None,
        attention_head_dim=cfg.head_channels,
        class_embed_type=_class_embed_type(cfg),
        addition_embed_type="text" if pooled else None,
        resnet_time_scale_shift="default" if cfg.modulation == "shift" else "scale_shift",
        resnet_out_scale_factor=1 / cfg.residual_scale,
        time_embedding_dim=cfg.time_dim,
        conv_in_kernel=cfg.stem_kernel,
        projection_class_embeddings_input_dim=None if cfg.text_embed_dim else cfg.image_embed_dim,
        mid_block_only_cross_attention=text and not own,
        cross_attention_norm=norms.get(cfg.context_norm),
        addition_embed_type_num_heads=cfg.pool_heads,
    )


def _class_embed_type(cfg: UNetConfig) -> Any:
    if cfg.text_embed_dim:
        return "identity"
    if cfg.image_embed_dim:
        return "projection" if cfg.image_vector == "mlp" else "simple_projection"
    return "timestep" if _told(cfg) else None


def _told(cfg: UNetConfig) -> bool:
    """Whether the network embeds the aug level of its low-resolution picture."""
    return bool(cfg.lowres_channels) and cfg.aug_embedding
