"""Low-rank adapters (LoRA, arXiv:2106.09685): a change of a model's weights that is small enough to pass on.

A folder holds config.json and the tensors `NAME.lora_A` (r x in) and `NAME.lora_B` (out x r) of each layer
NAME that is adapted; those of a convolution are r x in x k x k and out x r x 1 x 1. Merged, a layer's weight
is W + scale alpha / r B A.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from cascade.checkpoint import load_component, save_component
from cascade.config import from_dict, to_dict
from cascade.errors import InputError

CLASS = "LoRA"


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    component: str  # of a model: the stage, prior or clip whose weights it changes
    base: str  # the model it was trained on
    rank: int
    alpha: float


@dataclass(frozen=True)
class Adapter:
    config: AdapterConfig
    tensors: dict[str, Tensor]

    def save(self, folder: str | Path) -> None:
        save_component(folder, to_dict(self.config), self.tensors, CLASS)

    @torch.no_grad()
    def merge(self, weights: Mapping[str, Tensor], scale: float = 1.0) -> None:
        """Add the change to `weights`, the state dict of the component, in place. A scale of -1 takes it
        away again. Raises InputError, and changes nothing, where a layer is missing or of another shape."""
        changes = {f"{name}.weight": self._change(name) for name in self.layers}
        for name, change in changes.items():
            where = f"adapter of {self.config.component}"
            if name not in weights:
                raise InputError(f"{where}: the model has no {name}: expected one like {self.config.base}")
            if weights[name].shape != change.shape:
                found, expected = list(change.shape), list(weights[name].shape)
                raise InputError(f"{where}: {name} is {found}: expected {expected}, as in the model")
        for name, change in changes.items():
            weight = weights[name]
            weight.copy_(weight.float() + scale * change.to(weight.device))

    @property
    def layers(self) -> list[str]:
        return sorted(n.removesuffix(".lora_A") for n in self.tensors if n.endswith(".lora_A"))

    def _change(self, name: str) -> Tensor:
        """alpha / r B A in the layer's own shape, float32."""
        a, b = (self.tensors[f"{name}.{part}"].float() for part in ("lora_A", "lora_B"))
        product = b.flatten(1) @ a.flatten(1)  # out in
        return self.config.alpha / self.config.rank * product.view(len(b), *a.shape[1:])


def load_adapter(folder: str | Path) -> Adapter:
    """Read an adapter's folder. Raises InputError, one line, where it is damaged or holds no adapter."""
    part = load_component(folder, CLASS)
    config = from_dict(AdapterConfig, part.config, where=str(folder))
    adapter = Adapter(config, part.tensors)
    halves = {f"{name}.{half}" for name in adapter.layers for half in ("lora_A", "lora_B")}
    ranks = {part.tensors[f"{name}.lora_A"].shape[0] for name in adapter.layers}
    if not halves or halves != part.tensors.keys() or ranks != {config.rank}:
        raise InputError(f"{folder}: expected lora_A and lora_B of rank {config.rank} for each layer")
    return adapter
