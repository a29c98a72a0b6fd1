"""fp16: the loss is scaled, gradients are unscaled before they are clipped, what overflows is skipped and
halves the scale, and the scale is part of the state. On the CPU, which knows fp16 as GPUs do."""

from __future__ import annotations

import json
import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.train.test_guards import report
from train import loop
from train.__main__ import main
from train.guards import Skips, skip_message
from train.optim import guarded_mean, make_optimizer, update
from train.processes import make_accelerator
from train.recipe import TrainConfig
from train.signals import REQUEUE

SCALE = 2.0**16  # torch's first
FAR = 2.0**13  # too large for the small CLIP


class Updates:
    """Updates of a linear map by one sample, computed in float32 whatever is scaled."""

    def __init__(self, precision: str, optimizer: str = "adamw") -> None:
        settings: dict[str, Any] = {"precision": precision, "optimizer": optimizer, "weight_decay": 0.5}
        cfg = TrainConfig(images=1, batch=1, lr=0.1, **settings)
        self.accelerator: Accelerator = make_accelerator(cfg, "base")
        torch.manual_seed(0)
        self.network = nn.Linear(3, 2)
        self.optimizer = self.accelerator.prepare(make_optimizer(cfg, self.network.parameters()))

    def backward(self, x: float) -> list[Tensor]:
        """The gradients, as they are before an update."""
        losses = self.network(torch.full((1, 3), x)).square().sum(1)
        self.accelerator.backward(guarded_mean(losses))
        return [p.grad.clone() for p in self.network.parameters() if p.grad is not None]

    def update(self, clip: float) -> tuple[float, list[Tensor]]:
        """The norm, and all that an update changes."""
        norm = update(self.accelerator, self.optimizer, self.network.parameters(), clip)
        slots = [v for s in self.optimizer.optimizer.state.values() for v in s.values()]
        return float(norm), [torch.as_tensor(v).clone() for v in [*self.network.parameters(), *slots]]

    @property
    def scale(self) -> float:
        assert self.accelerator.scaler is not None
        return self.accelerator.scaler.get_scale()


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_a_scaled_update_is_the_plain_one_to_the_bit(optimizer: str) -> None:
    """A power of two is exact. Clipped: a norm of scaled gradients would be clipped 65,536 times as much."""
    plain, scaled = Updates("fp32", optimizer), Updates("fp16", optimizer)
    assert scaled.scale == SCALE and plain.accelerator.scaler is None
    for x, clip in ((1.0, 0.25), (2.0, math.inf), (0.5, 1e-3)):
        for a, b in zip(plain.backward(x), scaled.backward(x), strict=True):
            assert torch.equal(a * SCALE, b) and bool(b.abs().max() > 0)
        (norm, after), (scaled_norm, scaled_after) = plain.update(clip), scaled.update(clip)
        assert norm == scaled_norm > clip or clip == math.inf
        assert all(torch.equal(a, b) for a, b in zip(after, scaled_after, strict=True))


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_an_overflow_changes_nothing_but_the_scale_which_is_halved(optimizer: str) -> None:
    updates = Updates("fp16", optimizer)
    updates.backward(1.0)
    _, before = updates.update(1.0)
    for n, bad in enumerate((math.inf, 1e18, math.nan), 1):  # 1e18: the loss is finite, the gradient is not
        updates.backward(bad)
        norm, after = updates.update(1.0)
        assert not math.isfinite(norm) and updates.scale == SCALE / 2**n
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        assert all(p.grad is None for p in updates.network.parameters())
    updates.backward(1.0)
    norm, after = updates.update(1.0)
    assert math.isfinite(norm) and updates.scale == SCALE / 8
    assert not any(torch.equal(a, b) for a, b in zip(before[:2], after[:2], strict=True))


def test_only_a_scaled_loss_may_overflow() -> None:
    """It does not spoil the state, as a loss that is not finite may. A row of either ends the run."""
    gradient, loss = report(norm=math.inf), report(norm=math.nan, losses=(1, math.nan, 1, 1))
    for scaled, each, suspect in ((True, gradient, False), (True, loss, True), (False, gradient, True)):
        skips = Skips("base", 2, scaled)
        skips.add(each)
        assert skips.suspect == suspect != skips.overflow(each) and skips.in_a_row == 1
        skips.check()
        skips.add(each)
        with pytest.raises(ValueError, match="2 updates in a row"):
            skips.check()
        skips.add(report())
        assert not skips.suspect


def train(recipe_file: Path, out: Path, *more: str) -> int:
    settings = ("precision=fp16", "images=64", "lr=1e-4")
    words = [word for setting in settings for word in ("--set", f"clip.train.{setting}")]
    return main([str(recipe_file), "--out", str(out), "--stage", "clip", *words, *more])


def read(out: Path, images: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    folder = out / "clip-training" / f"state-{images:010d}"
    tensors = {f"{p.stem}/{k}": v for p in folder.glob("*.safetensors") for k, v in load_file(p).items()}
    return json.loads((folder / "state.json").read_text())["scaler"], tensors


def test_a_run_in_fp16_finds_its_scale_and_goes_on_with_it(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first scale is too large, and doubles after two steps that it suits: stopped in between or not, to
    the last bit."""
    made, scaler, step = [], torch.amp.GradScaler, loop.Run._step
    dtypes: set[torch.dtype] = set()

    def scaled(device: str) -> torch.amp.GradScaler:
        made.append(scaler(device, init_scale=FAR, growth_interval=2))
        return made[-1]

    def stopped(self: loop.Run, *arguments: Any) -> Any:
        if self.counters.images == 40 and len(made) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        for module in self.task.network.modules():
            if isinstance(module, nn.Linear) and not module._forward_hooks:
                module.register_forward_hook(lambda m, x, y: dtypes.add(y.dtype))
        losses, norm = step(self, *arguments)
        assert losses.dtype == torch.float32 == next(self.task.network.parameters()).dtype
        return losses, norm

    monkeypatch.setattr(torch.amp, "GradScaler", scaled)
    monkeypatch.setattr(loop.Run, "_step", stopped)
    assert train(recipe_file, tmp_path / "whole") == 0
    assert train(recipe_file, tmp_path / "parts") == REQUEUE
    assert train(recipe_file, tmp_path / "parts") == 0 and len(made) == 3
    assert "resumed from state-0000000048" in capsys.readouterr().out
    assert torch.float16 in dtypes
    whole, parts = (read(tmp_path / name, 64) for name in ("whole", "parts"))
    assert whole[0] == parts[0] and whole[1].keys() == parts[1].keys()
    assert all(torch.equal(whole[1][key], parts[1][key]) for key in whole[1])
    events = (tmp_path / "parts" / "clip-training" / "events.jsonl").read_text().splitlines()
    skipped = [e for e in map(json.loads, events) if e["event"] == "skipped"]
    assert skipped and all(e["what"] == "overflow" for e in skipped)
    assert "the loss scale is halved" in skip_message(skipped[0])
    lines = (tmp_path / "parts" / "clip-training" / "log.jsonl").read_text().splitlines()
    record = [json.loads(line)["skipped"] for line in lines]
    assert 0 < sum(record) == len(skipped) < len(record) == 8
    scale, good = FAR, 0
    for skip in record:
        scale, good = (scale / 2, 0) if skip else (scale, good + 1)
        if good == 2:
            scale, good = scale * 2, 0
    assert (whole[0]["scale"], whole[0]["_growth_tracker"]) == (scale, good)
