"""Training states for resume: complete or absent, hashed, never pickled.

A state is a folder state-IMAGES of safetensors files and state.json, written to a temporary folder,
listed with sha256 in manifest.json, flushed and renamed. Older ones go only after that. Loading takes the
newest valid one. It holds whole tensors whatever they were sharded over, so that any number of processes,
with or without FSDP, resumes what any other saved. Snapshots of averages (average-IMAGES) are folders of
the same kind.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from cascade.checkpoint import new_folder, sha256, write_json
from cascade.errors import InputError
from train import zero
from train.ema import EMA, PowerEMA

KEEP = 2
FILES = ("ema.safetensors", "network.safetensors", "optimizer.safetensors", "state.json")
Tensors = dict[str, Tensor]


@dataclass
class Counters:
    """What a state holds beside tensors. `images` is also the position of the sampler, and of every draw."""

    images: int = 0  # training images seen
    seconds: float = 0.0  # of training, over all sessions


@dataclass(frozen=True)
class Trained:
    """What training changes."""

    network: nn.Module
    averages: list[EMA]  # the plain one, then one for each power-function profile
    optimizer: torch.optim.Optimizer

    def snapshot(self, keep: bool) -> dict[str, Tensors]:
        """Copies in host memory, by file name. Collective where tensors are sharded; empty unless `keep`."""
        parts: dict[str, Mapping[str, Tensor]] = {"network": dict(self.network.state_dict())}
        parts |= {average_name(e): e.average for e in self.averages}
        snapshot = zero.Moments if zero.is_zero(self.optimizer) else _optimizer_tensors
        parts["optimizer"] = snapshot(self.network, self.optimizer)
        return {name: gather(tensors, keep) for name, tensors in parts.items()}


class Writer:
    """Writes in the background, one job at a time."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "writer")
        self._job: Future[Any] | None = None

    def start(self, job: Any, *arguments: Any) -> None:
        self.join()
        self._job = self._pool.submit(job, *arguments)

    def join(self) -> None:
        """Wait for the job, and raise what it raised."""
        job, self._job = self._job, None
        if job is not None:
            job.result()


# -- writing -------------------------------------------------------------------------------------------------


def gather(tensors: Mapping[str, Tensor], keep: bool = True) -> Tensors:
    """Whole tensors, copied to host memory. Collective where they are sharded; empty unless `keep`."""
    copies = {}
    for name, tensor in tensors.items():
        whole = tensor.detach()
        if isinstance(whole, DTensor):
            whole = whole.full_tensor()
        if keep:
            copies[name] = whole.to("cpu", copy=True)
    return copies


def save_state(out: Path, snapshot: dict[str, Tensors], state: dict[str, Any]) -> Path:
    """Write a state, then remove all but the newest `KEEP` of this configuration. States of another
    configuration are left alone. `state`: images, seconds, ema_updates, identity and what else is to be
    known.

    Raises InputError, one line, where it cannot be written; then nothing has changed."""
    folder = out / f"state-{state['images']:010d}"
    _write(folder, snapshot, state)
    older = [s for s in states(out) if s.name <= folder.name and not differences(s, state["identity"])]
    interrupted = [p for kind in ("new", "old") for p in out.glob(f".state-*.{kind}-*")]
    for old in older[:-KEEP] + interrupted:
        shutil.rmtree(old)
    return folder


def save_averages(out: Path, snapshot: dict[str, Tensors], state: dict[str, Any]) -> None:
    """Keep the power-function averages of this moment, for lengths that are chosen after training."""
    profiles = {name: tensors for name, tensors in snapshot.items() if name.startswith("ema-")}
    _write(out / f"average-{state['images']:010d}", profiles, state)


def _write(folder: Path, snapshot: dict[str, Tensors], state: dict[str, Any]) -> None:
    with new_folder(folder) as temporary:
        for name, tensors in snapshot.items():
            plain = {k: v.contiguous() for k, v in tensors.items()}
            save_file(plain, temporary / f"{name}.safetensors")
        write_json(temporary / "state.json", state)
        hashes = {path.name: sha256(path) for path in sorted(temporary.iterdir())}
        write_json(temporary / "manifest.json", hashes)


# -- reading -------------------------------------------------------------------------------------------------


def find_state(out: Path, trained: Trained, identity: dict[str, Any]) -> tuple[Path | None, list[str]]:
    """The newest valid state (None: there is none) and a line for each newer one that was passed over
    because it is damaged or of another configuration. Raises InputError where all that are whole are of
    another one."""
    notes, foreign = [], None
    for folder in reversed(states(out)):
        problem = _damage(folder, trained)
        if problem is None and (found := differences(folder, identity)):
            problem = f"it belongs to another configuration ({'; '.join(found[:3])})"
            foreign = foreign or f"{folder.name}: {problem}"
        if problem is None:
            return folder, notes
        notes.append(f"{folder.name}: {problem}")
    if foreign:
        raise InputError(
            f"{out} cannot be resumed: {foreign}; set it back, or give another --out to begin anew"
        )
    return None, notes


