"""The loop and its command: every stage, resume, stop, several processes, and what is refused."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from cascade.config import to_dict
from cascade.errors import InputError
from train import loop
from train.__main__ import main
from train.loop import crossed
from train.optim import learning_rate
from train.recipe import ORDER, Recipe, TrainConfig
from train.signals import REQUEUE, settle_worker

ROOT = Path(__file__).parents[2]
Tiny = Callable[..., Recipe]


def records(out: Path, stage: str) -> list[dict[str, Any]]:
    lines = (out / f"{stage}-training" / "log.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def tensors(out: Path, stage: str, name: str = "ema", images: int = 24) -> dict[str, Tensor]:
    return load_file(out / f"{stage}-training" / f"state-{images:010d}" / f"{name}.safetensors")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_learning_rate_rises_stays_and_falls() -> None:
    cfg = TrainConfig(images=1000, batch=10, lr=2.0, warmup_images=100, cooldown_images=400)
    assert learning_rate(cfg, 0) == pytest.approx(0.2)  # the first step is not lost
    assert learning_rate(cfg, 40) == pytest.approx(1.0)
    assert learning_rate(cfg, 90) == learning_rate(cfg, 600) == 2.0
    assert learning_rate(cfg, 800) == pytest.approx(1.0)
    assert learning_rate(cfg, 990) == pytest.approx(0.05)
    assert learning_rate(cfg, 1000) == learning_rate(cfg, 1010) == 0.0
    flat = TrainConfig(images=1000, batch=10, lr=2.0, warmup_images=0)
    assert {learning_rate(flat, images) for images in (0, 500, 990)} == {2.0}


def test_crossed() -> None:
    assert [before for before in range(0, 64, 8) if crossed(before, before + 8, 20)] == [16, 32, 56]
    assert crossed(0, 40, 20)


@pytest.mark.parametrize("stage", ORDER)
def test_every_stage_trains_and_writes_its_component(trained: Path, stage: str) -> None:
    lines = records(trained, stage)
    assert [line["images"] for line in lines] == [8, 16, 24]
    for line in lines:
        assert 0 < line["loss"] < 100 and line["images_per_s"] > 0 and line["flop_per_s"] > 0
        assert 0 <= line["data_wait"] <= 1
        assert len(line["loss_by_t"]) == 4
    assert {"config.json", "diffusion_pytorch_model.safetensors"} <= set(names(trained / stage))
    states = ["state-0000000016", "state-0000000024"]
    grids = [] if stage in ("clip", "prior") else ["grid-0000000024.png"]
    assert names(trained / f"{stage}-training") == sorted(
        [*states, *grids, "events.jsonl", "log.jsonl", "recipe.yaml", "version.txt"]
    )


def test_training_lowers_the_loss(recipe_file: Path, tmp_path: Path) -> None:
    argv = [str(recipe_file), "--out", str(tmp_path), "--stage", "sr256", "--set", "sr256.train.images=240"]
    assert main([*argv, "--set", "sr256.train.lr=3e-3", "--set", "sr256.train.save_images=1000"]) == 0
    losses = [line["loss"] for line in records(tmp_path, "sr256")]
    assert sum(losses[-8:]) < 0.8 * sum(losses[:8])


def resumed(recipe_file: Path, trained: Path, out: Path, stage: str, *settings: str) -> None:
    """Train a stage, stop it by a signal in the second of three steps, and let it go on."""
    argv = [str(recipe_file), "--out", str(out), "--stage", stage]
    argv += [word for setting in settings for word in ("--set", setting)]
    if stage != "clip":
        shutil.copytree(trained / "clip", out / "clip")
    steps = 0
    with pytest.MonkeyPatch.context() as patch:

        def step(self: loop.Run, *arguments: Any) -> Any:
            nonlocal steps
            steps += 1
            if steps == 2:
                os.kill(os.getpid(), signal.SIGUSR1)
            return original(self, *arguments)

        original = loop.Run._step
        patch.setattr(loop.Run, "_step", step)
        former = signal.getsignal(signal.SIGUSR1)
        assert main([*argv, "--set", f"{stage}.train.save_images=1000"]) == REQUEUE == 75
        assert signal.getsignal(signal.SIGUSR1) == former
    assert steps == 2
    assert [n for n in names(out / f"{stage}-training") if n.startswith("state")] == ["state-0000000016"]
    assert (out / stage).is_dir()  # the component as well
    assert main(argv) == 0


HARDER = ("base.stage.unet.dropout=0.2", "base.train.workers=1", "base.train.ema_sigma_rel=[0.1]")
GUESS = ("base.stage.unet.position_grid=16", "base.stage.unet.guess_width=8", "base.train.guess_batch=16")


@pytest.mark.parametrize(
    ("stage", "settings"),
    [*((stage, ()) for stage in ORDER), ("base", HARDER), ("base", (*HARDER, *GUESS))],
    ids=[*ORDER, "harder", "guess"],
)
def test_a_run_that_was_stopped_and_resumed_equals_one_that_was_not(
    recipe_file: Path,
    trained: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    stage: str,
    settings: tuple[str, ...],
) -> None:
    """Bit for bit, of every stage; dropout, worker processes and a second average included."""
    whole, parts = trained, tmp_path / "parts"
    if settings:
        whole = tmp_path / "whole"
        shutil.copytree(trained / "clip", whole / "clip")
        argv = [str(recipe_file), "--out", str(whole), "--stage", stage]
        assert main([*argv, *(word for setting in settings for word in ("--set", setting))]) == 0
    resumed(recipe_file, trained, parts, stage, *settings)
    output = capsys.readouterr().out
    assert "resumed from state-0000000016" in output
    assert "other settings than before: train.save_images 1000 there, 8 now" in output
    for name in ("ema", "network", "optimizer", *(["ema-0.1"] if settings else [])):
        expected, found = tensors(whole, stage, name), tensors(parts, stage, name)
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[key], found[key]) for key in expected)
    assert [r["loss"] for r in records(parts, stage)] == [r["loss"] for r in records(whole, stage)]
    if settings:
        plain, found = tensors(trained, stage), tensors(parts, stage)
        assert any(not torch.equal(plain[key], found[key]) for key in plain)  # dropout is on


def test_a_finished_run_writes_its_component_again(recipe_file: Path, trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "sr256-training", tmp_path / "sr256-training")
    assert main([str(recipe_file), "--out", str(tmp_path), "--stage", "sr256"]) == 0
    weights = "sr256/diffusion_pytorch_model.safetensors"
    assert (tmp_path / weights).read_bytes() == (trained / weights).read_bytes()
    assert len(records(tmp_path, "sr256")) == 3  # no step was made


def test_damaged_and_foreign_states_are_named(
    recipe_file: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(trained / "sr256-training", tmp_path / "sr256-training")
    (tmp_path / "sr256-training" / "state-0000000024" / "ema.safetensors").write_bytes(b"[/]")
    argv = [str(recipe_file), "--out", str(tmp_path), "--stage", "sr256"]
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert "passed over state-0000000024: ema.safetensors is damaged (sha256 differs)" in out
    assert "resumed from state-0000000016" in out
    before = names(tmp_path / "sr256-training")
    assert main([*argv, "--set", "sr256.train.batch=12"]) == 2
    error = capsys.readouterr().err
    assert "state-0000000024: it belongs to another configuration (batch 8 there, 12 now)" in error
    assert "set it back, or give another --out" in error and error.count("\n") == 1
    assert names(tmp_path / "sr256-training") == before


def test_a_dry_run_prints_every_plan_and_writes_nothing(
    recipe_file: Path, tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main([str(recipe_file), "--dry-run", "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert re.findall(r"^stage: (.*)$", text, re.M) == list(ORDER)
    lines = ("world size: 1 (alone on cpu)", "global batch: 8 = 1 x 1 accumulated x 8", "precision: fp32")
    for line in lines:
        assert text.count(f"\n{line}\n") == len(ORDER)
    for name in ("parameters", "FLOP per image", "memory per process"):
        assert len(re.findall(rf"^{name}: [\d.]+", text, re.M)) == len(ORDER)
    _, base = text.split("stage: base")
    printed = yaml.safe_load(base.split("recipe:\n")[1].split("\nstage: ")[0])
    assert printed["base"] == to_dict(tiny().base) and "clip" not in printed
    assert not out.exists()


def test_a_smoke_run_makes_one_step_one_grid_and_one_save(recipe_file: Path, tmp_path: Path) -> None:
    assert main([str(recipe_file), "--smoke", "--stage", "sr1024", "--out", str(tmp_path)]) == 0
    assert names(tmp_path / "sr1024-training") == [
        "events.jsonl", "grid-0000000008.png", "log.jsonl", "recipe.yaml", "state-0000000008", "version.txt",
    ]  # fmt: skip
    assert (tmp_path / "sr1024" / "config.json").exists()


def test_the_recipe_and_the_version_stand_beside_the_checkpoints(trained: Path, tiny: Tiny) -> None:
    from train.recipe import load_recipe

    for folder in (trained, trained / "base-training"):
        assert load_recipe(str(folder / "recipe.yaml")) == tiny()
        assert (folder / "version.txt").read_text().strip()


def test_stages_of_different_precision_follow_each_other(
    trained: Path, recipe_file: Path, tmp_path: Path
) -> None:
    """One process trains them all, and Accelerate's state outlives a stage."""
    argv = [str(recipe_file), "--out", str(tmp_path), "--stage", "sr256"]
    assert main([*argv, "--set", "sr256.train.precision=bf16"]) == 0
    loss, plain = records(tmp_path, "sr256")[-1]["loss"], records(trained, "sr256")[-1]["loss"]
    assert loss != plain and loss == pytest.approx(plain, rel=0.05)


