"""A model before its networks are built: what a folder holds, of whichever family and layout, in our terms.

`open_model` reads descriptions alone. Tensors are read, and checked against them, when a part is asked for
its own; of device "meta" come their names, shapes and formats without the numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from cascade import checkpoint
from cascade.config import StageConfig, from_dict
from cascade.errors import InputError, unknown
from cascade.pretrained.source import Licence, find_licence
from cascade.text import load_text_encoder

OWN = "cascade"  # family of this project's folders
T = TypeVar("T")
Read = Callable[[str], dict[str, Tensor]]  # device -> tensors


@dataclass(frozen=True)
class Part:
    """A stage, a prior or a CLIP. `config` is plain data of the class `class_name` in `library`."""

    name: str
    library: str
    class_name: str
    config: dict[str, Any]
    read: Read
    where: str

    @property
    def stage(self) -> StageConfig | None:
        if self.library != "cascade":
            return None
        return self.typed_config(StageConfig)

    def typed_config(self, cls: type[T]) -> T:
        """The configuration as a dataclass. Raises InputError that names the first field that is wrong."""
        return from_dict(cls, self.config, where=self.where)


@dataclass(frozen=True)
class TextFiles:
    """A text encoder: its reference, relative to `root`, and the folders there that hold its files."""

    reference: dict[str, Any]
    root: Path
    folders: tuple[str, ...] = ()
    expected: tuple[int, ...] | None = None  # widths of its token sequences where the parts tell them

    @property
    def dims(self) -> tuple[int, ...]:
        """Widths of its token sequences, those of its files where they are at hand."""
        if self.expected is not None and not self.folders:
            return self.expected
        return tuple(load_text_encoder(self.reference, self.root).dims)

    def stored(self, place: str) -> dict[str, Any]:
        """The reference once the files are in the folder `place` of a model."""
        return {**self.reference, "name": place} if self.folders else self.reference


@dataclass(frozen=True)
class Model:
    """What a folder holds."""

    folder: Path
    family: str
    parts: dict[str, Part]
    text: tuple[TextFiles, ...]  # side by side; each gives one token sequence or more
    licence: Licence | None = None
    unused: tuple[str, ...] = ()  # components of the folder that have no use here
    missing: tuple[str, ...] = ()  # what the parts would need beside them


def is_own(folder: Path) -> bool:
    """Whether a folder is in this project's layout."""
    from cascade.pretrained.folders import is_diffusers

    return (folder / checkpoint.INDEX).is_file() and not is_diffusers(folder)


def open_model(folder: Path, allow_legacy: bool = False) -> Model:
    """Read what a folder describes. Raises InputError, one line, where it is of no known layout."""
    from cascade.pretrained.folders import is_diffusers, open_diffusers
    from cascade.pretrained.originals import open_original

    if is_diffusers(folder):
        return open_diffusers(folder, allow_legacy)
    if is_own(folder):
        return _open_own(folder)
    return open_original(folder, allow_legacy)


def _open_own(folder: Path) -> Model:
    index = checkpoint.read_index(folder)
    if index.text_encoder is None:
        raise InputError(f"{folder / checkpoint.INDEX}: missing key 'text_encoder'")
    parts = {}
    for name, (library, class_name) in index.components.items():
        place = folder / name
        config = checkpoint.load_component(place, class_name, "meta").config
        part = Part(name, library, class_name, config, _component(place, class_name), str(place))
        stage = part.stage
        if stage is not None and stage.name != name:
            raise InputError(f"{place}: expected a stage of that name, found {stage.name!r}")
        parts[name] = part
    licence = None if index.licence is None else replace(find_licence(folder), name=index.licence)
    return Model(folder, OWN, parts, _own_text(index.text_encoder, folder), licence)


def _own_text(reference: dict[str, Any], folder: Path) -> tuple[TextFiles, ...]:
    encoders = reference.get("encoders") if reference.get("kind") == "pair" else None
    if encoders is not None:
        return tuple(text for encoder in encoders for text in _own_text(encoder, folder))
    place = str(reference.get("name", ""))
    inside = place.split("/")[0] == checkpoint.TEXT_ENCODER and (folder / place).is_dir()
    if not inside:
        return (TextFiles(reference, folder),)
    return (TextFiles({**reference, "name": "."}, folder / place, (".",)),)


