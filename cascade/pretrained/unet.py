"""Public U-Nets as this project's: configurations and tensors, read and written.

    cfg = unet_from_diffusers(config, text_proj)         or unet_from_original(tensors, params)
    unet = UNet(cfg)
    unet.load_state_dict(tensors_from_diffusers(tensors, cfg, text_proj_tensors))

Every function raises InputError, one line, that names the first key or tensor that does not fit.
"""

from __future__ import annotations

from torch import Tensor

from cascade.config import UNetConfig
from cascade.pretrained import unet_layouts as layouts
from cascade.pretrained.unet_diffusers import config_to_diffusers, unet_from_diffusers
from cascade.pretrained.unet_layouts import TEXT_PROJ
from cascade.pretrained.unet_original import unet_from_original
from cascade.pretrained.unet_tensors import Tensors, read, write

__all__ = [
    "config_to_diffusers",
    "tensors_from_diffusers",
    "tensors_from_original",
    "tensors_to_diffusers",
    "tensors_to_original",
    "unet_from_diffusers",
    "unet_from_original",
]


def tensors_from_diffusers(
    tensors: Tensors, cfg: UNetConfig, text_proj: Tensors | None = None
) -> dict[str, Tensor]:
    """The state dict of `UNet(cfg)` from those of a unet folder and of its text_proj folder, if any."""
    together = dict(tensors) | {TEXT_PROJ + name: t for name, t in (text_proj or {}).items()}
    return read(layouts.diffusers, together, cfg, "diffusers U-Net")


def tensors_to_diffusers(tensors: Tensors, cfg: UNetConfig) -> dict[str, dict[str, Tensor]]:
    """Tensors of each component that `config_to_diffusers` names, from the state dict of `UNet(cfg)`."""
    config_to_diffusers(cfg, image_px=64)  # raises where diffusers cannot express the network
    together = write(layouts.diffusers, tensors, cfg, "U-Net")
    beside = {n.removeprefix(TEXT_PROJ): t for n, t in together.items() if n.startswith(TEXT_PROJ)}
    found = {"unet": {name: t for name, t in together.items() if not name.startswith(TEXT_PROJ)}}
    return found | ({"text_proj": beside} if beside else {})


def tensors_from_original(tensors: Tensors, cfg: UNetConfig) -> dict[str, Tensor]:
    """The state dict of `UNet(cfg)` from that of an original repository, its wrapper's prefix removed."""
    return read(layouts.original, tensors, cfg, "original U-Net")


def tensors_to_original(tensors: Tensors, cfg: UNetConfig) -> dict[str, Tensor]:
    """The inverse of `tensors_from_original`."""
    return write(layouts.original, tensors, cfg, "U-Net")
