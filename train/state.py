"""Training states for resume: complete or absent, hashed, never pickled.

A state is a folder state-IMAGES of safetensors files and state.json, written to a temporary folder, listed with
sha256 in manifest.json, flushed and renamed. Older ones go only after that. Loading takes the newest valid one.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cascade.checkpoint import new_folder, sha256, write_json
from train.ema import EMA

KEEP = 2


@dataclass
class Counters:
    """What a state holds beside tensors."""

    images: int = 0  # training images seen
    seconds: float = 0.0  # of training, over all sessions


def save_state(
    out: Path, network: nn.Module, ema: EMA, optimizer: torch.optim.Optimizer, counters: Counters, identity: dict[str, Any]
) -> Path:
    """Write the state of this moment and remove all but the newest `KEEP`. Called on the main process."""
    folder = out / f"state-{counters.images:010d}"
    files: dict[str, dict[str, Tensor]] = {
        "network": dict(network.state_dict()),
        "ema": ema.average,
        "optimizer": _optimizer_tensors(network, optimizer),
    }
    with new_folder(folder) as temporary:
        for name, tensors in files.items():
            save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, temporary / f"{name}.safetensors")
        write_json(
            temporary / "state.json",
            {"images": counters.images, "seconds": counters.seconds, "ema_updates": ema.updates, "identity": identity},
        )
        names = sorted(p.name for p in temporary.iterdir())
        write_json(temporary / "manifest.json", {name: sha256(temporary / name) for name in names})
    for old in _states(out)[:-KEEP]:
        shutil.rmtree(old)
    return folder


def load_state(
    out: Path, network: nn.Module, ema: EMA, optimizer: torch.optim.Optimizer, identity: dict[str, Any]
) -> tuple[Counters, Path | None, list[str]]:
    """Restore the newest valid state. Returns its counters, its folder (None: nothing to resume) and a line for
    each newer state that was passed over because it is damaged or of another model."""
    notes = []
    for folder in reversed(_states(out)):
        problem = _problem(folder, identity)
        if problem:
            notes.append(f"{folder.name}: {problem}")
            continue
        state = json.loads((folder / "state.json").read_text())
        network.load_state_dict(load_file(folder / "network.safetensors"), strict=True)
        ema.load_state_dict(load_file(folder / "ema.safetensors"), state["ema_updates"])
        _load_optimizer(network, optimizer, load_file(folder / "optimizer.safetensors"))
        return Counters(state["images"], state["seconds"]), folder, notes
    return Counters(), None, notes


def _states(out: Path) -> list[Path]:
    return sorted(out.glob("state-" + "[0-9]" * 10))


def _problem(folder: Path, identity: dict[str, Any]) -> str | None:
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        for name, digest in manifest.items():
            if sha256(folder / name) != digest:
                return f"{name} is damaged (sha256 differs)"
        if json.loads((folder / "state.json").read_text())["identity"] != identity:
            return "it belongs to another configuration"
    except (OSError, json.JSONDecodeError, KeyError) as error:
        return f"it is incomplete ({error})"
    return None


def _optimizer_tensors(network: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    names = {id(p): name for name, p in network.named_parameters()}
    return {
        f"{names[id(p)]}/{slot}": value
        for p, slots in optimizer.state.items()
        for slot, value in slots.items()
        if isinstance(value, Tensor)
    }


def _load_optimizer(network: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    parameters = dict(network.named_parameters())
    for key, value in tensors.items():
        name, slot = key.rsplit("/", 1)
        p = parameters[name]
        # Adam keeps its step count as a float32 scalar on the CPU unless it is fused
        optimizer.state[p][slot] = value if value.ndim == 0 else value.to(p.device, p.dtype).to(
            memory_format=torch.channels_last if p.ndim == 4 else torch.preserve_format
        )
