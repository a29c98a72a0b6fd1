"""The real pictures that sets are measured against, or published statistics of theirs."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from cascade.checkpoint import sha256
from cascade.errors import InputError
from eval.features import Picture
from eval.metrics.frechet import Moments, moments_of_covariance
from eval.run import Run

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}
STATISTICS = {".npz", ".safetensors"}
WHOLE = {"coco"}  # suites whose protocol compares with every picture there is, not with the prompts' own


@dataclass(frozen=True)
class Reference:
    """Pictures, or the moments of features that somebody else computed."""

    path: Path
    what: str  # in words
    pictures: tuple[Picture, ...] = ()
    moments: Moments | None = None

    def describe(self) -> dict[str, Any]:
        """For the report: what is compared with, and the hash of it all."""
        hashes = "".join(picture.sha256 for picture in self.pictures)
        digest = hashlib.sha256(hashes.encode()).hexdigest() if self.pictures else sha256(self.path)
        return {"path": str(self.path), "what": self.what, "count": len(self.pictures), "sha256": digest}


def open_reference(run: Run, path: Path) -> Reference:
    """A folder's pictures: those of the prompts where every prompt names its own, else all at any depth. Or a
    file of mu and sigma. Raises InputError where there is nothing of that."""
    if path.suffix in STATISTICS and path.is_file():
        return Reference(path, "published statistics", moments=_read_statistics(path))
    if not path.is_dir():
        raise InputError(
            f"references {path}: expected a folder of pictures, or .npz or .safetensors statistics"
        )
    names = [prompt.reference for prompt in run.suite.prompts]
    if all(names) and run.suite.name not in WHOLE:
        files, what = sorted({path / str(name) for name in names}), "the prompts' own pictures"
        if lacking := [file for file in files if not file.is_file()]:
            raise InputError(f"references {path} lack {len(lacking)} of {len(files)}, as {lacking[0].name}")
    else:
        found = (Path(place) / name for place, _, here in os.walk(path) for name in here)
        files, what = sorted(f for f in found if f.suffix.lower() in SUFFIXES), "all pictures of the folder"
    if len(files) < 2:
        raise InputError(f"references {path}: expected at least 2 pictures, found {len(files)}")
    return Reference(path, what, tuple(Picture(file, sha256(file)) for file in files))


def _read_statistics(path: Path) -> Moments:
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as found:
                mu, sigma = torch.from_numpy(found["mu"]), torch.from_numpy(found["sigma"])
        else:
            tensors = load_file(path)
            mu, sigma = tensors["mu"], tensors["sigma"]
    except (OSError, ValueError, KeyError, SafetensorError):
        raise InputError(f"{path}: expected arrays mu (D) and sigma (D D)") from None
    if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)):
        raise InputError(
            f"{path}: expected mu (D) and sigma (D D), got {list(mu.shape)}, {list(sigma.shape)}"
        )
    return moments_of_covariance(mu, sigma)
