"""The validation loss: the same numbers at any number of processes, and what they are numbers of."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.train.conftest import make_records, write_data
from train.__main__ import main
from train.recipe import ORDER, Recipe
from train.tasks import Task, make_task
from train.validation import Held, Validation, averaged

Tiny = Callable[..., Recipe]
SMALL = ("validation.pictures=2", "validation.levels=3")


class Process:
    """One of several processes, as far as validation asks its accelerator."""

    device = torch.device("cpu")

    def __init__(self, rank: int = 0, world: int = 1) -> None:
        self.process_index, self.num_processes = rank, world
        self.own: Tensor | None = None

    def reduce(self, values: Tensor, how: str) -> Tensor:
        assert how == "sum"
        self.own = values
        return values


def validate(task: Task, world: int = 1) -> list[float]:
    """The loss of each sample, summed over processes that run one after another."""
    parts = []
    for rank in range(world):
        process = Process(rank, world)
        Validation(task, process).run({})  # type: ignore[arg-type]
        assert process.own is not None
        parts.append(process.own)
    assert all((torch.stack(parts) != 0).sum(0) == 1)  # each sample by one process
    return torch.stack(parts).sum(0).tolist()


@pytest.mark.parametrize("stage", ORDER)
def test_values_are_the_same_for_any_number_of_processes(
    tiny: Tiny, trained: Path, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("train.validation.CHUNK", 2)
    task = make_task(tiny(*SMALL), trained, stage)
    one = validate(task)
    assert len(one) == (2 if stage == "clip" else 6)
    assert one == validate(task) == validate(task, 2) == validate(task, 5)


def test_every_level_has_its_noise_and_keeps_it(tiny: Tiny, trained: Path) -> None:
    """t = (level + 1/2) / levels, nothing dropped, each sample its own noise, held-out pictures alone."""
    task = make_task(tiny(*SMALL, "base.train.text_drop=1.0", "base.train.image_drop=1.0"), trained, "base")
    seen: list[dict[str, Any]] = []
    forward = task.forward
    task.forward = lambda batch: seen.append(batch) or forward(batch)  # type: ignore[method-assign]
    validation = Validation(task, Process())  # type: ignore[arg-type]
    validation.run({})
    validation.run({})
    assert validation.pictures.tolist() == task.pictures.heldout
    batch, again = seen
    assert batch["t"].tolist() == pytest.approx([1 / 6, 1 / 2, 5 / 6] * 2)
    assert batch["keep_text"].all() and batch["keep_image"].all()
    assert len({row.sum().item() for row in batch["noise"]}) == 6
    assert all(torch.equal(batch[name], again[name]) for name in batch)
    assert torch.equal(batch["x"][0], batch["x"][2]) and not torch.equal(batch["x"][0], batch["x"][3])


def test_the_mean_is_that_of_the_levels(tiny: Tiny, trained: Path) -> None:
    task = make_task(tiny(*SMALL), trained, "sr256")
    result = Validation(task, Process()).run({})  # type: ignore[arg-type]
    losses = torch.tensor(validate(task), dtype=torch.float64).view(2, 3)
    assert result.by_level == pytest.approx(losses.mean(0).tolist())
    assert result.loss == pytest.approx(losses.mean().item())
    record, line = result.event("sr256", 24)
    assert record == {"event": "validation", "images": 24, "loss": result.loss, "by_t": result.by_level}
    assert line.startswith(f"sr256        24  validation loss {result.loss:.4f} (by t: ")


def test_it_measures_the_given_weights_and_gives_back_the_others(tiny: Tiny, trained: Path) -> None:
    task = make_task(tiny(*SMALL), trained, "sr256")
    own = {name: p.clone() for name, p in task.network.named_parameters()}
    other = {name: p.detach() + 0.02 for name, p in task.network.named_parameters()}
    validation = Validation(task, Process())  # type: ignore[arg-type]
    with averaged(task.network, other):
        expected = validation.run({})
    assert validation.run(other) == expected != validation.run({})
    assert all(torch.equal(own[name], p) for name, p in task.network.named_parameters())
    with pytest.raises(KeyError), averaged(task.network, other):
        raise KeyError
    assert all(torch.equal(own[name], p) for name, p in task.network.named_parameters())


def test_dropout_is_off_and_training_goes_on(tiny: Tiny, trained: Path) -> None:
    task = make_task(tiny(*SMALL, "sr256.stage.unet.dropout=0.5"), trained, "sr256")
    task.train()
    assert validate(task) == validate(task)
    assert task.training and task.network.training


def test_without_held_out_pictures_there_is_none(tiny: Tiny, tmp_path: Path) -> None:
    write_data(tmp_path, [r | {"split": "train"} for r in make_records()[:3]])
    task = make_task(tiny(f"data.folder={tmp_path}", "data.styles=[noto]"), tmp_path, "sr256")
    assert not Validation(task, Process())  # type: ignore[arg-type]


def test_a_bad_picture_is_replaced_by_the_next() -> None:
    held = Held(torch.tensor([5, 7, 9]).numpy())
    assert [held[i] for i in range(3)] == [5, 7, 9]
    assert [held.replacement(2, attempt) for attempt in (1, 2, 3)] == [5, 7, 9]


def validations(out: Path, stage: str) -> list[dict[str, Any]]:
    events = map(json.loads, (out / f"{stage}-training" / "events.jsonl").read_text().splitlines())
    return [event for event in events if event["event"] == "validation"]


def test_a_run_that_was_stopped_has_the_values_of_one_that_was_not(
    recipe_file: Path, tmp_path: Path, trained: Path
) -> None:
    settings = ["--set", "sr256.train.validate_images=8", "--stage", "sr256"]
    for out, parts in ((tmp_path / "whole", [24]), (tmp_path / "parts", [16, 24])):
        for images in parts:
            argv = [str(recipe_file), "--out", str(out), *settings]
            assert main([*argv, "--set", f"sr256.train.images={images}"]) == 0
    whole, parts = (validations(tmp_path / name, "sr256") for name in ("whole", "parts"))
    assert [v["images"] for v in whole] == [8, 16, 24] == [v["images"] for v in parts]
    # the learning rate does not depend on the length of this run, so the weights are the same
    assert whole == parts
    assert whole[-1] == validations(trained, "sr256")[-1]


# of the trained tiny recipe at 24 images, float32; a change here is a change of what is trained or measured
GOLDEN = {"clip": 0.997445, "prior": 1.103229, "base": 0.242427, "sr256": 0.242293, "sr1024": 0.261197}


@pytest.mark.parametrize("stage", ORDER)
def test_golden_values(trained: Path, stage: str) -> None:
    (record,) = validations(trained, stage)
    assert record["images"] == 24 and math.isfinite(record["loss"])
    assert record["loss"] == pytest.approx(GOLDEN[stage], rel=1e-4)
