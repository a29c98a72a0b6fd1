"""Checkpoints of DALLE2-pytorch's prior: `LaionConfig` from their shapes, and their tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from cascade.errors import InputError
from cascade.pretrained.unet_tensors import Binding, Tensors, same, translate
from prior.laion import LaionConfig, LaionPrior
from prior.pretrained import row

LAYERS = "net.causal_transformer.layers"
EXPECTED = {"predict_x_start": True, "predict_v": False, "beta_schedule": "cosine", "timesteps": 1000}


def laion_config(tensors: Tensors, data: Mapping[str, Any]) -> LaionConfig:
    """The network that a checkpoint holds, from its shapes, and what prior_config.json says of the process.
    Raises InputError, one line, for a network of another kind."""
    prior = data.get("prior", data)
    for key, value in EXPECTED.items():
        if prior.get(key, value) != value:
            raise InputError(f"prior_config.json: {key} {prior[key]!r}: expected {value!r}")

    def shape(name: str) -> tuple[int, ...]:
        if name not in tensors:
            raise InputError(f"DALLE2-pytorch prior: missing tensor {name}")
        return tuple(tensors[name].shape)

    if shape("net.to_time_embeds.0.weight")[0] != 1000:
        raise InputError("net.to_time_embeds.0.weight: expected 1000 rows, one a noise level")
    inner, width = shape(f"{LAYERS}.0.0.to_q.weight")
    head = shape(f"{LAYERS}.0.0.null_kv")[1]
    return LaionConfig(
        width=width,
        layers=len({name.split(".")[3] for name in tensors if name.startswith(f"{LAYERS}.")}),
        heads=inner // head,
        head_width=head,
        inner=shape(f"{LAYERS}.0.1.1.weight")[0] // 2,
        inner_norm=f"{LAYERS}.0.1.3.g" in tensors,
        rotary=prior.get("net", {}).get("rotary_emb", True),
        buckets=shape("net.causal_transformer.rel_pos_bias.relative_attention_bias.weight")[0],
        text_length=shape("net.null_text_encodings")[1],
    )


def laion_tensors(tensors: Tensors, config: LaionConfig, what: str) -> dict[str, Tensor]:
    """The state dict of `LaionPrior(config)`; the checkpoint's CLIP, schedule and tables are left out. Raises
    InputError that names the first tensor that does not fit."""
    used = {name: t for name, t in tensors.items() if name.startswith("net.") and "rotary_emb." not in name}
    with torch.device("meta"):
        expected = LaionPrior(config).state_dict()
    return translate(bindings(config), used, expected, what)


def bindings(config: LaionConfig) -> list[Binding]:
    """Every tensor in both namings."""
    ours = "denoiser.net"
    found = [
        same(f"{ours}.time.weight", "net.to_time_embeds.0.weight"),
        same(f"{ours}.query", "net.learned_query"),
        row(f"{ours}.null_tokens", "net.null_text_encodings", 1),
        row(f"{ours}.null_pooled", "net.null_text_embeds", 2),
        row(f"{ours}.null_image", "net.null_image_embed", 1),
        same(
            f"{ours}.relative.weight",
            "net.causal_transformer.rel_pos_bias.relative_attention_bias.weight",
        ),
        same(f"{ours}.norm.g", "net.causal_transformer.norm.g"),
        same(f"{ours}.output.weight", "net.causal_transformer.project_out.weight"),
    ]
    names = {
        "attention.norm.g": "0.norm.g",
        "attention.null_kv": "0.null_kv",
        "attention.to_q.weight": "0.to_q.weight",
        "attention.to_kv.weight": "0.to_kv.weight",
        "attention.to_out.weight": "0.to_out.0.weight",
        "attention.norm_out.g": "0.to_out.1.g",
        "feed_forward.norm.g": "1.0.g",
        "feed_forward.inwards.weight": "1.1.weight",
        "feed_forward.outwards.weight": "1.5.weight",
    }
    if config.inner_norm:
        names["feed_forward.inner_norm.g"] = "1.3.g"
    for i in range(config.layers):
        found += [same(f"{ours}.layers.{i}.{a}", f"{LAYERS}.{i}.{b}") for a, b in names.items()]
    return found
