"""Priors over CLIP image embeddings, and the CLIP itself. Names are imported at first use."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prior.autoregressive import AutoregressiveConfig, AutoregressivePrior
    from prior.clip import CLIP, ClipConfig
    from prior.diffusion import DiffusionPrior, PriorConfig
    from prior.laion import LaionConfig, LaionPrior
    from prior.pretrained_clip import OpenCLIP, OpenClipConfig

__all__ = [
    "CLIP",
    "AutoregressiveConfig",
    "AutoregressivePrior",
    "ClipConfig",
    "DiffusionPrior",
    "LaionConfig",
    "LaionPrior",
    "OpenCLIP",
    "OpenClipConfig",
    "PriorConfig",
]

_MODULES = {
    "CLIP": "prior.clip",
    "ClipConfig": "prior.clip",
    "OpenCLIP": "prior.pretrained_clip",
    "OpenClipConfig": "prior.pretrained_clip",
    "DiffusionPrior": "prior.diffusion",
    "LaionPrior": "prior.laion",
    "LaionConfig": "prior.laion",
    "PriorConfig": "prior.diffusion",
    "AutoregressivePrior": "prior.autoregressive",
    "AutoregressiveConfig": "prior.autoregressive",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module 'prior' has no attribute {name!r}")