def load_state(folder: Path, trained: Trained) -> dict[str, Any]:
    """Restore a state that `find_state` gave. Returns its state.json."""
    state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    targets = {"network": dict(trained.network.state_dict())}
    for ema in trained.averages:
        targets[average_name(ema)] = ema.average
        ema.updates = state["ema_updates"]
    with torch.no_grad():
        for name, tensors in targets.items():
            saved = load_file(folder / f"{name}.safetensors")
            for key, tensor in tensors.items():
                fill(tensor, saved[key])
        load = zero.load if zero.is_zero(trained.optimizer) else _load_optimizer
        load(trained.network, trained.optimizer, load_file(folder / "optimizer.safetensors"))
    return state


def states(out: Path) -> list[Path]:
    return sorted(out.glob("state-" + "[0-9]" * 10))


def fill(target: Tensor, value: Tensor) -> None:
    """Copy a whole tensor into one that may be sharded; of that each process takes its own part."""
    if isinstance(target, DTensor):
        device, mesh, places = target.device, target.device_mesh, target.placements
        part = distribute_tensor(value.to(device), mesh, places, src_data_rank=None)
        target.to_local().copy_(part.to_local())
    else:
        target.copy_(value)


def _damage(folder: Path, trained: Trained) -> str | None:
    """Why the state cannot be read into `trained`; None: it can."""
    wanted = [*FILES, *(f"{average_name(e)}.safetensors" for e in trained.averages)]
    if problem := damaged(folder, wanted):
        return problem
    with safe_open(folder / "network.safetensors", "pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    if shapes != {name: list(tensor.shape) for name, tensor in trained.network.state_dict().items()}:
        return "it belongs to a network of other weights"
    return None


def damaged(folder: Path, wanted: list[str]) -> str | None:
    """What is wrong with the files of a folder of this module's; None: each is there as it was written."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        for name in sorted({*wanted, *manifest}):
            if sha256(folder / name) != manifest[name]:
                return f"{name} is damaged (sha256 differs)"
            _look(folder / name)
    except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
        return f"it is incomplete or damaged ({type(error).__name__}: {str(error).splitlines()[0]})"
    return None


def _look(path: Path) -> None:
    """Raise where a file is not of its kind: its hash may have been made to fit."""
    if path.suffix == ".json":
        json.loads(path.read_text(encoding="utf-8"))
    else:
        with safe_open(path, "pt"):
            pass


# -- averages ------------------------------------------------------------------------------------------------


def average_name(ema: EMA) -> str:
    """Of an average's file: ema, or ema-SIGMA of a power-function profile."""
    return f"ema-{ema.sigma_rel:g}" if isinstance(ema, PowerEMA) else "ema"


def average_files(out: Path) -> list[tuple[int, float]]:
    """(images, sigma_rel) of every snapshot of an average."""
    paths = sorted(out.glob("average-" + "[0-9]" * 10 + "/ema-*.safetensors"))
    return [(int(p.parent.name[-10:]), float(p.stem.removeprefix("ema-"))) for p in paths]


def read_average(out: Path, images: int, sigma_rel: float) -> Tensors:
    """One snapshot. Raises InputError where it is damaged."""
    folder, name = out / f"average-{images:010d}", f"ema-{sigma_rel:g}.safetensors"
    if problem := damaged(folder, [name]):
        raise InputError(f"{folder}: {problem}")
    return load_file(folder / name)


# -- configurations ------------------------------------------------------------------------------------------


def differences(folder: Path, identity: dict[str, Any]) -> list[str]:
    """Where the state's configuration differs from `identity`; none for a state that cannot be read."""
    try:
        saved = json.loads((folder / "state.json").read_text(encoding="utf-8"))["identity"]
    except (OSError, ValueError, TypeError, KeyError):
        return []
    return compare(saved, json.loads(json.dumps(identity)))


def compare(saved: Any, current: Any, path: str = "") -> list[str]:
    """The values that differ. A key on one side only is an option that is younger than the other side, which
    had its default."""
    if isinstance(saved, dict) and isinstance(current, dict):
        both = [k for k in current if k in saved]
        return [d for k in both for d in compare(saved[k], current[k], f"{path}.{k}" if path else k)]
    return [] if saved == current else [f"{path} {saved!r} there, {current!r} now"]


# -- optimiser -----------------------------------------------------------------------------------------------


def _optimizer_tensors(network: nn.Module, optimizer: torch.optim.Optimizer) -> Tensors:
    """Every slot as NAME/SLOT. Counts that an optimiser keeps as an int become int64 scalars."""
    names = {id(p): name for name, p in network.named_parameters()}
    return {
        f"{names[id(p)]}/{slot}": value if isinstance(value, Tensor) else torch.tensor(value)
        for p, slots in optimizer.state.items()
        for slot, value in slots.items()
        if isinstance(value, Tensor | int)
    }


def _load_optimizer(network: nn.Module, optimizer: torch.optim.Optimizer, tensors: Tensors) -> None:
    """Put each slot where its parameter lies, in its layout and over the same processes; step counts as well:
    the fused AdamW wants them on the device."""
    parameters = dict(network.named_parameters())
    for key, value in tensors.items():
        name, slot = key.rsplit("/", 1)
        p = parameters[name]
        if value.ndim == 0 and value.dtype == torch.int64:
            optimizer.state[p][slot] = int(value)
        elif value.shape == p.shape:
            optimizer.state[p][slot] = torch.zeros_like(p, dtype=value.dtype, requires_grad=False)
            fill(optimizer.state[p][slot], value)
        else:
            optimizer.state[p][slot] = value.to(p.device)
