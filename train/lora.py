"""Training of low-rank adapters: peft puts them into a network, and here they come out of it again."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from cascade.errors import InputError
from train.recipe import LoraConfig

HALVES = {".lora_A.default.weight": ".lora_A", ".lora_B.default.weight": ".lora_B"}  # peft's names, ours


def inject(network: nn.Module, cfg: LoraConfig, where: str) -> None:
    """Give the layers that `cfg.targets` names adapters, which change nothing yet, and freeze all else.
    Raises InputError where it names no linear or convolution layer."""
    layers = {name for name, m in network.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    last = {name.rsplit(".", 1)[-1] for name in layers}
    if not last & set(cfg.targets):
        names = ", ".join(sorted(name for name in last if not name.isdigit()))
        raise InputError(f"{where}.targets {list(cfg.targets)}: expected names of layers: {names}")
    import peft  # which imports half of Hugging Face

    settings = peft.LoraConfig(r=cfg.rank, lora_alpha=cfg.alpha, target_modules=list(cfg.targets))  # pyright: ignore[reportArgumentType]
    peft.inject_adapter_in_model(settings, network)


def adapter_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those of the adapters alone, under the names of `cascade.adapter`."""
    return {
        name.removesuffix(suffix) + ours: tensor
        for name, tensor in tensors.items()
        for suffix, ours in HALVES.items()
        if name.endswith(suffix)
    }


def base_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights that are adapted, under the names they have without adapters."""
    return {
        name.replace(".base_layer.", "."): tensor
        for name, tensor in tensors.items()
        if not name.endswith(tuple(HALVES))
    }
