"""Several real processes: the same training at any number of them, stops, faults, and what each of them
says."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from tests.train.ranks import Ranks, wait_until
from train.signals import REQUEUE

FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}
ZERO = {"ACCELERATE_USE_DEEPSPEED": "true"}
DEEPSPEED = find_spec("deepspeed") is not None


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """DeepSpeed takes seconds to import, which Accelerate does under FSDP2 as well, where it is installed."""
    modules = ["deepspeed.runtime.zero.stage_1_and_2"] if DEEPSPEED else []
    with Ranks(tmp_path_factory.mktemp("ranks"), modules) as found:
        yield found


@pytest.fixture(scope="module")
def recipe20(recipe_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny recipe at 20 steps: one save at the end, a record a step. Adam's eps is large: else it blows
    up the rounding of gradients that are zero, such as those of key biases under softmax."""
    data = yaml.safe_load(recipe_file.read_text())
    for stage in ("clip", "sr256"):
        data[stage]["train"] |= {
            "images": 160,
            "save_images": 160,
            "log_images": 8,
            "eps": 1e-3,
            "ema_sigma_rel": [0.1],
        }
    path = tmp_path_factory.mktemp("recipe20") / "twenty.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


def state(out: Path, stage: str, images: int = 160) -> dict[str, Tensor]:
    folder = out / f"{stage}-training" / f"state-{images:010d}"
    return {f"{p.stem}/{k}": v for p in sorted(folder.glob("*.safetensors")) for k, v in load_file(p).items()}