def _component(place: Path, class_name: str) -> Read:
    return lambda device: checkpoint.load_component(place, class_name, device).tensors


# -- several sources ---------------------------------------------------------------------------------------


def select(model: Model, names: Sequence[str]) -> Model:
    """A model of some of the parts."""
    for name in names:
        if name not in model.parts:
            raise unknown("part", name, model.parts, where=str(model.folder))
    return replace(model, parts={name: model.parts[name] for name in names})


def merge(models: Sequence[Model]) -> Model:
    """Parts of several sources as one model. Where their text encoders differ they stand side by side, and
    each part reads the tokens of its own; that of a source whose parts read none is left out. Raises
    InputError where two sources have the same part."""
    encoders: list[TextFiles] = []
    found: dict[str, tuple[Part, list[int]]] = {}
    for model in models:
        reads = len(models) == 1 or any(map(_reads_text, model.parts.values()))
        places = [_place(encoders, text) for text in model.text] if reads else []
        for name, part in model.parts.items():
            if name in found:
                raise InputError(
                    f"both {found[name][0].where} and {part.where} are a part {name!r}: expected one; choose "
                    f"with SOURCE:PART,PART (parts of {model.folder}: {', '.join(model.parts)})"
                )
            found[name] = part, places
    parts = {name: part for name, (part, _) in found.items()}
    encoders = encoders or list(models[0].text)
    if len(encoders) > 1:
        parts = {name: _renumbered(part, places) for name, (part, places) in found.items()}
    families = dict.fromkeys(model.family for model in models)
    needs = [set(model.missing) for model in models]
    return Model(
        models[0].folder,
        " and ".join(families),
        parts,
        tuple(encoders),
        _both([model.licence for model in models if model.licence is not None]),
        tuple(name for model in models for name in model.unused),
        tuple(sorted(set.intersection(*needs))),
    )


def _reads_text(part: Part) -> bool:
    stage = part.stage
    return stage is None or bool(stage.unet.text_dims)


def _place(encoders: list[TextFiles], text: TextFiles) -> int:
    """Where a text encoder stands among those found so far, to which it is added where it is new. One that
    is missing is any of its width, and the other way round."""
    for i, other in enumerate(encoders):
        lacks = [e.reference.get("kind") == "missing" for e in (other, text)]
        if _same_text(other, text) or (any(lacks) and other.dims == text.dims):
            if lacks == [True, False]:
                encoders[i] = text
            return i
    encoders.append(text)
    return len(encoders) - 1


def _same_text(first: TextFiles, second: TextFiles) -> bool:
    """The same encoder by reference, or by files of the same names and sizes in two folders."""
    ours, theirs = ({k: v for k, v in text.reference.items() if k != "sha256"} for text in (first, second))
    return ours == theirs and _sizes(first) == _sizes(second)


def _sizes(text: TextFiles) -> dict[str, int]:
    files = [p for place in text.folders for p in (text.root / place).rglob("*") if p.is_file()]
    return {p.relative_to(text.root).as_posix(): p.stat().st_size for p in files}


def _renumbered(part: Part, places: list[int]) -> Part:
    """The part where the token sequences it knew now stand at `places` among others."""
    config = dict(part.config)
    if part.library == "cascade" and config["unet"].get("text_dims"):
        own = config.get("text_sequences") or range(len(places))
        config["text_sequences"] = [places[i] for i in own]
    elif "text_sequence" in config:
        config["text_sequence"] = places[config["text_sequence"]]
    return replace(part, config=config)


def _both(licences: Sequence[Licence]) -> Licence | None:
    names = list(dict.fromkeys(licence.name for licence in licences))
    texts = list(dict.fromkeys(licence.text for licence in licences if licence.text))
    return Licence("; ".join(names), "\n\n".join(texts) or None) if licences else None
