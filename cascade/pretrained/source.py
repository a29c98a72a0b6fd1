"""Weights as the world keeps them: safetensors in one file, in shards, in a variant (fp16), or pickles.

Pickles (.bin, .pt, .pth, .ckpt, .th) are read only where the caller allows it, through torch's restricted
unpickler, which builds tensors and plain containers and calls nothing. What they held is kept beside them
as safetensors, so that they are opened once.
"""

from __future__ import annotations

import json
import logging
import pickle
import re
import secrets
import struct
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from cascade.config import read_mapping
from cascade.errors import InputError

STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")  # of a component's weights, in order of choice
LEGACY = (".bin", ".pt", ".pth", ".ckpt", ".th")
ALLOW_LEGACY = "--allow-legacy-checkpoint (in Python allow_legacy=True)"
WRAPPERS = ("ema_model", "state_dict", "model")  # where training programs keep the weights in a checkpoint
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}

_log = logging.getLogger("cascade")


class _Inert:
    """Stands for an object of a checkpoint that is no tensor, such as the version of the program."""

    def __init__(self, *_: object, **__: object) -> None: ...

    def __setstate__(self, _: object) -> None: ...


# Named in the checkpoints of DALLE2-pytorch beside the weights. Nothing of these modules is imported.
INERT: list[Any] = [
    (_Inert, name)
    for name in (
        "packaging.version.Version",
        "packaging.version._Version",
        "packaging._structures.InfinityType",
        "packaging._structures.NegativeInfinityType",
    )
]


# -- weights -----------------------------------------------------------------------------------------------


def read_tensors(
    place: Path,
    *,
    allow_legacy: bool = False,
    device: str = "cpu",
    stems: Iterable[str] = STEMS,
) -> dict[str, Tensor]:
    """The tensors of a component: of a folder, in whichever form it holds them, or of one file.

    Of several forms the first of these is read: safetensors, a variant of it, a pickle. device "meta" reads
    names, shapes and dtypes alone. Raises InputError, one line, for what is missing, damaged, or needs
    `allow_legacy`."""
    path = find_weights(place, stems)
    if path.suffix == ".json":
        return _read_shards(path, allow_legacy, device)
    return _read_file(path, allow_legacy, device)


def find_weights(place: Path, stems: Iterable[str] = STEMS) -> Path:
    """The file that names a component's weights: its only file, or the index of its shards."""
    if place.is_file():
        return place
    stems = tuple(stems)
    names = sorted(p.name for p in place.iterdir() if p.is_file()) if place.is_dir() else []
    for ending in ("safetensors", "|".join(e[1:] for e in LEGACY)):
        for stem in map(re.escape, stems):
            for variant in ("", r"\.\w+"):  # full precision before fp16
                shards = rf"{stem}\.(?:{ending})\.index{variant}\.json"
                whole = rf"{stem}{variant}\.(?:{ending})"
                for pattern in (shards, whole):
                    found = [name for name in names if re.fullmatch(pattern, name)]
                    if found:
                        return place / found[0]
    raise InputError(f"missing file {place / f'{stems[0]}.safetensors'}")


def has_weights(place: Path) -> bool:
    """Whether `find_weights` would find any."""
    try:
        return find_weights(place).is_file()
    except InputError:
        return False


def _read_shards(index: Path, allow_legacy: bool, device: str) -> dict[str, Tensor]:
    weight_map = read_mapping(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
        raise InputError(f"{index}: expected a weight_map from tensor to file name")
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(weight_map.values())):
        if Path(name).name != name:
            raise InputError(f"{index}: expected file names without a folder, got {name!r}")
        tensors |= _read_file(index.parent / name, allow_legacy, device)
    missing = sorted(weight_map.keys() - tensors.keys())
    if missing:
        raise InputError(f"shards of {index.parent} lack tensors listed in {index.name}: {few(missing)}")
    return tensors


def _read_file(path: Path, allow_legacy: bool, device: str) -> dict[str, Tensor]:
    if not path.is_file():
        raise InputError(f"missing file {path}")
    if path.suffix != ".safetensors":
        return _read_legacy(path, allow_legacy, device)
    try:
        return _shapes(path) if device == "meta" else load_file(path, device=device)
    except (SafetensorError, OSError, struct.error, ValueError) as error:
        reason = _cut_short(path) or next(iter(str(error).splitlines()), type(error).__name__)
        raise InputError(f"{path} is damaged or not safetensors ({reason})") from None


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """A safetensors file's description of its tensors, and where their data start."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > path.stat().st_size:
            raise ValueError("the header reaches past the end of the file")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return header, 8 + length


def _shapes(path: Path) -> dict[str, Tensor]:
    if (lost := _cut_short(path)) is not None:
        raise ValueError(lost)
    return {
        name: torch.empty(entry["shape"], dtype=DTYPES.get(entry["dtype"], torch.uint8), device="meta")
        for name, entry in _header(path)[0].items()
    }


def _cut_short(path: Path) -> str | None:
    """Which tensor a truncated file lacks, or None where that is not what is wrong."""
    try:
        header, start = _header(path)
        size = path.stat().st_size - start
        lost = [name for name, entry in header.items() if entry["data_offsets"][1] > size]
    except (OSError, struct.error, ValueError, LookupError, TypeError):
        return None
    return f"cut short: it ends before tensor {min(lost)}" if lost else None


def write_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a safetensors file."""
    # it stores neither channels_last nor memory that two tensors share
    plain = {name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()}
    save_file(plain, path, metadata={"format": "pt"})


