"""Public priors as configurations of `DiffusionPrior`: Karlo's and Kandinsky's, in diffusers folders
(PriorTransformer) and in Karlo's own layout.

The sequence is that of unCLIP (arXiv:2204.06125, section 2.2) and of `PriorNet`: text tokens, CLIP text
embedding, noise level, noised image embedding, query. Names differ, and one table of positions is two here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor

from cascade.checkpoint import check_tensors
from cascade.config import ScheduleConfig, from_dict, to_dict
from cascade.errors import InputError
from cascade.pretrained.unet_tensors import (
    Binding,
    Tensors,
    interleaved,
    layer,
    stacked,
    translate,
    written,
)
from prior.diffusion import DiffusionPrior, PriorConfig

CLASS = "PriorTransformer"
TAIL = 4  # positions after the text tokens


@dataclass(frozen=True, kw_only=True)
class PriorTransformer:
    """config.json of diffusers' PriorTransformer; a key whose type is one literal must keep that value."""

    num_attention_heads: int = 32
    attention_head_dim: int = 64
    num_layers: int = 20
    embedding_dim: int = 768
    num_embeddings: int = 77
    additional_embeddings: Literal[4] = 4
    dropout: float = 0.0
    time_embed_act_fn: Literal["silu"] = "silu"
    norm_in_type: None = None
    embedding_proj_norm_type: None = None
    encoder_hid_proj_type: Literal["linear"] = "linear"
    added_emb_type: Literal["prd"] = "prd"
    time_embed_dim: int | None = None
    embedding_proj_dim: int | None = None
    clip_embed_dim: int | None = None


@dataclass(frozen=True, kw_only=True)
class UnCLIPScheduler:
    """scheduler_config.json beside such a prior."""

    num_train_timesteps: Literal[1000] = 1000
    variance_type: Literal["fixed_small_log"] = "fixed_small_log"
    clip_sample: Literal[True] = True
    clip_sample_range: float = 1.0
    prediction_type: Literal["sample", "epsilon"] = "epsilon"
    beta_schedule: Literal["squaredcos_cap_v2"] = "squaredcos_cap_v2"


@dataclass(frozen=True, kw_only=True)
class Hparams:
    """model.hparams of Karlo's own configuration of its prior."""

    text_ctx: int
    xf_width: int
    xf_layers: int
    xf_heads: int
    xf_final_ln: Literal[True]
    xf_padding: Literal[False] = False
    text_drop: Any = 0.0  # of training
    clip_dim: int
    clip_xf_width: int


# -- configuration -----------------------------------------------------------------------------------------


def prior_from_diffusers(config: Mapping[str, Any], scheduler: Mapping[str, Any]) -> PriorConfig:
    """The prior that config.json and scheduler_config.json describe, sampled as Karlo is: 25 ancestral steps
    evenly spaced from 999 to 0, guidance 4. Raises InputError, one line, for a prior of another kind."""
    model = from_dict(PriorTransformer, _plain(config), CLASS)
    process = from_dict(UnCLIPScheduler, _plain(scheduler), "UnCLIPScheduler")
    width = model.num_attention_heads * model.attention_head_dim
    for name in ("embedding_proj_dim", "clip_embed_dim", "time_embed_dim"):
        expected = width if name == "time_embed_dim" else model.embedding_dim
        if getattr(model, name) not in (None, expected):
            raise InputError(f"{CLASS}.{name} {getattr(model, name)}: expected null or {expected}")
    return _public(
        width=width,
        layers=model.num_layers,
        heads=model.num_attention_heads,
        text_dim=model.embedding_dim,
        text_length=model.num_embeddings,
        embed_dim=model.embedding_dim,
        dropout=model.dropout,
        prediction="x0" if process.prediction_type == "sample" else "eps",
        clamp=process.clip_sample_range,
    )


def prior_from_karlo(config: Mapping[str, Any]) -> PriorConfig:
    """The prior that Karlo's prior_1B_vit_l.yaml describes. Its own sampler clamps predictions to +-10."""
    diffusion, hparams = config.get("diffusion"), config.get("model", {}).get("hparams")
    if not isinstance(diffusion, Mapping) or not isinstance(hparams, Mapping):
        raise InputError("Karlo's configuration: expected model.hparams and diffusion")
    model = from_dict(Hparams, dict(hparams), "model.hparams")
    expected = {"steps": 1000, "learn_sigma": False, "noise_schedule": "squaredcos_cap_v2"}
    for name, value in expected.items():
        if diffusion.get(name) != value:
            raise InputError(f"diffusion.{name} {diffusion.get(name)!r}: expected {value!r}")
    return _public(
        width=model.xf_width,
        layers=model.xf_layers,
        heads=model.xf_heads,
        text_dim=model.clip_xf_width,
        text_length=model.text_ctx,
        embed_dim=model.clip_dim,
        prediction="x0" if diffusion.get("predict_xstart") else "eps",
        clamp=10.0,
    )


def _public(**values: Any) -> PriorConfig:
    return PriorConfig(
        **values,
        text_norm=False,
        pooled_scale=1.0,
        learned_null=False,
        unit_norm=False,
        schedule=ScheduleConfig(name="discrete_cosine"),
        sampler="ddpm",
        steps=25,
        spacing="linspace",
        guidance=4.0,
        best_of=1,
    )


