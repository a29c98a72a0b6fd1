"""How long runs take to end: after a signal, with their state saved, and after a process failed.

python -m tests.train.ends

Two processes train the toy sr256 stage. Each line is one run: what happened, seconds until both were gone,
their exit statuses, and what they said. A signal, sent to all, may cost 30 s and a failure 60 s.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from tests.train.conftest import make_records, tiny_recipe, write_data
from tests.train.ranks import Ranks, wait_until
from tests.train.soak import logged
from train.__main__ import GRACE_S
from train.signals import REQUEUE
from train.state import damaged, states

STOP_S, FAILURE_S = 30, 60
SETTINGS = {"images": 8_000_000, "save_images": 10**9, "validate_images": 10**9, "grid_images": 10**9}
PLACES: dict[str, tuple[dict[str, int], list[Any] | None, str | None]] = {
    "in a step": ({}, None, None),
    "in a validation, rank 0 computes": ({"validate_images": 32}, ["slow_validation", 600, 0], "validating"),
    "in a validation, rank 1 computes": ({"validate_images": 32}, ["slow_validation", 600, 1], "validating"),
    "in a grid": ({"grid_images": 32}, ["slow_grid", 600], "drawing"),
}
FAILURES: dict[str, tuple[dict[str, int], list[Any]]] = {
    "exception in a step": ({}, ["crash", 4, 1]),
    "SIGKILL in a step": ({}, ["die", 4, 1]),
    "unreadable data": ({}, ["unreadable", 4, 1]),
    "exception on rank 0": ({}, ["crash", 4, 0]),
    "exception in a validation": ({"validate_images": 32}, ["bad_validation", 1]),
}


class Runs:
    """The toy stage, started anew in a folder of its own for each run."""

    def __init__(self, folder: Path, ranks: Ranks) -> None:
        recipe = tiny_recipe(write_data(folder / "data", make_records()), folder / "runs")
        recipe["sr256"]["train"] |= SETTINGS
        self.recipe, self.ranks, self.folder, self.count = folder / "ends.yaml", ranks, folder, 0
        self.recipe.write_text(yaml.safe_dump(recipe))

    def start(self, workers: int, settings: dict[str, int], fault: list[Any] | None) -> list[int]:
        self.count += 1
        self.out = self.folder / str(self.count)
        self.training = self.out / "sr256-training"
        argv: list[str | Path] = [self.recipe, "--stage", "sr256", "--out", self.out]
        for name, value in (settings | {"workers": workers}).items():
            argv += ["--set", f"sr256.train.{name}={value}"]
        return self.ranks.start(2, argv, fault=fault, grace=GRACE_S)

    def end(self, what: str, limit: float, since: float | None = None) -> list[int]:
        """Wait for it, and print a line. since: a time; else that of the last record of its log."""
        result = self.ranks.wait()
        seconds = time.time() - (since or (self.training / "log.jsonl").stat().st_mtime)
        said = " | ".join(text.strip().splitlines()[-1][:60] for text in result.err if text.strip())
        print(f"{what:55} {seconds:5.1f} s  {result.status}  {said}", flush=True)
        assert seconds < limit
        return result.status


def logged_some(folder: Path) -> bool:
    return logged(folder)[-1:] > [3]


def stops(runs: Runs) -> None:
    for place, (settings, fault, sign) in PLACES.items():
        for workers, name in ((0, signal.SIGTERM), (2, signal.SIGUSR1)):
            groups = runs.start(workers, settings, fault)
            wait_until(partial(logged_some, runs.training) if sign is None else (runs.out / sign).exists)
            (runs.training / "signalled").touch()
            sent = time.time()
            for group in groups:
                os.killpg(group, name)
            what = f"{name.name} {place}, {workers} batch makers"
            assert runs.end(what, STOP_S, sent) == [REQUEUE] * 2
            assert damaged(states(runs.training)[-1], []) is None


def failures(runs: Runs) -> None:
    for what, (settings, fault) in FAILURES.items():
        for workers in (0, 2):
            runs.start(workers, settings, fault)
            status = runs.end(f"{what}, {workers} batch makers", FAILURE_S)
            assert 0 not in status and REQUEUE not in status


def main() -> int:
    with tempfile.TemporaryDirectory() as folder, Ranks(Path(folder)) as ranks:
        runs = Runs(Path(folder), ranks)
        stops(runs)
        failures(runs)
    return 0


if __name__ == "__main__":
    sys.exit(main())
