"""ImageReward (arXiv:2304.05977): a BLIP that reads the prompt with the picture before it, and a chain of
linear layers that gives the pair a mark, about N(0, 1) over the pictures it was trained on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from tokenizers.implementations.bert_wordpiece import BertWordPieceTokenizer
from torch import Tensor, nn
from transformers import BlipTextConfig, BlipTextModel

from cascade.checkpoint import load_tensors
from cascade.config import read_mapping
from cascade.errors import InputError
from cascade.pretrained.source import read_tensors
from eval.extractors.base import Extractor, find_folder
from eval.extractors.clip import CLIP_MEAN, CLIP_STD
from eval.extractors.resize import PILLOW, pillow
from eval.extractors.vision import standardise

MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of its marks in training
LENGTH = 35  # tokens, the rest is cut off
HEAD_CHANNELS = 64  # of an attention head in BLIP's ViTs
TEXT_SIZES = (  # what of med_config.json decides the text half
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
    "hidden_act",
    "layer_norm_eps",
)


class ImageReward(Extractor):
    """From a folder or repository of ImageReward.pt (or .safetensors), med_config.json and the tokenizer's
    vocab.txt (that of bert-base-uncased). Rows are of one number."""

    reads_text = True

    def __init__(self, source: str, allow_legacy: bool = False) -> None:
        folder = find_folder(source, allow_legacy)
        weights = next((p for p in sorted(folder.glob("ImageReward.*")) if p.suffix != ".json"), None)
        if weights is None or not (folder / "vocab.txt").is_file():
            raise InputError(f"{folder}: expected ImageReward.pt, med_config.json and vocab.txt in it")
        tensors = read_tensors(weights, allow_legacy=allow_legacy)
        self.module = _Pair(tensors, read_mapping(folder / "med_config.json"))
        wanted = self.module.state_dict().keys()  # the file also holds what only BLIP's own training used
        load_tensors(self.module, {name: t for name, t in tensors.items() if name in wanted}, weights)
        self.px = self.module.px
        self.network, self.resize = "ImageReward (BLIP)", PILLOW.format("bicubic", self.px)
        self.tokenizer = BertWordPieceTokenizer(str(folder / "vocab.txt"))
        self.tokenizer.enable_truncation(LENGTH)
        self.tokenizer.enable_padding(length=LENGTH)

    def prepare(self, picture: Tensor) -> Tensor:
        return standardise(pillow(picture, self.px), CLIP_MEAN, CLIP_STD)

    @torch.no_grad()
    def encode(self, pictures: Sequence[Tensor], texts: Sequence[str]) -> Tensor:
        found = self.tokenizer.encode_batch(list(texts))
        ids, mask = (
            torch.tensor([getattr(row, key) for row in found], device=self.device)
            for key in ("ids", "attention_mask")
        )
        return self.module(torch.stack(list(pictures)).to(self.device), ids, mask).float().cpu()


class _Pair(nn.Module):
    """Both halves under the names of the published file, with sizes read off its tensors."""

    def __init__(self, tensors: Mapping[str, Tensor], text: Mapping[str, Any]) -> None:
        super().__init__()
        try:
            patches, width = tensors["blip.visual_encoder.pos_embed"].shape[1:]
            patch = tensors["blip.visual_encoder.patch_embed.proj.weight"].shape[-1]
            steps = sorted(int(n.split(".")[2]) for n in tensors if n.startswith("mlp.layers.") and "w" in n)
            head = {str(i): tensors[f"mlp.layers.{i}.weight"].shape for i in steps}
        except (KeyError, ValueError) as error:
            raise InputError(f"ImageReward's file lacks {error}: expected the published names") from None
        depth = len({n.split(".")[3] for n in tensors if n.startswith("blip.visual_encoder.blocks.")})
        self.px = math.isqrt(patches - 1) * patch
        vision = VisionTransformer(
            self.px,
            patch,
            embed_dim=width,
            depth=depth,
            num_heads=width // HEAD_CHANNELS,
            num_classes=0,
            global_pool="",
        )
        config = BlipTextConfig(
            **{name: text[name] for name in TEXT_SIZES if name in text},
            encoder_hidden_size=width,
            bos_token_id=None,
            sep_token_id=None,
        )
        reader = BlipTextModel(config, add_pooling_layer=False)
        self.blip = nn.ModuleDict({"visual_encoder": vision, "text_encoder": reader})
        layers = nn.ModuleDict({name: nn.Linear(inner, outer) for name, (outer, inner) in head.items()})
        self.mlp = nn.ModuleDict({"layers": layers})

    def forward(self, pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """B 3 px px, B L and B L to B 1."""
        seen = self.blip["visual_encoder"](pixels)  # B 1+P D
        read = self.blip["text_encoder"](ids, attention_mask=mask, encoder_hidden_states=seen)
        mark = read.last_hidden_state[:, 0]  # B D
        for layer in self.mlp["layers"].values():  # type: ignore[operator]
            mark = layer(mark)
        return (mark - MEAN) / STD
