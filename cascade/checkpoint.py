"""Model folders: safetensors and JSON, verified when read, complete or absent when written.

    model_index.json            classes, text encoder by reference, sha256 of every other file
    <component>/config.json     the component's config and `_class_name`
    <component>/diffusion_pytorch_model.safetensors (or shards with an .index.json)

The layout is the diffusers convention. Nothing here can execute code: no pickle, classes from a list.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor, nn

from cascade import __version__
from cascade.config import read_mapping
from cascade.errors import InputError, unknown
from cascade.pretrained.source import LEGACY, STEMS, read_tensors, write_tensors

CONFIG = "config.json"
WEIGHTS = f"{STEMS[0]}.safetensors"
INDEX = "model_index.json"
TEXT_ENCODER = (
    "text_encoder"  # key of the reference, and subfolder where the encoder's files are kept with the model
)
CLASSES = {
    "cascade": ("Stage",),
    "prior": ("DiffusionPrior", "AutoregressivePrior", "CLIP", "OpenCLIP", "LaionPrior"),
}
HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.yml", "*.yaml", "LICENSE*", "README.md"]
# txt and model are tokenizers' vocabularies, yml and yaml configurations of original repositories
UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
LAST = "last."  # prefix of the tensors of a stage's second network, that of its last step


@dataclass(frozen=True)
class Component:
    """What one component's folder holds."""

    class_name: str
    config: dict[str, Any]
    tensors: dict[str, Tensor]


@dataclass(frozen=True)
class ModelIndex:
    """model_index.json. `components` maps a subfolder to (library, class); the order is that of the file."""

    components: dict[str, tuple[str, str]]
    text_encoder: dict[str, Any] | None = None
    sha256: dict[str, str] = field(default_factory=dict)  # relative path -> hash; empty: nothing to check
    licence: str | None = None  # of the weights


# -- components --------------------------------------------------------------------------------------------


def save_component(
    folder: str | Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], class_name: str
) -> None:
    """Write config.json and the weights to `folder`; an existing folder is replaced only when the new one is
    complete on disk. `config` is plain data, as `cascade.config.to_dict` makes it."""
    with new_folder(folder) as temporary:
        write_json(temporary / CONFIG, {"_class_name": class_name, **config})
        write_tensors(tensors, temporary / WEIGHTS)


def load_component(folder: str | Path, class_name: str | None = None, device: str = "cpu") -> Component:
    """Read a component's folder. Raises InputError, one line, when a file is missing or damaged, or when the
    component is not of class `class_name`."""
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"no component folder {folder}: expected {CONFIG} and {WEIGHTS} in it")
    config = read_mapping(folder / CONFIG)
    found = config.get("_class_name", class_name)
    if class_name is not None and found != class_name:
        raise InputError(f"{folder / CONFIG}: expected class {class_name}, found {found!r}")
    settings = {name: value for name, value in config.items() if not name.startswith("_")}
    return Component(str(found), settings, read_tensors(folder, device=device, stems=STEMS[:1]))


def load_tensors(module: nn.Module, tensors: Mapping[str, Tensor], where: str | Path) -> None:
    """Put `tensors` into `module`: copied into its dtype, or taken as they are when it is on the meta device.
    Raises InputError as `check_tensors`; then nothing is loaded."""
    wanted = module.state_dict()
    check_tensors(tensors, wanted, where)
    module.load_state_dict(dict(tensors), strict=True, assign=any(t.is_meta for t in wanted.values()))


def check_tensors(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], where: str | Path) -> None:
    """Raise InputError, one line, that names the first missing, unexpected, transposed or wrongly shaped
    tensor of each kind. A transposed square matrix cannot be told by its shape."""
    missing = [f"{name} {_shape(t)}" for name, t in expected.items() if name not in found]
    unexpected = [f"{name} {_shape(t)}" for name, t in found.items() if name not in expected]
    transposed, shaped = [], []
    for name, t in expected.items():
        if name in found and found[name].shape != t.shape:
            line = f"{name}, {_shape(found[name])} instead of {_shape(t)}"
            (transposed if found[name].shape == t.shape[::-1] else shaped).append(line)
    kinds = {
        "missing tensor": missing,
        "unexpected tensor": unexpected,
        "transposed tensor": transposed,
        "wrongly shaped tensor": shaped,
    }
    problems = [
        f"{kind} {lines[0]}{f' and {len(lines) - 1} more' if len(lines) > 1 else ''}"
        for kind, lines in kinds.items()
        if lines
    ]
    if problems:
        raise InputError(f"{where}: {'; '.join(problems)}")


def _shape(tensor: Tensor) -> str:
    return str(list(tensor.shape))


# -- whole models ------------------------------------------------------------------------------------------


def write_index(folder: Path, index: ModelIndex) -> None:
    """Write model_index.json with the sha256 of every file of the components and the text encoder."""
    parts = [*index.components, TEXT_ENCODER]
    files = [path for part in parts for path in sorted((folder / part).rglob("*")) if path.is_file()]
    data: dict[str, Any] = {"_class_name": "Cascade", "_cascade_version": __version__}
    if index.licence is not None:
        data["_licence"] = index.licence
    data |= {name: list(pair) for name, pair in index.components.items()}
    data[TEXT_ENCODER] = index.text_encoder
    data["sha256"] = {p.relative_to(folder).as_posix(): sha256(p) for p in files}
    write_json(folder / INDEX, data)


