"""What every extractor offers, and where its weights come from."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError
from torch import Tensor

from cascade.errors import InputError
from cascade.pretrained.source import LEGACY, read_tensors


class Extractor(ABC):
    """A frozen network from pictures to rows of numbers."""

    network: str  # which network, in words
    resize: str  # how a picture is brought to its input, in words
    module: Any  # an nn.Module; each has attributes of its own
    batch: ClassVar[int] = 32  # pictures at a time; fixed, for a row's last bits may depend on it
    reads_text: ClassVar[bool] = False  # whether a picture's row depends on its text

    def to(self, device: torch.device | str) -> None:
        self.module.to(device).eval().requires_grad_(False)

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    def fingerprint(self) -> str:
        """sha256 of the weights and of the words above: equal where the rows of a picture are."""
        return digest(self.module.state_dict(), self.network, self.resize)

    @abstractmethod
    def prepare(self, picture: Tensor) -> Tensor:
        """3 H W in [-1, 1] to what `encode` takes of one picture."""

    @abstractmethod
    def encode(self, pictures: Sequence[Tensor], texts: Sequence[str]) -> Tensor:
        """Prepared pictures and the texts they were drawn for to B D, float32."""


class JointExtractor(Extractor):
    """One that maps texts to the same space."""

    @abstractmethod
    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """B D, float32."""


def digest(tensors: Mapping[str, Tensor], *words: str) -> str:
    found = hashlib.sha256("\x1f".join(words).encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        found.update(f"\x1f{name} {tensor.dtype} {list(tensor.shape)}".encode())
        found.update(tensor.flatten().view(torch.uint8).numpy().data if tensor.numel() else b"")
    return found.hexdigest()


def find_file(source: str) -> Path:
    """A file by path, or owner/name/FILE of a hub repository. Raises InputError where it is neither."""
    if (path := Path(source).expanduser()).is_file():
        return path
    owner, _, rest = source.partition("/")
    name, _, file = rest.partition("/")
    if path.is_absolute() or not (owner and name and file):
        raise InputError(f"no file {source}: expected a path, or owner/name/FILE of a hub repository")
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(f"{owner}/{name}", file))
    except (OSError, ValueError) as error:  # no network, no such repository, no valid name
        raise InputError(f"no file {source}, here or on the hub: {first_line(error)}") from None


def find_folder(source: str, allow_legacy: bool = False) -> Path:
    """A folder by path, or the files of the hub repository owner/name, pickles where they are allowed. Raises
    InputError likewise."""
    if (path := Path(source).expanduser()).is_dir():
        return path
    if source.count("/") != 1 or path.is_absolute():
        raise InputError(f"no folder {source}: expected a path, or owner/name of a hub repository")
    from huggingface_hub import snapshot_download

    endings = (".json", ".safetensors", ".txt", *(LEGACY if allow_legacy else ()))
    try:
        return Path(snapshot_download(source, allow_patterns=[f"*{ending}" for ending in endings]))
    except (OSError, ValueError) as error:
        raise InputError(f"no folder {source}, here or on the hub: {first_line(error)}") from None


def as_safetensors(path: Path, allow_legacy: bool) -> Path:
    """A file of weights for a library that reads files itself: `path`, or the safetensors that a pickle is
    converted to. Raises InputError as `read_tensors`, and where these cannot be written beside it."""
    if path.suffix not in LEGACY:
        return path
    read_tensors(path, allow_legacy=allow_legacy)
    if not (converted := path.with_suffix(".safetensors")).is_file():
        raise InputError(f"cannot write {converted}: expected {path} in a folder that can be written to")
    return converted


def load_pretrained(model_class: Any, folder: Path) -> Any:
    """A transformers model from a local folder's safetensors. Raises InputError where it is none of the
    class, or where weights are missing, of which transformers only warns."""
    try:
        model, report = model_class.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"{folder} is no {model_class.__name__} folder: {first_line(error)}") from None
    if missing := sorted(report["missing_keys"]):
        names = ", ".join(missing[:3])
        raise InputError(f"{folder} lacks weights of {model_class.__name__}: {names} ({len(missing)} in all)")
    return model


def first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
