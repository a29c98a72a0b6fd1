"""Small models of random weights, saved as the published ones are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import open_clip
import torch
import transformers
from safetensors.torch import save_file

CLIP_TEXT = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2}
CLIP_VISION = {"image_size": 32, "patch_size": 16, "width": 16, "layers": 2, "head_width": 8}


def save_transformers_clip(folder: Path) -> Any:
    torch.manual_seed(0)
    shared = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    text = dict(shared, vocab_size=49408, max_position_embeddings=77, eos_token_id=49407, bos_token_id=49406)
    vision = dict(shared, image_size=32, patch_size=16)
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    model = transformers.CLIPModel(config).eval()
    model.save_pretrained(folder)
    return model


def save_open_clip(folder: Path) -> Any:
    torch.manual_seed(0)
    model = open_clip.model.CLIP(embed_dim=8, vision_cfg=CLIP_VISION, text_cfg=CLIP_TEXT).eval()
    save_file(dict(model.state_dict()), folder / "open_clip_model.safetensors")
    config = {"embed_dim": 8, "vision_cfg": CLIP_VISION, "text_cfg": CLIP_TEXT}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    return model


def save_aesthetic_head(path: Path) -> torch.nn.Sequential:
    """Linear layers with dropout, which holds no tensors, between them."""
    torch.manual_seed(1)
    linear, dropout = torch.nn.Linear, torch.nn.Dropout
    layers = torch.nn.Sequential(linear(8, 6), dropout(), linear(6, 4), linear(4, 1)).eval()
    torch.save({f"layers.{name}": tensor for name, tensor in layers.state_dict().items()}, path)
    return layers