def prior_to_diffusers(config: PriorConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """config.json and scheduler_config.json. Raises InputError that names the first field that diffusers'
    class cannot express."""
    model = PriorTransformer(
        num_attention_heads=config.heads,
        attention_head_dim=config.width // config.heads,
        num_layers=config.layers,
        embedding_dim=config.embed_dim,
        num_embeddings=config.text_length,
        dropout=config.dropout,
    )
    process = UnCLIPScheduler(
        clip_sample_range=config.clamp, prediction_type="sample" if config.prediction == "x0" else "epsilon"
    )
    meant = prior_from_diffusers(to_dict(model), to_dict(process))
    settings = (
        "text_sequence",
        "sampler",
        "steps",
        "spacing",
        "eta",
        "guidance",
        "best_of",
    )  # not the network
    for field in fields(PriorConfig):
        value, said = getattr(config, field.name), getattr(meant, field.name)
        if field.name not in settings and value != said:
            raise InputError(f"prior.{field.name} {value!r}: diffusers can express {said!r} alone here")
    return (
        {"_class_name": CLASS, **to_dict(model)},
        {"_class_name": "UnCLIPScheduler", **to_dict(process)},
    )


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if not name.startswith("_")}


# -- tensors -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """Names of a public file. `blocks` holds the number of the layer."""

    time: tuple[str, str]
    tokens: str
    pooled: str
    embed: str
    query: str
    positions: str
    norm: str
    output: str
    blocks: str
    norms: tuple[str, str]
    qkv: tuple[str, ...]  # three layers, or one whose rows go head by head
    projections: tuple[str, str, str]  # of attention, into the MLP, out of it


DIFFUSERS = Layout(
    time=("time_embedding.linear_1", "time_embedding.linear_2"),
    tokens="encoder_hidden_states_proj",
    pooled="embedding_proj",
    embed="proj_in",
    query="prd_embedding",
    positions="positional_embedding",
    norm="norm_out",
    output="proj_to_clip_embeddings",
    blocks="transformer_blocks.{}",
    norms=("norm1", "norm3"),
    qkv=("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    projections=("attn1.to_out.0", "ff.net.0.proj", "ff.net.2"),
)
KARLO = Layout(
    time=("model.time_embed.0", "model.time_embed.2"),
    tokens="model.text_enc_proj",
    pooled="model.text_emb_proj",
    embed="model.clip_img_proj",
    query="model.prd_emb",
    positions="model.positional_embedding",
    norm="model.final_ln",
    output="model.out_proj",
    blocks="model.transformer.resblocks.{}",
    norms=("ln_1", "ln_2"),
    qkv=("attn.c_qkv",),
    projections=("attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
)


def bindings(config: PriorConfig, layout: Layout) -> list[Binding]:
    """Every tensor of a prior in both namings. clip_mean and clip_std (1 D) come with the weights."""
    net = "denoiser.net"
    found = [
        _positions(net, layout.positions, config.text_length),
        row(f"{net}.query", layout.query, 2),
        row("statistics.mean", "clip_mean", 1),
        row("statistics.std", "clip_std", 1),
    ]
    for ours, theirs in (
        ("time.linear_1", layout.time[0]),
        ("time.linear_2", layout.time[1]),
        ("prefix.tokens", layout.tokens),
        ("prefix.pooled", layout.pooled),
        ("input", layout.embed),
        ("transformer.norm", layout.norm),
        ("output", layout.output),
    ):
        found += layer(f"{net}.{ours}", theirs)
    for i in range(config.layers):
        block, theirs = f"{net}.transformer.blocks.{i}", layout.blocks.format(i)
        for ours, name in zip(("norm1", "norm2"), layout.norms, strict=True):
            found += layer(f"{block}.{ours}", f"{theirs}.{name}")
        for ours, name in zip(("attention.out", "mlp.0", "mlp.2"), layout.projections, strict=True):
            found += layer(f"{block}.{ours}", f"{theirs}.{name}")
        qkv = f"{block}.attention.qkv"
        names = [f"{theirs}.{name}" for name in layout.qkv]
        if len(names) == 3:
            found += stacked(qkv, *names)
        else:
            own = [(f"{qkv}.weight", f"{qkv}.bias")]
            found += interleaved(own, names[0], config.heads, 3, convolution=False)
    return found


def tensors_from(layout: Layout, theirs: Tensors, config: PriorConfig, what: str) -> dict[str, Tensor]:
    """Our tensors of a public file's. Raises InputError that names the first tensor that does not fit."""
    return translate(bindings(config, layout), theirs, _skeleton(config), what)


def tensors_to(layout: Layout, ours: Tensors, config: PriorConfig) -> dict[str, Tensor]:
    """A public file's tensors of ours."""
    check_tensors(ours, _skeleton(config), "prior")
    return written(bindings(config, layout), ours)


def _skeleton(config: PriorConfig) -> dict[str, Tensor]:
    with torch.device("meta"):
        return DiffusionPrior(config).state_dict()


def row(ours: str, theirs: str, leading: int) -> Binding:
    """A tensor of ours that they keep behind `leading` dimensions of one."""

    def read(tensors: list[Tensor]) -> list[Tensor]:
        return [tensors[0][(0,) * leading]]

    def write(tensors: list[Tensor]) -> list[Tensor]:
        return [tensors[0][(None,) * leading]]

    return Binding((ours,), (theirs,), read, write)


def _positions(net: str, theirs: str, length: int) -> Binding:
    """1 L+4 W: of the tokens and the CLIP text embedding, then of noise level, image embedding and query."""

    def read(tensors: list[Tensor]) -> list[Tensor]:
        return list(tensors[0][0].split([length + 1, TAIL - 1]))

    def write(tensors: list[Tensor]) -> list[Tensor]:
        return [torch.cat(tensors)[None]]

    return Binding((f"{net}.prefix.positions", f"{net}.positions"), (theirs,), read, write)