def losses(out: Path, stage: str) -> list[float]:
    lines = (out / f"{stage}-training" / "log.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def events(out: Path, stage: str) -> list[dict[str, Any]]:
    path = out / f"{stage}-training" / "events.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def gap(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[k].double() - b[k].double()).abs().max()) for k in a)


def argv(recipe: Path, out: Path, stage: str, *settings: str) -> list[str | Path]:
    words = [word for setting in settings for word in ("--set", f"{stage}.train.{setting}")]
    return [recipe, "--stage", stage, "--out", out, *words]


@pytest.fixture(scope="module")
def alone(ranks: Ranks, recipe20: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stage by one process with batch 8: what all others must equal."""
    out = tmp_path_factory.mktemp("alone")
    assert ranks.run(1, argv(recipe20, out, "sr256")).status == [0]
    return out


@pytest.mark.parametrize(
    ("number", "settings", "env"),
    [
        (2, (), {}),
        (1, ("accumulate=2",), {}),
        (2, ("accumulate=2", "gradient_checkpointing=true"), {}),
        (2, ("accumulate=2",), FSDP),
    ],
    ids=["2x4", "1x2x4", "2x2x2-checkpointed", "2x2x2-fsdp2"],
)
def test_any_division_of_the_batch_trains_the_same(
    ranks: Ranks,
    recipe20: Path,
    alone: Path,
    tmp_path: Path,
    number: int,
    settings: tuple[str, ...],
    env: dict[str, str],
) -> None:
    """Weights, averages and moments within 1e-6 after 20 steps, and every loss."""
    result = ranks.run(number, argv(recipe20, tmp_path, "sr256", *settings), env=env)
    assert result.status == [0] * number, result.err
    assert gap(state(alone, "sr256"), state(tmp_path, "sr256")) < 1e-6
    assert losses(tmp_path, "sr256") == pytest.approx(losses(alone, "sr256"), abs=1e-6)
    kind = "FSDP2" if env else "DDP" if number > 1 else "alone"
    assert f"world size: {number} ({kind} on cpu)" in result.out[0]
    assert result.out[1:] == [""] * (number - 1)


def test_the_contrastive_stage_trains_the_same_on_two(ranks: Ranks, recipe20: Path, tmp_path: Path) -> None:
    for name, number in (("one", 1), ("two", 2)):
        assert ranks.run(number, argv(recipe20, tmp_path / name, "clip")).status == [0] * number
    assert gap(state(tmp_path / "one", "clip"), state(tmp_path / "two", "clip")) < 1e-6


def test_2_then_1_then_4_processes_train_what_one_does(
    ranks: Ranks, recipe20: Path, alone: Path, tmp_path: Path
) -> None:
    for number, fault in ((2, ["terminate", 7, 1]), (1, ["terminate", 6, 0, "SIGUSR1"]), (4, None)):
        result = ranks.run(number, argv(recipe20, tmp_path, "sr256"), fault=fault)
        assert result.status == [REQUEUE if fault else 0] * number, result.err
        assert result.err == [""] * number
    assert "resumed from state-0000000104" in result.out[0]
    assert "other settings than before: processes 1 there, 4 now" in result.out[0]
    assert losses(tmp_path, "sr256") == pytest.approx(losses(alone, "sr256"), abs=1e-6)
    assert gap(state(alone, "sr256"), state(tmp_path, "sr256")) < 1e-6


@pytest.mark.parametrize("env", [{}, FSDP], ids=["ddp", "fsdp2"])
def test_two_processes_stopped_and_resumed_equal_two_that_were_not(
    ranks: Ranks, recipe20: Path, tmp_path: Path, env: dict[str, str]
) -> None:
    """To the last bit."""
    whole, parts = (argv(recipe20, tmp_path / name, "sr256", "images=40") for name in ("whole", "parts"))
    assert ranks.run(2, whole, env=env).status == [0, 0]
    stopped = ranks.run(2, parts, env=env, fault=["terminate", 3, 1])
    assert stopped.status == [REQUEUE, REQUEUE], stopped.err
    assert ranks.run(2, parts, env=env).status == [0, 0]
    assert gap(*(state(tmp_path / name, "sr256", 40) for name in ("whole", "parts"))) == 0
    assert losses(tmp_path / "whole", "sr256") == losses(tmp_path / "parts", "sr256")


# -- DeepSpeed -----------------------------------------------------------------------------------------------


@pytest.mark.skipif(not DEEPSPEED, reason="needs deepspeed")
def test_zero_trains_what_one_process_does_across_stages_and_stops(
    ranks: Ranks, recipe20: Path, alone: Path, tmp_path: Path
) -> None:
    """Stage 2, then stage 1, then DDP: weights, averages and moments within 1e-6 after 20 steps."""
    second = ZERO | {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1"}  # as Accelerate's launcher sets it
    first = ZERO | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "1"}
    parts = (
        ("ZeRO-2", second, ["terminate", 7, 1], ("accumulate=2",)),
        ("ZeRO-1", first, ["terminate", 6, 0], ("accumulate=2", "gradient_checkpointing=true")),
        ("DDP", {}, None, ()),
    )
    for kind, env, fault, settings in parts:
        result = ranks.run(2, argv(recipe20, tmp_path, "sr256", *settings), env=env, fault=fault)
        assert result.status == [REQUEUE if fault else 0] * 2, result.err
        assert f"world size: 2 ({kind} on cpu)" in result.out[0] and result.out[1] == ""
    assert "resumed from state-0000000104" in result.out[0]
    assert losses(tmp_path, "sr256") == pytest.approx(losses(alone, "sr256"), abs=1e-6)
    assert gap(state(alone, "sr256"), state(tmp_path, "sr256")) < 1e-6


@pytest.mark.skipif(not DEEPSPEED, reason="needs deepspeed")
def test_zero_skips_what_is_not_finite_and_goes_on_to_the_bit(
    ranks: Ranks, recipe20: Path, tmp_path: Path
) -> None:
    """The fourth of five steps has a loss that is no number, on one process."""
    whole, parts = (argv(recipe20, tmp_path / name, "sr256", "images=40") for name in ("whole", "parts"))
    runs = (
        (whole, ["poison", 4, 1], 0),
        (parts, ["terminate", 3, 1], REQUEUE),
        (parts, ["poison", 1, 1], 0),
    )
    for command, fault, status in runs:
        result = ranks.run(2, command, env=ZERO, fault=fault)
        assert result.status == [status, status], result.err
    assert gap(*(state(tmp_path / name, "sr256", 40) for name in ("whole", "parts"))) == 0
    (event,) = (e for e in events(tmp_path / "parts", "sr256") if e["event"] == "skipped")
    assert event["images"] == 32 and event["what"] == "loss" and len(event["samples"]) == 1
    counts = [x for key, x in state(tmp_path / "whole", "sr256", 40).items() if key.endswith("/step")]
    assert counts and all(count == 4 for count in counts)


@pytest.mark.skipif(not DEEPSPEED, reason="needs deepspeed")
def test_zero_casts_as_ddp_does(ranks: Ranks, recipe20: Path, tmp_path: Path) -> None:
    for name, env, precision in (("zero", ZERO, "bf16"), ("ddp", {}, "bf16"), ("plain", {}, "fp32")):
        settings = ("images=8", f"precision={precision}")
        result = ranks.run(2, argv(recipe20, tmp_path / name, "clip", *settings), env=env)
        assert result.status == [0, 0], result.err
    cast, expected, plain = (losses(tmp_path / name, "clip") for name in ("zero", "ddp", "plain"))
    assert cast == expected != plain
    weights = state(tmp_path / "zero", "clip", 8)
    assert all(x.dtype == torch.float32 for x in weights.values())


# -- stops and faults ----------------------------------------------------------------------------------------


def test_a_signal_while_a_grid_is_drawn_ends_it_at_once_with_the_state_saved(
    ranks: Ranks, recipe20: Path, tmp_path: Path
) -> None:
    """The other process waits in a collective meanwhile."""
    settings = ("grid_images=48", "workers=1")
    pids = ranks.start(2, argv(recipe20, tmp_path, "sr256", *settings), fault=["slow_grid", 600])
    wait_until((tmp_path / "drawing").exists)
    for pid in pids:
        os.killpg(pid, signal.SIGTERM)  # the whole group, as a scheduler does: batch makers too
    result = ranks.wait()
    assert result.status == [REQUEUE, REQUEUE], result.err
    assert [path.name for path in (tmp_path / "sr256-training").glob("state-*")] == ["state-0000000048"]


def test_a_loss_that_is_not_finite_on_one_rank_skips_the_update_on_all(
    ranks: Ranks, recipe20: Path, tmp_path: Path
) -> None:
    """Step 4 of 10 changes nothing but the averages, and the samples are named."""
    settings = ("images=80", "save_images=8", "lr=1e-3")
    command = argv(recipe20, tmp_path, "sr256", *settings)
    assert ranks.run(2, command, fault=["terminate", 3, 0]).status == [REQUEUE, REQUEUE]
    result = ranks.run(2, [*command, "--smoke"], fault=["poison", 1, 1])
    assert result.status == [2, 2]  # a run that ends so has nothing to save
    skipped = ranks.run(2, command, fault=["poison", 1, 1])
    assert skipped.status == [0, 0], skipped.err
    assert re.search(
        r"sr256 +32  update skipped, the loss is not finite; samples \d+ \(t 0\.\d+\)\n", skipped.out[0]
    )
    (event,) = (e for e in events(tmp_path, "sr256") if e["event"] == "skipped")
    assert event["images"] == 32 and event["what"] == "loss" and len(event["samples"]) == 1
    assert "skipped" not in skipped.out[1]
    lines = (tmp_path / "sr256-training" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["skipped"] for line in lines] == [0, 0, 0, 1, 0, 0, 0, 0, 0, 0]
    assert all(torch.isfinite(x).all() for x in state(tmp_path, "sr256", 80).values())


def test_a_run_of_skipped_updates_ends_before_it_is_saved(
    ranks: Ranks, recipe20: Path, tmp_path: Path
) -> None:
    settings = ("lr=1e30", "warmup_images=0", "skip_limit=3", "save_images=8")
    result = ranks.run(2, argv(recipe20, tmp_path, "sr256", *settings))
    assert result.status == [2, 2]
    assert result.err[0].startswith("train: stage sr256: 3 updates in a row were skipped")
    assert result.err[0].count("\n") == 1 and result.err[1] == ""
    names = [path.name for path in (tmp_path / "sr256-training").glob("state-*")]
    assert names == ["state-0000000008"]  # its loss was that of the first weights


@pytest.mark.parametrize("fault", ["crash", "die", "unreadable"])
@pytest.mark.parametrize("workers", [0, 1])
def test_one_rank_that_fails_ends_all_and_says_why(
    ranks: Ranks, recipe20: Path, tmp_path: Path, fault: str, workers: int
) -> None:
    """The other one is inside a collective. No launcher helps here; it would only be faster."""
    result = ranks.run(2, argv(recipe20, tmp_path, "sr256", f"workers={workers}"), fault=[fault, 3, 1])
    assert result.status == [1, {"crash": 1, "die": -signal.SIGKILL, "unreadable": 2}[fault]]
    assert re.fullmatch(r"train: rank 0: the other processes are gone .*\n", result.err[0]), result.err[0]
    if fault == "crash":
        assert result.err[1].endswith("ArithmeticError: this rank fails\n")
    if fault == "unreadable":
        assert result.err[1] == "train: rank 1: cannot read a picture\n"


@pytest.mark.parametrize(
    ("settings", "env", "message"),
    [
        (
            ["--set", "sr256.train.batch=9"],
            {},
            "batch 9: expected a multiple of 2 processes, such as 8 or 10",
        ),
        (
            ["--set", "sr256.train.accumulate=3"],
            {},
            "a multiple of 2 processes x 3 parts, such as 6 or 12",
        ),
        (["--stage", "clip", "--set", "clip.train.accumulate=2"], {}, "clip.train.accumulate 2: expected 1"),
        (["--set", "sr256.train.precision=fp16"], FSDP, "precision fp16: expected bf16 under FSDP"),
        (["--set", "sr256.train.optimizer=adamw8bit"], FSDP, "adamw8bit: expected adamw under FSDP"),
        ([], ZERO | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, "zero_stage 3: expected 1 or 2"),
        ([], ZERO | {"ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "cpu"}, "device cpu: expected none"),
        ([], ZERO | {"ACCELERATE_GRADIENT_CLIPPING": "0.5"}, "expected sr256.train.grad_clip, 1; set"),
        (["--set", "sr256.train.optimizer=adafactor"], FSDP, "adafactor: expected adamw under FSDP"),
        ([], FSDP | {"FSDP_VERSION": "1"}, "launch settings: fsdp_version 1: expected 2"),
        (
            [],
            {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"},
            "expected sr256.train.accumulate, 1",
        ),
        (["--set", "data.folder=/nowhere"], {}, "no data set in /nowhere"),
        (["--out", "/dev/null/x"], {}, "cannot write to /dev/null/x: Not a directory"),
        (["--sage", "sr256"], {}, "unrecognized arguments: --sage sr256"),
    ],
)
def test_bad_settings_are_one_line_of_rank_0_and_status_2_on_all(
    ranks: Ranks,
    recipe_file: Path,
    tmp_path: Path,
    settings: list[str],
    env: dict[str, str],
    message: str,
) -> None:
    result = ranks.run(2, [recipe_file, "--stage", "sr256", "--out", tmp_path, *settings], env=env)
    assert result.status == [2, 2], result.err
    assert message in result.err[0] and result.err[0].startswith("train: ")
    assert result.err[0].count("\n") == 1 and result.err[1] == ""


def test_a_state_that_cannot_be_resumed_ends_all(
    ranks: Ranks, recipe20: Path, alone: Path, tmp_path: Path
) -> None:
    shutil.copytree(alone / "sr256-training", tmp_path / "sr256-training")
    result = ranks.run(2, argv(recipe20, tmp_path, "sr256", "batch=16"))
    assert result.status == [2, 2]
    assert "belongs to another configuration (batch 8 there, 16 now); set it back" in result.err[0]
    assert result.err[0].count("\n") == 1 and result.err[1] == ""
