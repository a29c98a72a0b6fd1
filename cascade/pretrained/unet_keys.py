"""Every key of the three config.json files that describe a U-Net in a diffusers folder.

A key whose type is one literal must keep that value: the networks of this family do not use it otherwise. A
key of type `Any` does not act on their block types.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Act = Literal["silu", "swish", "gelu", "mish", "relu"]
DownBlock = Literal["ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"]
UpBlock = Literal["ResnetUpsampleBlock2D", "SimpleCrossAttnUpBlock2D"]
Norm = Literal["group_norm", "layer_norm"]
Scale = Literal["default", "scale_shift"]


@dataclass(frozen=True, kw_only=True)
class ConditionModel:
    """config.json of a UNet2DConditionModel."""

    sample_size: int | tuple[int, ...] | None = None
    in_channels: int = 4
    out_channels: int = 4
    center_input_sample: Literal[False] = False
    flip_sin_to_cos: Literal[True] = True
    freq_shift: Literal[0] = 0
    down_block_types: tuple[DownBlock, ...]
    mid_block_type: Literal["UNetMidBlock2DSimpleCrossAttn", "UNetMidBlock2D"] | None
    up_block_types: tuple[UpBlock, ...]
    only_cross_attention: bool | tuple[bool, ...] = False
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int | tuple[int, ...] = 2
    downsample_padding: Any = 1  # acts on other block types alone
    mid_block_scale_factor: float = 1.0
    dropout: float = 0.0
    act_fn: Act = "silu"
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    cross_attention_dim: int | tuple[int, ...] = 1280
    transformer_layers_per_block: Any = 1  # of other block types
    reverse_transformer_layers_per_block: Any = None  # of other block types
    encoder_hid_dim: int | None = None
    encoder_hid_dim_type: Literal["text_proj"] | None = None
    attention_head_dim: int | tuple[int | None, ...] = 8
    num_attention_heads: None = None
    dual_cross_attention: Any = False  # of other block types
    use_linear_projection: Any = False  # of other block types
    class_embed_type: Literal["timestep", "identity", "projection", "simple_projection"] | None = None
    addition_embed_type: Literal["text"] | None = None
    addition_time_embed_dim: Any = None  # of another addition_embed_type
    num_class_embeds: None = None
    upcast_attention: Any = False  # of other block types
    resnet_time_scale_shift: Scale = "default"
    resnet_skip_time_act: bool = False
    resnet_out_scale_factor: float = 1.0
    time_embedding_type: Literal["positional"] = "positional"
    time_embedding_dim: int | None = None
    time_embedding_act_fn: Act | None = None
    timestep_post_act: None = None
    time_cond_proj_dim: None = None
    conv_in_kernel: int = 3
    conv_out_kernel: Literal[3] = 3
    projection_class_embeddings_input_dim: int | None = None
    attention_type: Literal["default"] = "default"
    class_embeddings_concat: Literal[False] = False
    mid_block_only_cross_attention: bool | None = None
    cross_attention_norm: Norm | None = None
    addition_embed_type_num_heads: int = 64


@dataclass(frozen=True, kw_only=True)
class PlainModel:
    """config.json of a UNet2DModel without attention."""

    sample_size: int | tuple[int, ...] | None = None
    in_channels: int = 3
    out_channels: int = 3
    center_input_sample: Literal[False] = False
    time_embedding_type: Literal["positional"] = "positional"
    time_embedding_dim: int | None = None
    freq_shift: Literal[0] = 0
    flip_sin_to_cos: Literal[True] = True
    down_block_types: tuple[Literal["ResnetDownsampleBlock2D"], ...]
    mid_block_type: Literal["UNetMidBlock2D"] | None = "UNetMidBlock2D"
    up_block_types: tuple[Literal["ResnetUpsampleBlock2D"], ...]
    block_out_channels: tuple[int, ...] = (224, 448, 672, 896)
    layers_per_block: int = 2
    mid_block_scale_factor: Literal[1] = 1
    downsample_padding: Any = 1  # this and the next two act on other block types alone
    downsample_type: Any = "conv"
    upsample_type: Any = "conv"
    dropout: float = 0.0
    act_fn: Literal["silu", "swish"] = "silu"  # its output layer has no other
    attention_head_dim: Any = 8  # nothing attends
    norm_num_groups: int = 32
    attn_norm_num_groups: Any = None
    norm_eps: float = 1e-5
    resnet_time_scale_shift: Scale = "default"
    add_attention: Literal[False]
    class_embed_type: None = None
    num_class_embeds: None = None
    num_train_timesteps: Any = None


@dataclass(frozen=True, kw_only=True)
class TextProjection:
    """config.json of an UnCLIPTextProjModel."""

    clip_extra_context_tokens: int = 4
    clip_embeddings_dim: int = 768
    time_embed_dim: int
    cross_attention_dim: int
