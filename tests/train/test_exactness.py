"""What several processes do exactly as one does: validate, see every sample, resume each stage, stop."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from safetensors.torch import load_file

from tests.train.ranks import Ranks, wait_until
from tests.train.test_ranks import argv, gap, losses, state
from train.signals import REQUEUE
from train.state import FILES, damaged, states

GUESS = ("base.stage.unet.position_grid=16", "base.stage.unet.guess_width=8", "base.train.guess_batch=16")
FINE = ("base.stage.unet.fine_channels=[8]",)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    with Ranks(tmp_path_factory.mktemp("ranks")) as found:
        yield found


def command(recipe: Path, trained: Path, out: Path, stage: str, *settings: str) -> list[str | Path]:
    """That trains a stage with other keys of the recipe set."""
    if stage in ("prior", "base") and not out.exists():
        shutil.copytree(trained / "clip", out / "clip")
    if stage == "base":
        settings = (*settings, *GUESS, *FINE)
    return [*argv(recipe, out, stage), *(word for setting in settings for word in ("--set", setting))]


# -- validation ----------------------------------------------------------------------------------------------


def validations(out: Path, stage: str) -> list[dict[str, Any]]:
    lines = (out / f"{stage}-training" / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == "validation"]


@pytest.mark.parametrize("stage", ["clip", "base", "sr1024"])
def test_two_processes_validate_as_one_does(
    ranks: Ranks, recipe_file: Path, trained: Path, tmp_path: Path, stage: str
) -> None:
    """To the last bit, of the same weights: a learning rate of 1e-30 leaves them. Three chunks, the two that
    one process has and the one of the other."""
    found = []
    for number in (1, 2):
        out = tmp_path / str(number)
        settings = ("validation.levels=24", *(f"{stage}.train.{s}" for s in ("images=8", "lr=1e-30")))
        result = ranks.run(number, command(recipe_file, trained, out, stage, *settings))
        assert result.status == [0] * number, result.err
        found.append(validations(out, stage))
    assert found[0] == found[1] and len(found[0]) == 1
    assert len(found[0][0]["by_t"]) == (1 if stage == "clip" else 24)


# -- samples -------------------------------------------------------------------------------------------------


def seen(out: Path) -> list[list[int]]:
    """The pictures of each step over all processes, in order of their places in the batch."""
    steps: dict[int, list[dict[str, Any]]] = {}
    for path in out.glob("seen-*.jsonl"):
        for record in map(json.loads, path.read_text().splitlines()):
            steps.setdefault(record["images"], []).append(record)
    found = []
    for images in sorted(steps):
        parts = sorted(steps[images], key=lambda record: record["rank"])
        assert [record["rank"] for record in parts] == list(range(parts[0]["world"]))
        found.append([i for row in zip(*(record["ids"] for record in parts), strict=True) for i in row])
    return found


def test_2_then_1_then_4_processes_see_every_sample_once_an_epoch(
    ranks: Ranks, recipe_file: Path, trained: Path, tmp_path: Path
) -> None:
    """What steps were made of, not what they were to be; and the loss is that of one process."""
    changes = ("data.toned_period=1", "sr256.train.batch=4", "sr256.train.images=72", "sr256.train.eps=1e-3")
    whole, parts = (
        command(recipe_file, trained, tmp_path / name, "sr256", *changes, "sr256.train.log_images=4")
        for name in ("whole", "parts")
    )
    assert ranks.run(1, whole, fault=["remember"]).status == [0]
    stops = [(2, ["remember", 6, 1]), (1, ["remember", 5, 0, "SIGUSR1"]), (4, ["remember"])]
    for number, fault in stops:
        result = ranks.run(number, parts, fault=fault)
        assert result.status == [REQUEUE if len(fault) > 1 else 0] * number, result.err
    assert "resumed from state-0000000044" in result.out[0]  # within the fourth epoch of 12
    steps = seen(tmp_path / "parts")
    assert steps == seen(tmp_path / "whole") and len(steps) == 18
    flat = [i for step in steps for i in step]
    epochs = [flat[i : i + 12] for i in range(0, 72, 12)]
    assert all(len(set(epoch)) == 12 for epoch in epochs) and set(flat) == set(epochs[0])
    assert len({tuple(epoch) for epoch in epochs}) == 6  # each in an order of its own
    assert losses(tmp_path / "parts", "sr256") == pytest.approx(losses(tmp_path / "whole", "sr256"), abs=1e-6)


# -- resume --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["clip", "prior", "base", "sr1024"])  # sr256: tests.train.test_ranks
def test_every_stage_on_two_processes_is_resumed_to_the_last_bit(
    ranks: Ranks, recipe_file: Path, trained: Path, tmp_path: Path, stage: str
) -> None:
    whole, parts = (command(recipe_file, trained, tmp_path / name, stage) for name in ("whole", "parts"))
    assert ranks.run(2, whole).status == [0, 0]
    stopped = ranks.run(2, parts, fault=["terminate", 2, 1])
    assert stopped.status == [REQUEUE, REQUEUE], stopped.err
    resumed = ranks.run(2, parts)
    assert resumed.status == [0, 0] and "resumed from state-0000000016" in resumed.out[0]
    assert gap(*(state(tmp_path / name, stage, 24) for name in ("whole", "parts"))) == 0
    assert losses(tmp_path / "whole", stage) == losses(tmp_path / "parts", stage)
    assert all(load_file(path) for path in (tmp_path / "parts" / stage).glob("*.safetensors"))


# -- stops ---------------------------------------------------------------------------------------------------


def alive(groups: list[int]) -> list[int]:
    """Processes of process groups, batch makers among them."""
    found = []
    for process in psutil.process_iter(["pid", "status"]):
        try:
            group = os.getpgid(process.pid)
        except ProcessLookupError:
            continue
        if group in groups and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(process.pid)
    return found


@pytest.mark.parametrize(
    ("name", "rank", "workers"), [("SIGTERM", 0, 0), ("SIGUSR1", 1, 2)], ids=["waiting-0", "waiting-1"]
)
def test_a_signal_in_a_validation_ends_it_at_once_with_the_state_saved(
    ranks: Ranks, recipe_file: Path, trained: Path, tmp_path: Path, name: str, rank: int, workers: int
) -> None:
    """One process computes, the other waits for it, and the state of before is still being written."""
    settings = [f"sr256.train.{s}" for s in ("save_images=16", "validate_images=16", f"workers={workers}")]
    line = command(recipe_file, trained, tmp_path, "sr256", *settings)
    groups = ranks.start(2, line, fault=["slow_validation", 600, rank])
    wait_until((tmp_path / "validating").exists)
    folder = tmp_path / "sr256-training"
    assert states(folder) == []
    (folder / "signalled").touch()
    for group in groups:
        os.killpg(group, getattr(signal, name))  # batch makers too
    result = ranks.wait()
    assert result.status == [REQUEUE, REQUEUE], result.err
    assert result.err == ["", ""]
    (saved,) = states(folder)
    assert saved.name == "state-0000000016" and damaged(saved, list(FILES)) is None
    wait_until(lambda: not alive(groups))
