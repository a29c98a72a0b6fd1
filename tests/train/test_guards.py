"""What is watched in training, without a run: skips, jumps, the numbers that a step hands over, the log."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from rich.console import Console
from torch import nn

from cascade.errors import InputError
from train.guards import (
    BINS,
    ENOUGH,
    Report,
    Skips,
    Spikes,
    by_noise_level,
    skip_event,
    skip_message,
)
from train.optim import guarded_mean, make_optimizer, update
from train.recipe import TrainConfig
from train.status import Clock, Log, Reports


def report(
    images: int = 0, norm: float = 1.0, losses: Any = (1.0, 1.0, 1.0, 1.0), stop: bool = False
) -> Report:
    return Report(images, stop, norm, np.asarray(losses, float), np.ones(BINS))


def test_losses_by_noise_level() -> None:
    losses, t = torch.tensor([1.0, 2.0, 4.0, 8.0]), torch.tensor([0.0, 0.26, 0.24, 1.0])
    assert by_noise_level(losses, t).tolist() == [5, 2, 0, 8, 2, 1, 0, 1]
    assert by_noise_level(losses, None).tolist() == [15, 0, 0, 0, 4, 0, 0, 0]
    assert Report(0, False, 1.0, np.array([5.0, 2, 0, 8]), np.array([2.0, 1, 0, 1])).by_level == [
        2.5,
        2,
        None,
        8,
    ]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_makes_the_gradient_so(bad: float) -> None:
    """Also one whose own gradient is finite, as that of an overflown square."""
    w = torch.ones(3, requires_grad=True)
    losses = w * torch.tensor([1.0, 2.0, 3.0])
    guarded_mean(losses).backward()
    assert w.grad is not None and torch.allclose(w.grad, torch.tensor([1.0, 2.0, 3.0]) / 3)
    w.grad = None
    guarded_mean(torch.cat([w[:2], (w[2:].detach() + bad)])).backward()
    assert w.grad is not None and not torch.isfinite(w.grad[:2]).any()


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit", "adafactor"])
def test_an_update_with_a_gradient_that_is_not_finite_changes_nothing(optimizer: str) -> None:
    """Neither weights nor moments nor step counts; the next one does."""
    if optimizer == "adamw8bit":
        pytest.importorskip("bitsandbytes")
    accelerator, net = Accelerator(cpu=True), nn.Linear(2, 2)
    cfg = TrainConfig(images=1, batch=1, lr=0.1, weight_decay=0.5, optimizer=optimizer)  # type: ignore[arg-type]
    prepared = accelerator.prepare(make_optimizer(cfg, net.parameters()))
    slots = prepared.optimizer.state

    def step(x: float) -> tuple[float, list[torch.Tensor]]:
        accelerator.backward(net(torch.full((1, 2), x)).square().sum())
        norm = update(accelerator, prepared, net.parameters(), 1.0)
        values = [v for s in slots.values() for v in s.values()]
        return float(norm), [torch.as_tensor(v).clone() for v in [*net.parameters(), *values]]

    _, before = step(1.0)
    for bad in (math.nan, math.inf):
        norm, after = step(bad)
        assert not math.isfinite(norm)
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        assert all(p.grad is None for p in net.parameters())
    norm, after = step(1.0)
    assert math.isfinite(norm) and not any(
        torch.equal(a, b) for a, b in zip(before[:2], after[:2], strict=True)
    )


def test_a_row_of_skips_ends_the_run_and_a_step_between_does_not() -> None:
    skips, bad = Skips("base", 3), report(norm=math.nan)
    for each in (bad, bad, report(), bad, bad):
        skips.add(each)
        skips.check()
    skips.add(bad)
    with pytest.raises(InputError, match="stage base: 3 updates in a row were skipped"):
        skips.check()
    skips.add(report())
    skips.check(last=True)
    skips.add(bad)
    skips.check()
    with pytest.raises(InputError, match="1 updates in a row"):
        skips.check(last=True)


def test_the_samples_of_a_skipped_update_are_named() -> None:
    samples, t = list(range(10, 22)), [i / 12 for i in range(12)]
    losses = [1.0] * 12
    event = skip_event("base", 96, samples, t, losses)
    assert event["what"] == "gradient" and event["samples"] == samples
    assert skip_message(event).endswith("17 (t 0.583) and 4 more")
    losses[3] = math.nan
    event = skip_event("base", 96, samples, t, losses)
    assert (event["what"], event["samples"], event["t"]) == ("loss", [13], [0.25])
    assert (
        skip_message(event) == "base        96  update skipped, the loss is not finite; samples 13 (t 0.250)"
    )
    event = skip_event("clip", 8, [4, 5], [], [math.inf])  # one loss for the whole batch
    assert (event["samples"], event["t"]) == ([4, 5], [])
    assert "samples 4, 5" in skip_message(event)


def test_a_jump_is_found_in_its_quarter_of_t_alone() -> None:
    """Losses of very different size; 30% of noise on each is no jump, three times the usual is."""
    noise, level = np.random.default_rng(0), np.array([1.0, 0.1, 0.01, 0.001])
    spikes = Spikes()
    for _ in range(2 * ENOUGH):
        assert spikes.add(report(losses=level * noise.lognormal(0, 0.05, 4))) == []
    ((quarter, loss, median),) = spikes.add(report(losses=level * [1, 1, 3, 1]))
    assert quarter == 2 and loss == pytest.approx(0.03) and median == pytest.approx(0.01, rel=0.05)
    assert spikes.add(report(losses=level * [1, math.nan, 1, 1])) == []  # the other guard's


def test_nothing_is_a_jump_before_enough_is_known() -> None:
    spikes = Spikes()
    assert not any(spikes.add(report(losses=[10.0**i] * 4)) for i in range(ENOUGH))


# -- reports and the log -------------------------------------------------------------------------------------


@pytest.mark.parametrize("lag", [0, 1])
def test_reports_come_in_order_and_none_is_lost(lag: int) -> None:
    reports = Reports(torch.device("cpu"), lag)
    seen = []
    for step in range(4):
        reports.add(8 * step, torch.tensor([float(step), step == 2, *range(2 * BINS)]), f"batch {step}")
        found = list(reports.ready())
        assert [r.images for r, _ in found] == [8 * (step - lag)] * (step >= lag)
        seen += found
    seen += reports.ready(everything=True)
    assert [r.norm for r, _ in seen] == [0, 1, 2, 3] and [kept for _, kept in seen][3] == "batch 3"
    assert [r.stop for r, _ in seen] == [False, False, True, False]
    assert seen[0][0].sums.tolist() == [0, 1, 2, 3] and seen[0][0].counts.tolist() == [4, 5, 6, 7]


class NoTrackers:
    def log(self, *_: Any, **__: Any) -> None:
        pass


def make_log(folder: Path, out: io.StringIO) -> Log:
    console = Console(file=out, width=400)
    clock = Clock(torch.device("cpu"))
    return Log(folder, console, "base", 1e9, clock, NoTrackers(), main=True)  # type: ignore[arg-type]


def test_a_record_tells_the_mean_of_its_steps_and_the_skipped_ones(tmp_path: Path) -> None:
    out = io.StringIO()
    log = make_log(tmp_path, out)
    for each in (report(losses=[1, 2, 3, 4]), report(norm=math.nan), report(losses=[3, 4, 5, 6], norm=2.5)):
        log.add(each, 8)
    log.flush(24, 48, 1e-3)
    (line,) = (tmp_path / "log.jsonl").read_text().splitlines()
    record = json.loads(line)
    assert record["loss"] == 3.5 and record["loss_by_t"] == [2, 3, 4, 5]
    assert (record["images"], record["skipped"], record["grad_norm"]) == (24, 1, 2.5)
    assert "outside" in out.getvalue()
    log.add(report(norm=math.inf), 8)  # nothing but a skipped step: no number, and still JSON
    log.flush(32, 48, 1e-3)
    assert json.loads((tmp_path / "log.jsonl").read_text().splitlines()[1])["loss"] is None


def test_a_resumed_log_holds_each_step_once(tmp_path: Path) -> None:
    """What a killed run told of steps after its state goes, half a line as well."""
    lines = [json.dumps({"images": n, "loss": 1.0}) + "\n" for n in (8, 16, 24)]
    (tmp_path / "log.jsonl").write_text("".join(lines) + '{"images": 3')
    (tmp_path / "events.jsonl").write_text('{"event": "spike", "images": 17}\n')
    make_log(tmp_path, io.StringIO()).resume(16)
    assert (tmp_path / "log.jsonl").read_text() == "".join(lines[:2])
    assert (tmp_path / "events.jsonl").read_text() == ""


def test_the_clock_tells_computing_from_all_else(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("train.status.time.perf_counter", lambda: now[0])
    clock = Clock(torch.device("cpu"))

    def wait(seconds: float) -> None:
        now[0] += seconds

    clock.data_wanted()
    wait(1)
    clock.data_ready()
    with clock.computing():
        wait(8)
    wait(1)  # average, log, save
    assert clock.read() == (10, 0.1, pytest.approx(0.2))
    clock.restart()
    with clock.paused():
        wait(5)  # a grid
    with clock.computing():
        wait(4)
    assert clock.read() == (4, 0, 0)
