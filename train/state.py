"""Training states for resume: complete or absent, hashed, never pickled.

A state is a folder state-IMAGES of safetensors files and state.json, written to a temporary folder, listed
with sha256 in manifest.json, flushed and renamed. Older ones go only after that. Loading takes the newest
valid one.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cascade.checkpoint import new_folder, sha256, write_json
from train.ema import EMA

KEEP = 2
FILES = ("ema.safetensors", "network.safetensors", "optimizer.safetensors", "state.json")


@dataclass
class Counters:
    """What a state holds beside tensors."""

    images: int = 0  # training images seen
    seconds: float = 0.0  # of training, over all sessions


def save_state(
    out: Path,
    network: nn.Module,
    ema: EMA,
    optimizer: torch.optim.Optimizer,
    counters: Counters,
    identity: dict[str, Any],
) -> Path:
    """Write the state of this moment, then remove all but the newest `KEEP` of this configuration. States of
    another configuration are left alone. Called on the main process."""
    folder = out / f"state-{counters.images:010d}"
    files: dict[str, dict[str, Tensor]] = {
        "network": dict(network.state_dict()),
        "ema": ema.average,
        "optimizer": _optimizer_tensors(network, optimizer),
    }
    with new_folder(folder) as temporary:
        for name, tensors in files.items():
            plain = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
            save_file(plain, temporary / f"{name}.safetensors")
        numbers = {"images": counters.images, "seconds": counters.seconds, "ema_updates": ema.updates}
        write_json(temporary / "state.json", {**numbers, "identity": identity})
        write_json(temporary / "manifest.json", {name: sha256(temporary / name) for name in FILES})
    older = [s for s in _states(out) if s.name <= folder.name and not _differences(s, identity)]
    interrupted = [p for kind in ("new", "old") for p in out.glob(f".state-*.{kind}-*")]
    for old in older[:-KEEP] + interrupted:
        shutil.rmtree(old)
    return folder


def load_state(
    out: Path, network: nn.Module, ema: EMA, optimizer: torch.optim.Optimizer, identity: dict[str, Any]
) -> tuple[Counters, Path | None, list[str]]:
    """Restore the newest valid state. Returns its counters, its folder (None: nothing to resume) and a line
    for each newer state that was passed over because it is damaged or of another configuration."""
    notes = []
    for folder in reversed(_states(out)):
        problem = _problem(folder, network, identity)
        if problem:
            notes.append(f"{folder.name}: {problem}")
            continue
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        network.load_state_dict(load_file(folder / "network.safetensors"), strict=True)
        ema.load_state_dict(load_file(folder / "ema.safetensors"), state["ema_updates"])
        _load_optimizer(network, optimizer, load_file(folder / "optimizer.safetensors"))
        return Counters(state["images"], state["seconds"]), folder, notes
    return Counters(), None, notes


def _states(out: Path) -> list[Path]:
    return sorted(out.glob("state-" + "[0-9]" * 10))


def _problem(folder: Path, network: nn.Module, identity: dict[str, Any]) -> str | None:
    """Why the state cannot be resumed; None: it can."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        for name in FILES:
            if sha256(folder / name) != manifest[name]:
                return f"{name} is damaged (sha256 differs)"
    except (OSError, ValueError, TypeError, KeyError) as error:
        return f"it is incomplete or damaged ({type(error).__name__}: {error})"
    if differences := _differences(folder, identity):
        return f"it belongs to another configuration ({', '.join(differences[:3])})"
    with safe_open(folder / "network.safetensors", "pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    if shapes != {name: list(tensor.shape) for name, tensor in network.state_dict().items()}:
        return "it belongs to a network of other weights"
    return None


def _differences(folder: Path, identity: dict[str, Any]) -> list[str]:
    """Where the state's configuration differs from `identity`; none for a state that cannot be read."""
    try:
        saved = json.loads((folder / "state.json").read_text(encoding="utf-8"))["identity"]
    except (OSError, ValueError, TypeError, KeyError):
        return []
    return _compare(saved, identity)


def _compare(saved: Any, current: Any, path: str = "") -> list[str]:
    """Dotted paths of the values that differ. A key on one side only is an option that is younger than the
    other side, which had its default."""
    if isinstance(saved, dict) and isinstance(current, dict):
        both = [k for k in current if k in saved]
        return [d for k in both for d in _compare(saved[k], current[k], f"{path}.{k}" if path else k)]
    return [] if saved == current else [path]


def _optimizer_tensors(network: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    names = {id(p): name for name, p in network.named_parameters()}
    return {
        f"{names[id(p)]}/{slot}": value
        for p, slots in optimizer.state.items()
        for slot, value in slots.items()
        if isinstance(value, Tensor)
    }


def _load_optimizer(network: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put each slot on its parameter's device, also the step counts: the fused AdamW wants them there."""
    parameters = dict(network.named_parameters())
    for key, value in tensors.items():
        name, slot = key.rsplit("/", 1)
        p = parameters[name]
        layout = torch.channels_last if value.ndim == 4 else torch.preserve_format
        optimizer.state[p][slot] = value.to(p.device, memory_format=layout)
