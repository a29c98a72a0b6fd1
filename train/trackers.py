"""Where a run is watched beside log.jsonl: Accelerate's trackers, as many as the recipe names."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from PIL import Image

from cascade import random
from cascade.config import to_dict
from cascade.errors import InputError
from train.recipe import Recipe

_log = logging.getLogger("train")


class Trackers:
    """The trackers of one stage's run, on the main process; on others, and where the recipe names none, this
    does nothing. One that fails (a network that is gone) is told of once and left out: training goes on."""

    def __init__(self, recipe: Recipe, stage: str, folder: Path, main: bool) -> None:
        """Raises InputError where a tracker is not installed or cannot start."""
        self._trackers: dict[str, GeneralTracker] = {}
        for name in recipe.trackers if main else ():
            if find_spec(name) is None:
                raise InputError(f"trackers: {name} is not installed: expected it after `pip install {name}`")
            tracker = make_tracker(name, recipe, stage, folder)
            try:
                tracker.start()
            except Exception as error:  # of many kinds of clients
                raise InputError(f"trackers: {name} cannot start: {one_line(error)}") from None
            self._trackers[name] = tracker

    def log(self, group: str, values: Mapping[str, Any], images: int) -> None:
        """Numbers after so many training images as GROUP/NAME; those in a list go by their place in it."""
        flat = {f"{group}/{name}": value for name, value in flatten(values).items()}
        self._each(lambda _, tracker: tracker.log(flat, step=images))

    def grid(self, name: str, picture: Image.Image, images: int) -> None:
        """A picture after so many training images, to the trackers that show pictures."""
        pixels = np.asarray(picture.convert("RGB"))

        def show(kind: str, tracker: Any) -> None:
            if kind == "trackio":  # Accelerate gives it no pictures yet
                tracker.log({name: import_module(kind).Image(picture)}, step=images)
            elif kind == "tensorboard":
                tracker.log_images({name: pixels[None]}, step=images, dataformats="NHWC")
            else:
                tracker.log_images({name: [pixels]}, step=images)

        self._each(show)

    def finish(self) -> None:
        self._each(lambda _, tracker: tracker.finish())
        self._trackers = {}

    def _each(self, do: Callable[[str, Any], None]) -> None:
        for name, tracker in list(self._trackers.items()):
            try:
                do(name, tracker)
            except Exception as error:  # of many kinds of clients; none is worth a training run
                _log.warning("tracker %s failed and is left out from now on: %s", name, one_line(error))
                del self._trackers[name]


def make_tracker(name: str, recipe: Recipe, stage: str, folder: Path) -> GeneralTracker:
    """A run of its own for the stage in `folder`, the same one after a resume."""
    kind = LOGGER_TYPE_TO_CLASS[name]
    if name == "tensorboard":
        return kind(name, folder)  # pyright: ignore[reportCallIssue]
    run = f"{stage}-{random.key(0, str(folder.resolve())):016x}"
    settings: dict[str, Any] = {"name": run, "resume": "allow", "config": to_dict(recipe)}
    if name == "wandb":
        settings |= {"name": stage, "id": run, "dir": str(folder)}
    return kind(recipe.name, **settings)


def flatten(values: Mapping[str, Any]) -> dict[str, float]:
    """The numbers in a log record, {"loss_by_t": [a, b]} as {"loss_by_t/0": a, "loss_by_t/1": b}."""
    flat = {}
    for name, value in values.items():
        parts = {f"{name}/{i}": v for i, v in enumerate(value)} if isinstance(value, list) else {name: value}
        numbers = {key: v for key, v in parts.items() if isinstance(v, int | float)}
        flat |= {key: float(v) for key, v in numbers.items() if not isinstance(v, bool)}
    return flat


def one_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
