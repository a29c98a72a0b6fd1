"""Tokens for GLIDE's text transformer, which is part of its networks: GPT-2's byte pairs of the prompt in
lower case, padded with the end token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import torch

from cascade.conditioning import TextEmbedding, Tokens
from cascade.config import to_dict
from cascade.errors import InputError
from cascade.text.base import check_prompts, notify_truncated
from cascade.text.files import first_line, resolve

if TYPE_CHECKING:
    from tokenizers import Tokenizer

VOCABULARY = "tokenizer.json"
END = "<|endoftext|>"


@dataclass(frozen=True, kw_only=True)
class GlideReference:
    """How a model folder names it."""

    kind: Literal["glide"] = "glide"
    name: str = "openai-community/gpt2"  # a folder with tokenizer.json, or a hub repository
    revision: str | None = None
    max_length: int = 128


class GlideTokens:
    """Token ids (int64) as a sequence of width 1: the network embeds them. The mask ends with the prompt; ""
    has no token at all."""

    dims = (1,)

    def __init__(self, config: GlideReference, folder: Path | None, device: torch.device | str) -> None:
        self.config, self._parent = config, folder
        self.device = torch.device(device)
        self._loaded: tuple[Tokenizer, int] | None = None  # and the end token's id

    @property
    def max_length(self) -> int:
        return self.config.max_length

    def __call__(self, prompts: Sequence[str]) -> TextEmbedding:
        prompts = check_prompts(prompts)
        tokenizer, end = self._load()
        rows = [tokenizer.encode(prompt.lower()).ids for prompt in prompts]
        notify_truncated(prompts, [len(row) for row in rows], self.max_length)
        ids = torch.full((len(rows), self.max_length), end)  # B L
        mask = torch.zeros(len(rows), self.max_length, dtype=torch.bool)
        for i, row in enumerate(rows):
            kept = row[: self.max_length]
            ids[i, : len(kept)] = torch.tensor(kept, dtype=torch.long)
            mask[i, : len(kept)] = True
        return TextEmbedding((Tokens(ids[..., None].to(self.device), mask.to(self.device)),))

    def to(self, device: torch.device | str) -> Self:
        self.device = torch.device(device)
        return self

    def release(self) -> None:
        self._loaded = None

    def reference(self) -> dict[str, Any]:
        return to_dict(self.config)

    def _load(self) -> tuple[Tokenizer, int]:
        if self._loaded is None:
            from tokenizers import Tokenizer

            folder = resolve(self.config.name, self.config.revision, self._parent, [VOCABULARY])
            try:
                tokenizer = Tokenizer.from_file(str(folder / VOCABULARY))
            except Exception as error:  # tokenizers raises nothing narrower
                raise InputError(f"cannot read {folder / VOCABULARY}: {first_line(error)}") from None
            end = tokenizer.token_to_id(END)
            if end is None:
                raise InputError(f"{folder / VOCABULARY}: expected the token {END}, GPT-2's vocabulary")
            self._loaded = tokenizer, end
        return self._loaded
