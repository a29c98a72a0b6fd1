"""Priors over CLIP image embeddings, and the CLIP itself. Names are imported at first use."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_EXPORTS = {
    "CLIP": "prior.clip",
    "ClipConfig": "prior.clip",
    "OpenCLIP": "prior.pretrained_clip",
    "OpenClipConfig": "prior.pretrained_clip",
    "DiffusionPrior": "prior.diffusion",
    "PriorConfig": "prior.diffusion",
    "AutoregressivePrior": "prior.autoregressive",
    "AutoregressiveConfig": "prior.autoregressive",
}

__all__ = list(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'prior' has no attribute {name!r}")
