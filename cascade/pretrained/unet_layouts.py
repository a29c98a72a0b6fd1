"""Which tensor of a public layout is which of this project's U-Net: diffusers' names, and those of the
original repositories (guided-diffusion's, as DeepFloyd IF, Karlo and GLIDE extend them)."""

from __future__ import annotations

from typing import cast

from torch import nn

from cascade.nn.attention import Attention2d
from cascade.nn.condition import TextInput
from cascade.nn.layers import MLP, ResBlock
from cascade.nn.transformer import TextTransformer
from cascade.nn.unet import UNet
from cascade.pretrained.unet_tensors import (
    Binding,
    Part,
    as_convolution,
    channels_first,
    interleaved,
    layer,
    parts,
    same,
    stacked,
)

TEXT, IMAGE = "condition.text.0", "condition.image"
TEXT_PROJ = "text_proj."  # prefix of the tensors of that component


# -- diffusers ---------------------------------------------------------------------------------------------


def diffusers(net: UNet) -> list[Binding]:
    """Names in a diffusers folder; those of the text_proj component after `TEXT_PROJ`."""
    bindings = [
        *layer("stem", "conv_in"),
        *_mlp("time", "time_embedding.linear_1", "time_embedding.linear_2"),
        *layer("norm_out", "conv_norm_out"),
        *layer("conv_out", "conv_out"),
    ]
    if net.condition.text_embed is not None:
        bindings += _projection(net, TEXT_PROJ)
    else:
        bindings += _diffusers_conditions(net)
    for part in parts(net):
        theirs = _diffusers_name(part)
        if isinstance(part.module, ResBlock):
            bindings += _block(
                part, theirs, ("norm1", "conv1", "time_emb_proj", "norm2", "conv2", "conv_shortcut")
            )
        else:
            bindings += _diffusers_attention(part, theirs)
    return bindings


def _diffusers_name(part: Part) -> str:
    side = {"down": f"down_blocks.{part.level}", "middle": "mid_block", "up": f"up_blocks.{part.level}"}[
        part.side
    ]
    if part.kind == "resample":
        return f"{side}.{part.side}samplers.0"
    return f"{side}.{'resnets' if part.kind == 'block' else 'attentions'}.{part.place}"


def _diffusers_attention(part: Part, theirs: str) -> list[Binding]:
    ours, module = part.ours, cast(Attention2d, part.module)
    bindings = [
        *layer(f"{ours}.norm", f"{theirs}.group_norm"),
        *layer(f"{ours}.q", f"{theirs}.to_q"),
        *layer(f"{ours}.out", f"{theirs}.to_out.0"),
    ]
    if module.kv is not None:
        bindings += stacked(f"{ours}.kv", f"{theirs}.to_k", f"{theirs}.to_v")
    if _has_tensors(module.norm_context):
        bindings += layer(f"{ours}.norm_context", f"{theirs}.norm_cross")
    if module.kv_context is not None:
        bindings += stacked(f"{ours}.kv_context", f"{theirs}.add_k_proj", f"{theirs}.add_v_proj")
    return bindings


def _diffusers_conditions(net: UNet) -> list[Binding]:
    bindings: list[Binding] = []
    for reader in net.condition.text:  # at most one
        bindings += _text(cast(TextInput, reader), "encoder_hid_proj", *(f"add_embedding.{n}" for n in POOL))
    if net.condition.aug is not None:
        bindings += _mlp("condition.aug", "class_embedding.linear_1", "class_embedding.linear_2")
    if net.condition.image is not None:
        if isinstance(net.condition.image.to_vector, MLP):
            bindings += _mlp(f"{IMAGE}.to_vector", "class_embedding.linear_1", "class_embedding.linear_2")
        else:
            bindings += layer(f"{IMAGE}.to_vector", "class_embedding")
    return bindings


POOL = ("norm1", "pool", "proj", "norm2")


# -- original ----------------------------------------------------------------------------------------------


def original(net: UNet) -> list[Binding]:
    """Names in the original repositories. Blocks are numbered through all levels; a Sequential holds a
    block (0), its attention (1) and, where an output level ends, the upsampling block (last)."""
    bindings = [
        *layer("stem", "input_blocks.0.0"),
        *_mlp("time", "time_embed.0", "time_embed.2"),
        *layer("norm_out", "out.0"),
        *layer("conv_out", "out.2"),
    ]
    if net.condition.text_embed is not None:
        bindings += _projection(net, "", KARLO)
    else:
        for reader in net.condition.text:  # at most one
            bindings += _original_text(cast(TextInput, reader))
    if net.condition.aug is not None:
        bindings += _mlp("condition.aug", "aug_proj.0", "aug_proj.2")
    number = {"down": 0, "up": -1}  # input_blocks.0 is the stem
    inside = 0  # place in the Sequential
    for part in parts(net):
        if part.side == "middle":
            inside = 0 if (part.kind, part.place) == ("block", 0) else inside + 1
            theirs = f"middle_block.{inside}"
        else:
            starts = part.kind == "block" or (part.side, part.kind) == ("down", "resample")
            inside = 0 if starts else inside + 1
            number[part.side] += starts
            theirs = f"{'input' if part.side == 'down' else 'output'}_blocks.{number[part.side]}.{inside}"
        if isinstance(part.module, ResBlock):
            names = (
                "in_layers.0",
                "in_layers.2",
                "emb_layers.1",
                "out_layers.0",
                "out_layers.3",
                "skip_connection",
            )
            bindings += _block(part, theirs, names)
        else:
            bindings += _original_attention(part, theirs)
    return bindings


