"""The text tower of an open_clip model: token states after the final norm, and the projected embedding.

Only the text tensors are read, out of safetensors; no vision tower is built.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from cascade.conditioning import TextEmbedding, Tokens
from cascade.config import read_mapping, to_dict
from cascade.errors import InputError, unknown
from cascade.text.base import FrozenEncoder, TokenIds
from cascade.text.files import digests, resolve, verify

if TYPE_CHECKING:
    from open_clip.tokenizer import SimpleTokenizer
    from torch import nn

CONFIG_FILE = "open_clip_config.json"
WEIGHT_FILES = ("open_clip_model.safetensors", "model.safetensors")
TEXT_TENSORS = (
    "token_embedding.",
    "positional_embedding",
    "transformer.",
    "ln_final.",
    "text_projection",
    "cls_emb",
)


@dataclass(frozen=True, kw_only=True)
class OpenCLIPReference:
    """How a model folder names such an encoder."""

    kind: Literal["open_clip"] = "open_clip"
    name: str  # a folder, a hub repository, or (with `pretrained`) an architecture such as ViT-L-14
    pretrained: str | None = None  # open_clip's tag of the weights, such as openai
    revision: str | None = None
    max_length: int | None = None  # the tower's context length is fixed; another one is refused
    sha256: dict[str, str] = field(default_factory=dict)


class OpenCLIPEncoder(FrozenEncoder):
    """Frozen text tower with CLIP's byte-pair tokens. Sequence: states after ln_final, which the text
    projection does not touch; the mask ends with the end-of-text token. `pooled` of the result is the
    projected embedding at unit norm; `project` gives it as the network emits it."""

    def __init__(
        self,
        config: OpenCLIPReference,
        folder: Path | None,
        device: torch.device | str,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__(device, dtype or torch.float32)
        self.config = config
        self._parent = folder
        self._folder: Path | None = None
        self._loaded: tuple[SimpleTokenizer, nn.Module] | None = None

    @property
    def max_length(self) -> int:
        return int(self._text_config().get("context_length", 77))

    @property
    def dims(self) -> tuple[int, ...]:
        return (int(self._text_config().get("width", 512)),)

    def __call__(self, prompts: Sequence[str]) -> TextEmbedding:
        states, mask, projected = self.encode(prompts)
        return TextEmbedding((Tokens(states, mask),), F.normalize(projected, dim=-1))

    def project(self, prompts: Sequence[str]) -> Tensor:
        """Projected text embeddings without normalisation (B D), which unCLIP's decoders were fed."""
        return self.encode(prompts)[2]

    def to(self, device: torch.device | str) -> Self:
        self.device = torch.device(device)
        if self._loaded is not None:
            self._loaded[1].to(device=self.device)
        return self

    def reference(self) -> dict[str, Any]:
        """As given, with the sha256 of configuration and weights."""
        folder = self._find()
        result = to_dict(self.config)
        if self._parent is not None and (Path(self._parent) / self.config.name).is_dir():
            result["name"] = str(folder)
        if not result["sha256"]:
            result["sha256"] = digests(folder, [CONFIG_FILE, _weights(folder).name])
        return result

    def tokenise(self, prompts: list[str]) -> TokenIds:
        tokenizer, _ = self._load()
        ids = tokenizer(prompts, context_length=self.max_length)  # B L
        ends = (ids == tokenizer.eot_token_id).int().argmax(dim=1, keepdim=True)  # B 1, the first of them
        mask = torch.arange(ids.shape[1])[None] <= ends
        return TokenIds(ids, mask, [2 + len(tokenizer.encode(prompt)) for prompt in prompts])

    def forward(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        _, tower = self._load()
        projected, states = tower(ids)
        return states, projected

    def _find(self) -> Path:
        if self._folder is None:
            name = _repository(self.config.name, self.config.pretrained)
            self._folder = resolve(name, self.config.revision, self._parent, [CONFIG_FILE, *WEIGHT_FILES])
        return self._folder

    def _model_config(self) -> dict[str, Any]:
        config = read_mapping(self._find() / CONFIG_FILE).get("model_cfg")
        if not isinstance(config, dict) or not isinstance(config.get("text_cfg"), dict):
            raise InputError(f"{self._find() / CONFIG_FILE}: expected a model_cfg with a text_cfg")
        return config

    def _text_config(self) -> dict[str, Any]:
        text = self._model_config()["text_cfg"]
        if text.get("hf_model_name") or text.get("hf_tokenizer_name"):
            name = self.config.name
            raise InputError(f"{name}: expected CLIP's own tokens; load this text tower with kind 'hf'")
        length = text.get("context_length", 77)
        if self.config.max_length not in (None, length):
            raise InputError(
                f"max_length of {self.config.name}: expected {length}, got {self.config.max_length}"
            )
        return text

    def _load(self) -> tuple[SimpleTokenizer, nn.Module]:
        if self._loaded is None:
            text, folder = self._text_config(), self._find()
            verify(folder, self.config.sha256)
            from open_clip.tokenizer import SimpleTokenizer

            tokenizer = SimpleTokenizer(context_length=self.max_length, **text.get("tokenizer_kwargs", {}))
            tower = _tower(self._model_config(), _weights(folder))
            tower = tower.to(device=self.device, dtype=self.dtype).eval().requires_grad_(False)
            self._loaded = tokenizer, tower
        return self._loaded


def _repository(name: str, pretrained: str | None) -> str:
    """The folder or hub repository of a name, through open_clip's own table where a tag is given."""
    if pretrained is None:
        return name.removeprefix("hf-hub:").removeprefix("local-dir:")
    import open_clip
    from open_clip.pretrained import get_pretrained_cfg

    tags = open_clip.list_pretrained_tags_by_model(name)
    if pretrained not in tags:
        if not tags:
            raise unknown("open_clip architecture", name, open_clip.list_models())
        raise unknown(f"weights of open_clip {name}", pretrained, tags)
    hub = get_pretrained_cfg(name, pretrained).get("hf_hub", "")
    if not hub:
        raise InputError(
            f"open_clip {name} {pretrained}: not in safetensors on the hub; give a folder instead"
        )
    return "/".join(hub.split("/")[:2])


def _weights(folder: Path) -> Path:
    for name in WEIGHT_FILES:
        if (folder / name).is_file():
            return folder / name
    raise InputError(f"{folder}: expected {' or '.join(WEIGHT_FILES)}")


def _tower(config: dict[str, Any], weights: Path) -> nn.Module:
    """The text tower, filled. Checkpoints hold its tensors at the top level or under `text.`"""
    from open_clip.model import CLIPTextCfg, _build_text_tower
    from safetensors import SafetensorError, safe_open

    text = CLIPTextCfg(**config["text_cfg"])
    tower = _build_text_tower(config["embed_dim"], text, config.get("quick_gelu", False))
    tower.output_tokens = True
    try:
        with safe_open(weights, "pt") as file:
            names = list(file.keys())
            prefix = "text." if any(n.startswith("text.") for n in names) else ""
            chosen = [
                n for n in names if n.removeprefix(prefix).startswith(TEXT_TENSORS) and n.startswith(prefix)
            ]
            tensors = {n.removeprefix(prefix): file.get_tensor(n) for n in chosen}
        tower.load_state_dict(tensors)
    except (SafetensorError, RuntimeError) as error:
        raise InputError(f"{weights}: {' '.join(str(error).split())[:200]}") from None
    return tower
