"""Frozen text encoders. transformers and open_clip are imported when an encoder that needs them loads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from cascade.config import from_dict
from cascade.errors import InputError, unknown
from cascade.text.base import TextEncoder
from cascade.text.clean import clean_caption
from cascade.text.glide import GlideReference, GlideTokens
from cascade.text.huggingface import HuggingFaceEncoder, HuggingFaceReference
from cascade.text.minilm import MiniLM, MiniLMReference
from cascade.text.missing import MissingEncoder, MissingReference
from cascade.text.openclip import OpenCLIPEncoder, OpenCLIPReference
from cascade.text.pair import PairEncoder

__all__ = ["TextEncoder", "clean_caption", "load_text_encoder"]


def load_text_encoder(
    reference: Mapping[str, Any],
    folder: Path | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> TextEncoder:
    """The encoder that `reference` names. Nothing is read until it is used.

    `reference["kind"]`, with further keys as in the dataclass of that kind:
    minilm (`MiniLMReference`), hf (`HuggingFaceReference`: T5 and other encoders), open_clip
    (`OpenCLIPReference`: text towers), glide (`GlideReference`: token ids alone), pair (`encoders`: a list
    of references, side by side), missing (`MissingReference`: none, only what it would have to be).
    A `name` may be relative to `folder`, the model folder. `dtype` None is each kind's own choice.
    Raises InputError for an unknown kind or key, and, once used, for files that are missing or altered.
    """
    data, place = dict(reference), "text_encoder"
    match data.get("kind"):
        case "minilm":
            return MiniLM(from_dict(MiniLMReference, data, place), device, dtype)
        case "hf":
            return HuggingFaceEncoder(from_dict(HuggingFaceReference, data, place), folder, device, dtype)
        case "open_clip":
            return OpenCLIPEncoder(from_dict(OpenCLIPReference, data, place), folder, device, dtype)
        case "glide":
            return GlideTokens(from_dict(GlideReference, data, place), folder, device)
        case "pair":
            return PairEncoder([load_text_encoder(r, folder, device, dtype) for r in _pair(data)])
        case "missing":
            return MissingEncoder(from_dict(MissingReference, data, place))
        case kind:
            kinds = ["minilm", "hf", "open_clip", "glide", "pair", "missing"]
            raise unknown("kind of text encoder", kind, kinds)


def _pair(data: dict[str, Any]) -> list[Mapping[str, Any]]:
    for name in data:
        if name not in ("kind", "encoders"):
            raise unknown("key", name, ["kind", "encoders"], where="text_encoder")
    encoders = data.get("encoders")
    if (
        not isinstance(encoders, list)
        or len(encoders) < 2
        or not all(isinstance(e, Mapping) for e in encoders)
    ):
        raise InputError(f"text_encoder.encoders: expected a list of two references, got {encoders!r:.100}")
    return encoders
