"""Where an encoder's files are, and that they are the right ones."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

from cascade.errors import InputError


def resolve(name: str, revision: str | None, folder: Path | None, patterns: list[str]) -> Path:
    """The local folder of `name`: a subfolder of the model folder, a folder, or a hub repository, of
    which only files that match `patterns` are fetched (from the cache alone when offline)."""
    for candidate in [Path(name)] if folder is None else [Path(folder) / name, Path(name)]:
        if candidate.is_dir():
            return candidate.resolve()
    if name.count("/") > 1 or name.startswith((".", "/", "~")):
        raise InputError(f"text encoder {name!r}: no such folder")
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                name,
                revision=revision,
                allow_patterns=patterns,
                ignore_patterns=["*.fp16*"],  # second copies of the same weights
            )
        )
    except (OSError, ValueError) as error:  # no network, no such repository, no valid name
        reason = first_line(error)
        raise InputError(
            f"text encoder {name!r}: no folder and no hub repository in reach: {reason}"
        ) from None


def first_line(error: Exception) -> str:
    """The first line of an error's message."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def sha256(path: Path) -> str:
    """Hex digest of a file. Raises InputError where it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None


def verify(folder: Path, digests: Mapping[str, str]) -> None:
    """Raise InputError unless every named file is in the folder and has the given sha256."""
    for name, expected in digests.items():
        actual = sha256(folder / name)
        if actual != expected:
            raise InputError(f"{folder / name}: expected sha256 {expected[:16]}..., got {actual[:16]}...")


def digests(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """The sha256 of the named files, sorted by name."""
    return {name: sha256(folder / name) for name in sorted(names)}
