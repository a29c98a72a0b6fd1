"""From a folder, of this project or another, to networks and text encoder, and back to a folder."""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cascade import checkpoint
from cascade.config import to_dict
from cascade.errors import InputError
from cascade.nn.unet import UNet
from cascade.pretrained.model import Model, Part, TextFiles, is_own, open_model
from cascade.stage import Stage
from cascade.text import TextEncoder, load_text_encoder
from cascade.text.pair import PairEncoder


def find_model(
    source: str | Path, revision: str | None = None, *, verify: bool = True, allow_legacy: bool = False
) -> Model:
    """What a folder or a hub id holds; with `verify`, the files of this project's folders are checked."""
    folder = checkpoint.resolve_source(source, revision, allow_legacy)
    if verify and is_own(folder):
        checkpoint.verify(folder, checkpoint.read_index(folder))
    return open_model(folder, allow_legacy)


def build(part: Part) -> nn.Module:
    """The part with its weights, on the CPU. A stage's are in the format of the file, others' in float32."""
    stage = part.stage
    if stage is not None:
        with torch.device("meta"):  # no time spent on initial values
            unet = UNet(stage.unet)
            last = None if stage.last_unet is None else UNet(stage.last_unet)
        built = Stage(stage, unet, last)
        fill_stage(built, part.read("cpu"), part.where)
        return built
    cls = getattr(importlib.import_module(part.library), part.class_name)
    module = cls(part.typed_config(cls.config_class))
    checkpoint.load_tensors(module, part.read("cpu"), part.where)
    return module


def fill_stage(stage: Stage, tensors: Mapping[str, Tensor], where: str) -> None:
    """Put a component's tensors into the stage's networks."""
    prefix = checkpoint.LAST
    if stage.last is None:
        checkpoint.load_tensors(stage.unet, tensors, where)
        return
    last = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
    first = {name: t for name, t in tensors.items() if not name.startswith(prefix)}
    checkpoint.load_tensors(stage.unet, first, where)
    checkpoint.load_tensors(stage.last.net, last, f"{where} (last step)")


def read_text_encoder(texts: tuple[TextFiles, ...], device: torch.device | str) -> TextEncoder:
    """The text encoder of a model, or its encoders side by side."""
    encoders = [load_text_encoder(text.reference, text.root, device) for text in texts]
    return encoders[0] if len(encoders) == 1 else PairEncoder(encoders)


# -- back to a folder --------------------------------------------------------------------------------------


def save_model(
    folder: Path, parts: Mapping[str, nn.Module], text: Mapping[str, Any], dtype: torch.dtype | None
) -> None:
    """Write a model folder (see `Cascade.save_pretrained`). text: the text encoder's reference."""
    extras = _extras(folder) if folder.exists() else []
    components: dict[str, tuple[str, str]] = {}
    with checkpoint.new_folder(folder) as new:
        for name, part in parts.items():
            class_name = type(part).__name__
            checkpoint.save_component(
                new / name, to_dict(part.config), component_tensors(part, dtype), class_name
            )
            components[name] = ("cascade" if isinstance(part, Stage) else "prior", class_name)
        for path in extras:
            if path.name not in components:
                copy = shutil.copytree if path.is_dir() else shutil.copy2
                copy(path, new / path.name)
        checkpoint.write_index(new, checkpoint.ModelIndex(components, _relative(text, folder)))


def component_tensors(part: nn.Module, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """A component's tensors as its folder holds them: floating-point parameters, not buffers, in `dtype`."""
    if not isinstance(part, Stage):
        return _weights(part, dtype)
    last = {} if part.last is None else _weights(part.last.net, dtype)
    return _weights(part.unet, dtype) | {f"{checkpoint.LAST}{name}": t for name, t in last.items()}


def _weights(module: nn.Module, dtype: torch.dtype | None) -> dict[str, Tensor]:
    floating = {name for name, p in module.named_parameters() if p.is_floating_point()}
    return {name: t.to(dtype) if name in floating else t for name, t in module.state_dict().items()}


def _extras(folder: Path) -> list[Path]:
    """What a model folder holds beside its components and index. Raises InputError for any other folder."""
    entries = sorted(folder.iterdir()) if folder.is_dir() else [folder]
    if not entries:
        return []
    if folder / checkpoint.INDEX not in entries:
        raise InputError(f"{folder} is no model folder and not empty: expected a new or empty folder")
    own = {checkpoint.INDEX, *checkpoint.read_index(folder).components}
    return [path for path in entries if path.name not in own]


def _relative(reference: Any, folder: Path) -> Any:
    """A text encoder's reference in which a path into the model folder is relative to it."""
    if isinstance(reference, Mapping):
        return {key: _relative(value, folder) for key, value in reference.items()}
    if isinstance(reference, list):
        return [_relative(value, folder) for value in reference]
    if isinstance(reference, str) and Path(reference).is_relative_to(folder.resolve()):
        return Path(reference).relative_to(folder.resolve()).as_posix()
    return reference