class Worker(Dataset[dict[str, Tensor]]):
    """What a batch-making process says of itself, beside big arrays such as it makes."""

    def __len__(self) -> int:
        return 40

    def __getitem__(self, _: int) -> dict[str, Tensor]:
        ignored = [signal.getsignal(name) == signal.SIG_IGN for name in (signal.SIGTERM, signal.SIGINT)]
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
        anonymous = next(int(line.split()[1]) for line in lines if line.startswith("Anonymous"))  # KiB
        return {
            "ignored": torch.tensor(ignored),
            "anonymous": torch.tensor(anonymous / 1024),
            "x": torch.ones(256, 3, 64, 64),
            "states": torch.ones(256, 32, 384),
        }


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux's /proc")
def test_batch_makers_outlive_signals_and_keep_no_buffers() -> None:
    loader = DataLoader(Worker(), batch_size=None, num_workers=1, worker_init_fn=settle_worker)
    reports = [(bool(batch["ignored"].all()), float(batch["anonymous"])) for batch in loader]
    assert all(ignored for ignored, _ in reports)
    assert reports[-1][1] - reports[4][1] < 100  # MiB; each batch has 24


# -- refusals ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["emojy"], "unknown recipe 'emojy'"),
        (["RECIPE", "--stage", "sr265"], "unknown stage 'sr265': .*did you mean 'sr256'"),
        (["RECIPE", "--set", "base.train.learning_rate=1"], "unknown key 'learning_rate'"),
        (["RECIPE", "--set", "base.train.lr=[1"], "setting 'base.train.lr=.1'"),
        (
            ["RECIPE", "--set", "data.folder=/nowhere"],
            "no data set in /nowhere: build it with python -m train.data",
        ),
        (["RECIPE", "--stage", "prior", "--out", "TMP"], "no trained clip in .*: train --stage clip first"),
        (["RECIPE", "--assemble", "--out", "TMP"], "no trained stage in"),
        (["RECIPE", "--stage", "clip", "--out", "TMP/file/out"], "cannot write to .*: Not a directory"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    recipe_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    (tmp_path / "file").touch()
    places = {"RECIPE": str(recipe_file), "TMP": str(tmp_path)}
    if "--out" not in arguments:
        arguments = [*arguments, "--out", "TMP"]
    for name, place in places.items():
        arguments = [argument.replace(name, place) for argument in arguments]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("train: ")
    assert re.search(message, error), error


def test_a_batch_must_divide_by_the_processes(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop.Accelerator, "num_processes", 3)
    with pytest.raises(InputError, match="base.train.batch 8: expected a multiple of 3 processes"):
        loop.fit(tiny(), "base", tmp_path)


# -- several processes ---------------------------------------------------------------------------------------

LAUNCHED = """
import sys
import train.components, train.encoded
from tests.conftest import ToyEncoder
for module in (train.components, train.encoded):
    module.load_text_encoder = lambda *_, **__: ToyEncoder()
from train.recipe import load_recipe
from train.loop import fit
from pathlib import Path
recipe, out = load_recipe(sys.argv[1]), Path(sys.argv[2])
for stage in ("clip", "base"):
    fit(recipe, stage, out)
from accelerate import PartialState
assert PartialState().num_processes == 2
PartialState().destroy_process_group()
"""


def test_two_processes_train_what_one_does(recipe_file: Path, trained: Path, tmp_path: Path) -> None:
    """Contrastive loss over both halves of the batch, then a diffusion stage, in one process group."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    common |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "error", "-c", LAUNCHED, str(recipe_file), str(tmp_path)],
            cwd=ROOT,
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert "world size: 2 (DDP on cpu)" in outputs[0] and "stage:" not in outputs[1]
    for stage in ("clip", "base"):
        for one, two in zip(records(trained, stage), records(tmp_path, stage), strict=True):
            assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
        expected, found = tensors(trained, stage), tensors(tmp_path, stage)
        slots = tensors(trained, stage, "optimizer")
        for name, value in expected.items():
            # softmax is blind to key biases: Adam would blow up the rounding of their gradient, which is zero
            moved = slots[f"{name}/exp_avg_sq"] > 1e-16
            gap = torch.where(moved, (found[name] - value).abs(), 0)
            assert float(gap.max()) < 1e-6, name
