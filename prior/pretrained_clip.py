"""Any CLIP of open_clip behind the interface of `prior.clip.CLIP`: pretrained, frozen, by reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cascade.conditioning import TextEmbedding
from cascade.errors import InputError
from prior.clip import MAX_LOGIT_SCALE, contrastive_loss, resize


@dataclass(frozen=True, kw_only=True)
class OpenClipConfig:
    """Which model: a name of `open_clip.list_models()` with a tag or a weights file in `pretrained`, or
    "hf-hub:owner/name" or "local-dir:/folder" with `pretrained` None."""

    model: str
    pretrained: str | None = None
    embed_dim: int
    unit_norm: bool = True  # False: embeddings as its projections emit them (Karlo, Kandinsky)


class OpenCLIP(nn.Module):
    """A frozen open_clip model. Its text tower is the pipeline's text encoder (kind open_clip, alone or in
    a pair), whose projected embedding arrives as `text.pooled`. Its vision tower is loaded at the first
    picture, stays outside the state dict, and is never saved."""

    config_class: ClassVar[type] = OpenClipConfig

    def __init__(self, config: OpenClipConfig):
        super().__init__()
        self.config = config
        self.logit_scale = nn.Parameter(torch.tensor(MAX_LOGIT_SCALE), requires_grad=False)
        self._loaded: list[nn.Module] = []  # in a list, so that it is no submodule

    @property
    def image_px(self) -> int:
        """Side of the pictures that the vision tower sees; loads the tower."""
        settings: Any = self._vision().preprocess_cfg
        return settings["size"][0] if isinstance(settings["size"], (tuple, list)) else settings["size"]

    def encode_text(self, text: TextEmbedding) -> Tensor:
        """B D, float32, of unit norm where the config says so. Raises InputError where the text encoder gave
        none of this width."""
        name, width = self.config.model, self.config.embed_dim
        if text.pooled is None or text.pooled.shape[-1] != width:
            got = "none" if text.pooled is None else f"width {text.pooled.shape[-1]}"
            raise InputError(
                f"clip {name}: expected embeddings of width {width} from an open_clip text encoder, got {got}"
            )
        return self._normed(text.pooled)

    @torch.no_grad()
    def encode_image(self, images: Tensor) -> Tensor:
        """images: B 3 H W in [-1, 1], any size (resized with an antialiasing filter).
        Returns B D, float32, of unit norm where the config says so."""
        tower = self._vision().to(images.device)
        settings: Any = tower.preprocess_cfg
        mean, std = (images.new_tensor(settings[key])[:, None, None] for key in ("mean", "std"))  # 3 1 1
        pixels = (resize(images, self.image_px) + 1) / 2
        features = tower((pixels - mean) / std)
        name, width = self.config.model, self.config.embed_dim
        if features.shape[-1] != width:
            raise InputError(f"clip {name}: expected embed_dim {width}, got {features.shape[-1]}")
        return self._normed(features)

    def loss(self, images: Tensor, text: TextEmbedding, group: Tensor | None = None) -> Tensor:
        """Contrastive loss of a batch, a scalar, for evaluation (see `CLIP.loss`)."""
        scale = self.logit_scale.exp()
        image, caption = (F.normalize(x, dim=-1) for x in (self.encode_image(images), self.encode_text(text)))
        return contrastive_loss(image, caption, scale, group)

    def _normed(self, features: Tensor) -> Tensor:
        return F.normalize(features.float(), dim=-1) if self.config.unit_norm else features.float()

    def _vision(self) -> nn.Module:
        if not self._loaded:
            self._loaded.append(_load_vision(self.config))
        return self._loaded[0]


def _load_vision(config: OpenClipConfig) -> nn.Module:
    """The vision tower with its weights, frozen. Raises InputError, one line, when anything is missing:
    open_clip alone would go on with random weights."""
    import open_clip

    try:
        model = open_clip.create_model(config.model, config.pretrained, require_pretrained=True)
    except (RuntimeError, ValueError, OSError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        tag = config.pretrained or "no tag"
        raise InputError(f"cannot load clip {config.model} ({tag}): {reason}") from None
    vision: Any = model.visual
    return vision.eval().requires_grad_(False)