def _original_attention(part: Part, theirs: str) -> list[Binding]:
    ours, module = part.ours, cast(Attention2d, part.module)
    rows = ["q"] if module.kv is None else ["q", "kv"]
    names = [(f"{ours}.{row}.weight", f"{ours}.{row}.bias") for row in rows]
    bindings = [
        *layer(f"{ours}.norm", f"{theirs}.norm"),
        *interleaved(names, f"{theirs}.qkv", module.heads, 1 if module.kv is None else 3),
        as_convolution(same(f"{ours}.out.weight", f"{theirs}.proj_out.weight")),
        same(f"{ours}.out.bias", f"{theirs}.proj_out.bias"),
    ]
    if _has_tensors(module.norm_context):
        bindings += layer(f"{ours}.norm_context", f"{theirs}.norm_encoder")
    if module.kv_context is not None:
        names = [(f"{ours}.kv_context.weight", f"{ours}.kv_context.bias")]
        bindings += interleaved(names, f"{theirs}.encoder_kv", module.heads, 2)
    return bindings


def _original_text(reader: TextInput) -> list[Binding]:
    if reader.transformer is None:
        return _text(reader, "encoder_proj", *(f"encoder_pooling.{i}" for i in range(4)))
    return _glide(reader.transformer, f"{TEXT}.transformer") + layer(
        f"{TEXT}.pool_project", "transformer_proj"
    )


def _glide(transformer: TextTransformer, ours: str) -> list[Binding]:
    bindings = [
        same(f"{ours}.embedding.weight", "token_embedding.weight"),
        same(f"{ours}.position", "positional_embedding"),
        same(f"{ours}.padding", "padding_embedding"),
        *layer(f"{ours}.blocks.norm", "final_ln"),
    ]
    for i, block in enumerate(transformer.blocks.layers):
        assert isinstance(block, nn.TransformerEncoderLayer)
        mine, theirs = f"{ours}.blocks.layers.{i}", f"transformer.resblocks.{i}"
        rows = [(f"{mine}.self_attn.in_proj_weight", f"{mine}.self_attn.in_proj_bias")]
        heads = block.self_attn.num_heads
        bindings += [
            *layer(f"{mine}.norm1", f"{theirs}.ln_1"),
            *interleaved(rows, f"{theirs}.attn.c_qkv", heads, 3, convolution=False),
            *layer(f"{mine}.self_attn.out_proj", f"{theirs}.attn.c_proj"),
            *layer(f"{mine}.norm2", f"{theirs}.ln_2"),
            *layer(f"{mine}.linear1", f"{theirs}.mlp.c_fc"),
            *layer(f"{mine}.linear2", f"{theirs}.mlp.c_proj"),
        ]
    return bindings


# -- both --------------------------------------------------------------------------------------------------

UNCLIP = (  # in diffusers' UnCLIPTextProjModel, in the order of `_projection`
    "encoder_hidden_states_proj",
    "text_encoder_hidden_states_norm",
    "embedding_proj",
    "clip_image_embeddings_project_to_time_embeddings",
    "clip_extra_context_tokens_proj",
    "learned_classifier_free_guidance_embeddings",
)
KARLO = ("text_seq_proj.0", "text_seq_proj.1", "text_feat_proj", "clip_emb", "clip_tok_proj", "cf_param")


def _projection(net: UNet, prefix: str, names: tuple[str, ...] = UNCLIP) -> list[Binding]:
    """What Karlo's decoder makes of CLIP embeddings and token states."""
    project, norm, text, image, tokens, null = (prefix + name for name in names)
    return [
        *layer(f"{TEXT}.project", project),
        *layer(f"{TEXT}.norm", norm),
        *layer("condition.text_embed.to_vector", text),
        *layer(f"{IMAGE}.to_vector", image),
        *channels_first(f"{IMAGE}.to_tokens", tokens, net.cfg.image_tokens),
        same(f"{IMAGE}.null", null),
    ]


def _text(reader: TextInput, project: str, norm1: str, pool: str, linear: str, norm2: str) -> list[Binding]:
    bindings = layer(f"{TEXT}.project", project) if _has_tensors(reader.project) else []
    if reader.pool is not None:
        bindings += [
            *layer(f"{TEXT}.pool_norm", norm1),
            same(f"{TEXT}.pool.position", f"{pool}.positional_embedding"),
            *(b for row in "qkv" for b in layer(f"{TEXT}.pool.{row}", f"{pool}.{row}_proj")),
            *layer(f"{TEXT}.pool_project", linear),
            *layer(f"{TEXT}.pool_out_norm", norm2),
        ]
    return bindings


def _mlp(ours: str, first: str, second: str) -> list[Binding]:
    return layer(f"{ours}.linear_1", first) + layer(f"{ours}.linear_2", second)


def _block(part: Part, theirs: str, names: tuple[str, ...]) -> list[Binding]:
    ours = ("norm1", "conv1", "emb", "norm2", "conv2", "shortcut")
    pairs = [(own, name) for own, name in zip(ours, names, strict=True)]
    if not _has_tensors(part.module.get_submodule("shortcut")):
        pairs.pop()
    return [b for own, name in pairs for b in layer(f"{part.ours}.{own}", f"{theirs}.{name}")]


def _has_tensors(module: nn.Module | None) -> bool:
    return module is not None and next(module.parameters(), None) is not None
