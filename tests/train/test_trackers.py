"""Trackers: what reaches them, read back from TensorBoard's own files, and what a failing one costs."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from accelerate import PartialState
from PIL import Image

from cascade.errors import InputError
from train import trackers
from train.recipe import Recipe
from train.trackers import Trackers, flatten

Tiny = Callable[..., Recipe]


@pytest.fixture(autouse=True)
def _one_process() -> None:
    PartialState(cpu=True)  # trackers ask it which process they are on


class Broken:
    """Logs once, then its network is gone."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def start(self) -> None:
        self.seen.append("start")

    def log(self, values: dict[str, float], step: int) -> None:
        if "start" not in self.seen:
            raise ConnectionError("no route\nto host")
        self.seen.remove("start")
        self.seen.append((values, step))

    def finish(self) -> None:
        self.seen.append("finish")


def test_flatten_keeps_numbers_alone() -> None:
    record = {"loss": 0.5, "by_t": [1, None, 2.0], "event": "validation", "ok": True, "norm": None}
    assert flatten(record) == {"loss": 0.5, "by_t/0": 1.0, "by_t/2": 2.0}


def test_tensorboard_gets_numbers_and_pictures(tiny: Tiny, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    watched = Trackers(tiny("trackers=[tensorboard]"), "base", tmp_path, main=True)
    for images in (8, 16):
        watched.log("train", {"loss": 1 / images, "loss_by_t": [0.25, 0.75]}, images)
    watched.grid("grid", Image.new("RGB", (6, 4), "red"), 16)
    watched.finish()
    events = EventAccumulator(str(tmp_path / "tensorboard"), {"images": 0, "scalars": 0}).Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(8, 0.125), (16, 0.0625)]
    assert [e.value for e in events.Scalars("train/loss_by_t/1")] == [0.75, 0.75]
    (picture,) = events.Images("grid")
    assert (picture.step, picture.width, picture.height) == (16, 6, 4)


def test_trackio_gets_them_too(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its own call, which Accelerate lacks."""
    seen = []

    class Tracker(Broken):
        def log(self, values: dict[str, Any], step: int) -> None:
            seen.append((values, step))

    trackio = type("trackio", (), {"Image": lambda picture: ("picture", picture.size)})
    monkeypatch.setitem(__import__("sys").modules, "trackio", trackio)
    monkeypatch.setattr(trackers, "find_spec", lambda name: name)
    monkeypatch.setattr(trackers, "make_tracker", lambda *_: Tracker())
    watched = Trackers(tiny("trackers=[trackio]"), "base", tmp_path, main=True)
    watched.grid("grid", Image.new("RGB", (6, 4)), 8)
    assert seen == [({"grid": ("picture", (6, 4))}, 8)]


def test_other_processes_and_recipes_without_trackers_do_nothing(tiny: Tiny, tmp_path: Path) -> None:
    for watched in (
        Trackers(tiny("trackers=[tensorboard]"), "base", tmp_path, main=False),
        Trackers(tiny(), "base", tmp_path, main=True),
    ):
        watched.log("train", {"loss": 1.0}, 8)
        watched.grid("grid", Image.new("RGB", (6, 4)), 8)
        watched.finish()
    assert list(tmp_path.iterdir()) == []


def test_a_tracker_that_fails_is_left_out_and_told_of_once(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    broken = Broken()
    monkeypatch.setattr(trackers, "make_tracker", lambda *_: broken)
    monkeypatch.setattr(trackers, "find_spec", lambda name: name)
    watched = Trackers(tiny("trackers=[wandb]"), "base", tmp_path, main=True)
    with caplog.at_level(logging.WARNING, "train"):
        for images in (8, 16, 24):
            watched.log("train", {"loss": 1.0}, images)
    assert broken.seen == [({"train/loss": 1.0}, 8)]
    assert [r.getMessage() for r in caplog.records] == [
        "tracker wandb failed and is left out from now on: no route"
    ]


def test_one_that_is_not_installed_or_cannot_start_is_refused(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="trackers: wandb is not installed: .* `pip install wandb`"):
        Trackers(tiny("trackers=[wandb]"), "base", tmp_path, main=True)
    broken = Broken()
    monkeypatch.setattr(broken, "start", lambda: broken.log({}, 0))
    monkeypatch.setattr(trackers, "find_spec", lambda name: name)
    monkeypatch.setattr(trackers, "make_tracker", lambda *_: broken)
    with pytest.raises(InputError, match="trackers: wandb cannot start: no route$"):
        Trackers(tiny("trackers=[wandb]"), "base", tmp_path, main=True)


def test_runs_of_a_folder_keep_their_name(tiny: Tiny, tmp_path: Path) -> None:
    """So that a resume goes on in the same run."""
    recipe = tiny("trackers=[wandb]")
    one, again = (trackers.make_tracker("wandb", recipe, "base", tmp_path) for _ in range(2))
    other = trackers.make_tracker("wandb", recipe, "base", tmp_path / "other")
    assert one.init_kwargs["id"] == again.init_kwargs["id"] != other.init_kwargs["id"]  # type: ignore[attr-defined]
    assert one.init_kwargs["resume"] == "allow"  # type: ignore[attr-defined]
    json.dumps(one.init_kwargs)  # type: ignore[attr-defined]