# -- pickles -----------------------------------------------------------------------------------------------


def _read_legacy(path: Path, allow_legacy: bool, device: str) -> dict[str, Tensor]:
    converted = path.with_suffix(".safetensors")
    if converted.is_file():
        return _read_file(converted, allow_legacy, device)
    check_pickle(path, allow_legacy)
    tensors = read_pickle(path)
    _keep(tensors, converted)
    return {name: t.to(device) for name, t in tensors.items()} if device != "cpu" else tensors


def check_pickle(path: Path, allow_legacy: bool) -> None:
    """Raises InputError for a pickle that was not converted yet, where that is not allowed."""
    if not allow_legacy and not path.with_suffix(".safetensors").is_file():
        raise InputError(f"{path} is a pickle: expected safetensors; to convert it give {ALLOW_LEGACY}")


def read_pickle(path: Path) -> dict[str, Tensor]:
    """The tensors of a pickle, in its own order. Raises InputError where it asks for anything else, is
    damaged or holds none."""
    return flatten(_unpickle(path), str(path))


def _unpickle(path: Path) -> Any:
    """What torch's restricted unpickler makes of a file. Raises InputError for everything it refuses."""
    try:
        with torch.serialization.safe_globals(INERT), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of old protocols; what matters is raised
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        asked = re.search(r"(?:GLOBAL|global|class) `?([A-Za-z_]\w*\.[\w.]*\w)", str(error))
        what = f"it asks for {asked[1]}" if asked else "it is not of a kind that torch writes"
        raise InputError(f"{path}: refused, expected a pickle of tensors alone ({what})") from None
    except (OSError, EOFError, RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__).split(". ")[0]
        raise InputError(f"{path} is damaged or no checkpoint of torch ({reason})") from None


def flatten(checkpoint: Any, where: str) -> dict[str, Tensor]:
    """The tensors of an unpickled checkpoint: those of the weights where a training program wrapped them,
    else all, nested names joined by dots. Raises InputError where there are none."""
    if isinstance(checkpoint, Mapping):
        for key in WRAPPERS:
            if isinstance(checkpoint.get(key), Mapping):
                return flatten(checkpoint[key], where)
    tensors = dict(_leaves(checkpoint, ""))
    if not tensors:
        raise InputError(f"{where} holds no tensors")
    return tensors


def _leaves(node: Any, name: str) -> Iterable[tuple[str, Tensor]]:
    if isinstance(node, Tensor):
        yield name, node.detach()
    items = node.items() if isinstance(node, Mapping) else ()
    for key, value in enumerate(node) if isinstance(node, list | tuple) else items:
        yield from _leaves(value, f"{name}.{key}" if name else str(key))


def _keep(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write what a pickle held beside it. A folder that cannot be written to is no error."""
    temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        write_tensors(tensors, temporary)
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        _log.warning("%s is not kept (%s): the pickle will be read again", path, error)
    finally:
        temporary.unlink(missing_ok=True)


# -- licences ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Licence:
    """Under which terms weights may be used. `text` is the licence itself where the source holds it."""

    name: str
    text: str | None = None


def find_licence(folder: Path, default: str | None = None) -> Licence:
    """The licence that a folder holds (a LICENSE file, the front matter of README.md), else `default`, what
    the family is known to be published under."""
    names = sorted(p for p in folder.iterdir() if p.is_file()) if folder.is_dir() else []
    file = next((p for p in names if re.match(r"licen[cs]e", p.name, re.IGNORECASE)), None)
    text = None if file is None else file.read_text(encoding="utf-8", errors="replace")
    name = _front_matter(folder / "README.md")
    if name is None and text is not None:
        name = next((line.strip("# \t") for line in text.splitlines() if line.strip()), None)
    return Licence(name or default or "unknown: none was found beside the weights", text)


def _front_matter(path: Path) -> str | None:
    """The licence that a model card names."""
    if not path.is_file():
        return None
    match = re.match(r"---\n(.*?)\n---", path.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    try:
        data = yaml.safe_load(match[1]) if match else None
    except yaml.YAMLError:
        return None
    if not isinstance(data, dict):
        return None
    found = data.get("license_name") or data.get("license")
    return str(found) if found else None


# -- reports -----------------------------------------------------------------------------------------------


def few(names: list[str], most: int = 3) -> str:
    """The first names of a list, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
