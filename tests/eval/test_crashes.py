"""A run that dies at every single file operation, one after another, and is taken up each time."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cascade import random
from eval import run as run_module
from eval.generate import draw_share, finish, run_folder
from eval.run import Model, Plan
from eval.settings import make_settings
from eval.suites.suite import Prompt, make_suite

STAGES = {"base": 4, "sr": 8}


class Killed(BaseException):
    """As SIGKILL: nothing may catch it and tidy up."""


class Painter:
    """Draws noise, as a function of the seed and the settings, in no time."""

    def __call__(self, texts: list[str], *, seed: list[int], stop_at: str, **settings: Any) -> Any:
        level = float(settings.get(stop_at, {}).get("aug_level", 0))
        pictures = 0.5 * random.normal((3, STAGES[stop_at], STAGES[stop_at]), seed, stop_at) + level
        return SimpleNamespace(
            stages={stop_at: pictures.clamp(-1, 1)}, image_embed=torch.zeros(len(texts), 1)
        )


def make_plan() -> Plan:
    model = Model(name="painter", path="painter", sha256="", kind="cascade", stages=STAGES)
    return Plan(
        suite=make_suite("tiny", "own", [Prompt(text=text) for text in ("an owl", "a jug", "a hut")]),
        models={"A": model},
        settings=make_settings(sweeps=["sr.aug_level=0.25"]),
        per_prompt=1,
        seed=0,
        batch=2,
    )


def draw(folder: Path, world: int) -> None:
    with run_folder(folder, make_plan()) as plan:
        for rank in range(world):
            draw_share(folder, plan, {"A": Painter()}, "code", rank, world)  # type: ignore[dict-item]
        finish(folder, plan)


def contents(folder: Path) -> dict[str, bytes]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock"]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


class Crashes:
    """Counts operations on files and dies at the `at`-th, before it, after it or, of a text, half way."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count, self.at, self.when = 0, -1, "before"
        for name in ("replace", "unlink"):
            monkeypatch.setattr(Path, name, self._crashing(getattr(Path, name)))
        monkeypatch.setattr(run_module, "_line", self._torn(run_module._line))

    def arm(self, at: int, when: str) -> None:
        self.count, self.at, self.when = 0, at, when

    def _due(self, when: str) -> bool:
        return self.count == self.at and self.when == when

    def _crashing(self, operation: Any) -> Any:
        def crashing(path: Path, *args: Any, **kwargs: Any) -> Any:
            self.count += 1
            if self._due("before"):
                raise Killed
            result = operation(path, *args, **kwargs)
            if self._due("after"):
                raise Killed
            return result

        return crashing

    def _torn(self, line: Any) -> Any:
        """A line that ends in its middle, as a process that is killed while it writes leaves it; what comes
        after in the same file is written by the next process."""

        def torn(item: Any) -> str:
            self.count += 1
            whole = line(item)
            return whole[: len(whole) // 2] if self._due("torn") else whole

        return torn


@pytest.mark.parametrize("when", ["before", "after"])
def test_every_crash_leaves_a_run_that_ends_the_same(tmp_path, monkeypatch, when: str) -> None:
    draw(tmp_path / "whole", 1)
    expected = contents(tmp_path / "whole")
    crashes = Crashes(monkeypatch)
    crashes.arm(-1, when)
    draw(tmp_path / "counted", 1)
    assert contents(tmp_path / "counted") == expected
    for at in range(1, crashes.count + 1):
        folder = tmp_path / f"{at}"
        crashes.arm(at, when)
        try:
            draw(folder, 1)
        except Killed:
            crashes.arm(max(1, at // 2), when)  # and once more, at another place
            try:
                draw(folder, 2)
            except Killed:
                crashes.arm(-1, when)
                draw(folder, 3)
        assert contents(folder) == expected, at


def test_a_line_that_was_cut_off_costs_one_batch(tmp_path, monkeypatch) -> None:
    draw(tmp_path / "whole", 1)
    crashes = Crashes(monkeypatch)
    for at in range(1, 6):
        folder = tmp_path / f"{at}"
        crashes.arm(at, "torn")
        try:
            draw(folder, 2)
        except Exception as error:  # the run that lacks an item does not end
            assert "lacks" in str(error)
        crashes.arm(-1, "torn")
        draw(folder, 1)
        assert contents(folder) == contents(tmp_path / "whole"), at
