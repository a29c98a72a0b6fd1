"""When a stage's states are written and read: by one process, for all."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from accelerate import Accelerator
from rich.console import Console

from cascade.config import to_dict
from cascade.errors import InputError
from train.processes import agree, chosen_by_main
from train.recipe import Recipe, TrainConfig
from train.state import (
    Counters,
    Tensors,
    Trained,
    Writer,
    compare,
    find_state,
    gather,
    load_state,
    save_averages,
    save_state,
)
from train.tasks import Task


class Checkpoints:
    """The states of one stage in `folder`. Its methods are called on every process."""

    def __init__(
        self,
        folder: Path,
        task: Task,
        trained: Trained,
        cfg: TrainConfig,
        accelerator: Accelerator,
        console: Console,
    ) -> None:
        self.folder, self.task, self.trained, self.cfg = folder, task, trained, cfg
        self.accelerator, self.console = accelerator, console
        self.main = accelerator.is_main_process
        self._writer = Writer()

    def identity(self) -> dict[str, Any]:
        """What a state must agree with to be resumed."""
        cfg = self.cfg
        own = {"stage": self.task.name, "network": self.task.identity(), "batch": cfg.batch}
        own |= {"seed": self.task.recipe.seed, "optimizer": cfg.optimizer}
        return own | {"ema_sigma_rel": list(cfg.ema_sigma_rel)}

    def settings(self) -> dict[str, Any]:
        """What may change between sessions, and is told when it does."""
        fixed = self.identity()
        train = {key: value for key, value in to_dict(self.cfg).items() if key not in fixed}
        return {"processes": self.accelerator.num_processes, "train": train}

    def resume(self) -> Counters:
        """Restore the newest valid state, which the main process finds, and say what differs from it."""
        found, error = None, None
        if self.main:
            try:
                found, notes = find_state(self.folder, self.trained, self.identity())
                for note in notes:
                    self.console.print(f"passed over {note}")
            except InputError as caught:
                error = caught
        agree(self.accelerator, error)
        images = chosen_by_main(self.accelerator, int(found.name[-10:]) if found else -1)
        if images < 0:
            return Counters()
        folder = self.folder / f"state-{images:010d}"
        state = load_state(folder, self.trained)
        scaler = self.accelerator.scaler
        if scaler is not None and state.get("scaler"):
            scaler.load_state_dict(state["scaler"])
        self.console.print(f"resumed from {folder.name}")
        if changed := compare(state.get("settings", {}), self.settings()):
            self.console.print(f"other settings than before: {'; '.join(changed)}")
        return Counters(images, state["seconds"])

    def save(self, counters: Counters, *, averages: bool) -> Tensors:
        """Copy the state, and begin to write it and the component, whose tensors are returned, on the main
        process."""
        self.join()
        ema = self.trained.averages[0]
        snapshot, component = self.trained.snapshot(self.main), gather(ema.state_dict(), self.main)
        if self.main:
            scaler = self.accelerator.scaler
            state = {
                "images": counters.images,
                "seconds": counters.seconds,
                "ema_updates": ema.updates,
                "scaler": None if scaler is None else scaler.state_dict(),
                "identity": self.identity(),
                "settings": self.settings(),
            }
            self._writer.start(self._write, snapshot, state, averages, component)
        return component

    @contextmanager
    def finishing(self) -> Iterator[None]:
        """However the block is left, what is being written then is written first."""
        try:
            yield
        finally:
            self.join()

    def _write(
        self, snapshot: dict[str, Tensors], state: dict[str, Any], averages: bool, component: Tensors
    ) -> None:
        save_state(self.folder, snapshot, state)
        if averages:
            save_averages(self.folder, snapshot, state)
        self.task.save(component)

    def join(self) -> None:
        """Wait for the state that is being written. One that could not be is told, and tried again at the
        next save."""
        try:
            self._writer.join()
        except InputError as error:
            self.console.print(str(error))

    def finish(self) -> None:
        """Wait for the last state, on every process: one that left would have its launcher end the others.
        Raises InputError where it could not be written."""
        error = None
        try:
            self._writer.join()
        except InputError as caught:
            error = caught
        agree(self.accelerator, error)


def record(recipe: Recipe, *folders: Path) -> None:
    """The resolved recipe and the code's version, beside the checkpoints. Raises InputError where they
    cannot be written."""
    try:
        git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
        version = subprocess.run(git, capture_output=True, text=True, check=False).stdout
    except OSError:  # no git here
        version = ""
    for folder in folders:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "recipe.yaml").write_text(yaml.safe_dump(to_dict(recipe), sort_keys=False))
            (folder / "version.txt").write_text(version or "unknown\n")
        except OSError as error:
            raise InputError(f"cannot write to {folder}: {error.strerror}") from None
