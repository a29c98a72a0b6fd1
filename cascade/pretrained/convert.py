"""`cascade convert`: folders of any family and layout to one folder of this project."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cascade import checkpoint
from cascade.errors import InputError
from cascade.fit import check_fit
from cascade.pretrained.model import Model, TextFiles, is_own, merge, open_model, select
from cascade.pretrained.source import LEGACY, Licence, has_weights, read_tensors, write_tensors

LICENCE_FILE = "LICENSE"


def open_sources(sources: Sequence[str | Path], allow_legacy: bool = False) -> Model:
    """One model of several sources. A source is a folder, a hub id, or either with the parts to take of it:
    "SOURCE:PART,PART". Raises InputError, one line, where parts do not fit together, with the reason."""
    model = merge([_open(str(source), allow_legacy) for source in sources])
    stages = [stage for part in model.parts.values() if (stage := part.stage) is not None]
    prior = model.parts.get("prior")
    check_fit(
        sorted(stages, key=lambda stage: stage.image_px),
        tuple(dim for text in model.text for dim in text.dims),
        None if prior is None else prior.config.get("embed_dim"),
    )
    return model


def _open(source: str, allow_legacy: bool) -> Model:
    chosen = None
    if not Path(source).exists() and (match := re.fullmatch(r"(.+):([\w,-]+)", source)):
        source, chosen = match[1], match[2].split(",")
    folder = checkpoint.resolve_source(source, legacy=allow_legacy)
    if is_own(folder):
        checkpoint.verify(folder, checkpoint.read_index(folder))
    model = open_model(folder, allow_legacy)
    return model if chosen is None else select(model, chosen)


def convert(model: Model, folder: Path, dtype: torch.dtype | None = None, allow_legacy: bool = False) -> None:
    """Write the model as a folder of this project: safetensors and JSON, text encoder's files and licence.
    dtype: of the stages (default: as they are). Raises InputError for a folder that is not empty."""
    check_empty(folder)
    with checkpoint.new_folder(folder) as new:
        components = {}
        for name, part in model.parts.items():
            tensors = in_dtype(part.read("cpu"), dtype if part.library == "cascade" else None)
            checkpoint.save_component(new / name, part.config, tensors, part.class_name)
            components[name] = (part.library, part.class_name)
        text = _store_text(model.text, new, allow_legacy)
        if model.licence is not None:
            (new / LICENCE_FILE).write_text(licence_text(model.licence), encoding="utf-8")
        name = None if model.licence is None else model.licence.name
        checkpoint.write_index(new, checkpoint.ModelIndex(components, text, licence=name))


def check_empty(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} is not empty: expected a new or empty folder")


def in_dtype(tensors: dict[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """The tensors with floating-point numbers in `dtype`."""
    if dtype is None:
        return tensors
    return {name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}


def licence_text(licence: Licence) -> str:
    return licence.text if licence.text else f"{licence.name}\n"


# -- text encoders -----------------------------------------------------------------------------------------


def _store_text(texts: Sequence[TextFiles], new: Path, allow_legacy: bool) -> dict[str, Any]:
    """Copy the encoders' files under text_encoder/; the reference to them there."""
    references = []
    for i, text in enumerate(texts):
        place = checkpoint.TEXT_ENCODER + (f"/{i}" if len(texts) > 1 else "")
        for folder in text.folders:
            _copy(text.root / folder, new / place / folder, allow_legacy)
        references.append(text.stored(place))
    return references[0] if len(references) == 1 else {"kind": "pair", "encoders": references}


def _copy(source: Path, target: Path, allow_legacy: bool) -> None:
    """A folder of an encoder or tokeniser. Weights that a pickle alone holds become safetensors."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns(*(f"*{ending}" for ending in LEGACY)))
    if has_weights(source) and not any(source.glob("*.safetensors")):
        tensors = read_tensors(source, allow_legacy=allow_legacy)
        write_tensors(tensors, target / "model.safetensors")