def read_index(folder: Path) -> ModelIndex:
    """Read and check model_index.json. Raises InputError for a component whose class is not in `CLASSES`."""
    path = folder / INDEX
    if not path.is_file():
        raise InputError(f"{folder} is not a model folder: expected {INDEX} in it")
    data = read_mapping(path)
    hashes, encoder = data.pop("sha256", {}), data.pop(TEXT_ENCODER, None)
    if not isinstance(hashes, dict) or not isinstance(encoder, dict | None):
        raise InputError(f"{path}: expected sha256 and text_encoder to be mappings")
    components = {}
    for name, pair in data.items():
        if name.startswith("_"):
            continue
        if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
            raise InputError(f"{path}: component name {name!r}: expected letters, digits, - and _")
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(part, str) for part in pair)):
            raise InputError(f"{path}: component {name}: expected [library, class], got {pair!r}")
        library, class_name = pair
        if library not in CLASSES:
            raise unknown("library", library, CLASSES, where=f"{path}: {name}")
        if class_name not in CLASSES[library]:
            raise unknown("class", class_name, CLASSES[library], where=f"{path}: {name}")
        components[name] = (library, class_name)
    licence = data.get("_licence")
    return ModelIndex(
        components,
        encoder,
        {str(k): str(v) for k, v in hashes.items()},
        None if licence is None else str(licence),
    )


def verify(folder: Path, index: ModelIndex) -> None:
    """Check every file the index lists, and that it lists every file of its components. An index without
    hashes passes. Raises InputError naming the first file that is missing, unlisted or different."""
    if not index.sha256:
        return
    for name, expected in index.sha256.items():
        path = folder / name
        if not path.resolve().is_relative_to(folder.resolve()):
            raise InputError(f"{folder / INDEX}: {name!r} lies outside the model folder")
        if not path.is_file():
            raise InputError(f"missing file {path}")
        actual = sha256(path)
        if actual != expected:
            raise InputError(
                f"{path} differs from {INDEX}: expected sha256 {expected[:12]}..., got {actual[:12]}...; "
                "the file is damaged or was changed"
            )
    for name in [*index.components, TEXT_ENCODER]:
        for path in sorted((folder / name).glob("*.*")):
            if path.suffix in (".json", ".safetensors") and f"{name}/{path.name}" not in index.sha256:
                raise InputError(f"{path} is not listed in {INDEX}: expected a sha256 for it")


def resolve_source(source: str | Path, revision: str | None = None, legacy: bool = False) -> Path:
    """The folder of a model: a folder as it is, a hub id (owner/name) after download of its configuration,
    safetensors, vocabularies and, with `legacy`, pickles. Raises InputError where there is none."""
    folder = Path(source)
    if folder.is_dir():
        return folder
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", str(source)):
        raise InputError(f"no model {str(source)!r}: expected a folder with {INDEX}, or a hub id owner/name")
    from huggingface_hub import snapshot_download  # only a hub id needs it

    try:
        wanted = [*HUB_FILES, *(f"*{ending}" for ending in LEGACY)] if legacy else HUB_FILES
        return Path(snapshot_download(str(source), revision=revision, allow_patterns=wanted))
    except (OSError, ValueError) as error:  # offline, unknown id, no access: many classes, one meaning
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"no folder {str(source)!r}, and it cannot be had from the hub ({reason})") from None


# -- files -------------------------------------------------------------------------------------------------


@contextmanager
def new_folder(folder: str | Path) -> Iterator[Path]:
    """A temporary folder beside `folder` that takes its name when the block ends without an error.

    The old folder, if any, goes only after the new one is flushed and in its place. After an error the
    temporary folder is removed and the old one is untouched. Raises InputError for a disk that is full."""
    folder = Path(folder).resolve()  # a link stays a link: what it points to is replaced
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.new-", dir=folder.parent))
    except OSError as error:
        raise InputError(f"cannot write to {folder.parent}: {error.strerror}") from None
    try:
        temporary.chmod(0o755)  # mkdtemp's 0700 would keep other users from reading a shared model
        yield temporary
        for path in [*temporary.rglob("*"), temporary]:
            _flush(path)
        if folder.exists():
            _replace(folder, temporary)
        else:
            os.replace(temporary, folder)
        _flush(folder.parent)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if reason := _why_unwritable(error):
            raise InputError(f"cannot write {folder}: {reason}; what was there before stays") from None
        raise


def _replace(folder: Path, new: Path) -> None:
    old = Path(tempfile.mkdtemp(prefix=f".{folder.name}.old-", dir=folder.parent))
    try:
        os.replace(folder, old)  # onto an empty folder: atomic
        os.replace(new, folder)
    except BaseException:
        if folder.exists():
            old.rmdir()
        else:
            os.replace(old, folder)
        raise
    shutil.rmtree(old)


def _why_unwritable(error: BaseException) -> str | None:
    """Of an error that the disk made, as Python or safetensors tells it."""
    if isinstance(error, OSError) and error.errno in UNWRITABLE:
        return error.strerror
    told = isinstance(error, SafetensorError) and re.search(r"I/O error: (.*) \(os error (\d+)\)", str(error))
    return told[1] if told and int(told[2]) in UNWRITABLE else None


def write_json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
