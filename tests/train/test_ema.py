"""Averages of the weights against one written by hand, and power-function profiles against closed forms."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cascade.checkpoint import load_component, save_component
from cascade.errors import InputError
from train.ema import EMA, YOUNG, PowerEMA, gamma_of, main, overlap, reconstruct, sigma_rel_of, solve
from train.state import Trained, save_averages


def reference(history: list[Tensor], decay: float) -> Tensor:
    """Scalar arithmetic in float64: e <- d e + (1 - d) w, d = min(decay, (1 + n) / (10 + n))."""
    average = history[0].double()
    for n, weight in enumerate(history[1:], start=1):
        d = min(decay, (1 + n) / (10 + n))
        average = d * average + (1 - d) * weight.double()
    return average


def test_average_of_a_random_walk() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    ema = EMA(net, 0.8)
    history = {name: [p.detach().clone()] for name, p in net.named_parameters()}
    for _ in range(60):  # the decay has reached its maximum after 31
        with torch.no_grad():
            for name, p in net.named_parameters():
                p.add_(torch.randn_like(p))
                history[name].append(p.detach().clone())
        ema.update()
    assert ema.updates == 60
    for name, weights in history.items():
        assert torch.allclose(ema.average[name].double(), reference(weights, 0.8), atol=1e-5), name


def test_an_old_average_takes_one_step_of_four_with_the_decay_of_all() -> None:
    torch.manual_seed(0)
    net, decay, steps = nn.Linear(1, 1, bias=False), 0.9, 500
    ema, weights = EMA(net, decay), [net.weight.item()]
    for step in range(1, steps + 1):
        with torch.no_grad():
            net.weight.add_(0.1 * torch.randn(1, 1))
        weights.append(net.weight.item())
        before = ema.average["weight"].clone()
        ema.update()
        assert torch.equal(before, ema.average["weight"]) == (step > YOUNG and step % 4 > 0)
    assert decay < (1 + YOUNG) / (10 + YOUNG)  # it rises no more
    thinned = reference([torch.tensor(w) for w in weights[: YOUNG + 1]], decay)
    for step in range(YOUNG + 4, steps + 1, 4):
        thinned = thinned * decay**4 + (1 - decay**4) * weights[step]
    assert math.isclose(ema.average["weight"].item(), thinned.item(), abs_tol=1e-5)
    every = reference([torch.tensor(w) for w in weights], decay).item()
    assert abs(ema.average["weight"].item() - every) < 0.5


def test_the_first_average_forgets_its_random_start() -> None:
    net = nn.Linear(1, 1, bias=False)
    ema = EMA(net, 0.9999)
    start = net.weight.detach().clone()
    with torch.no_grad():
        net.weight.add_(1)
    ema.update()
    assert torch.allclose(ema.average["weight"], start + 9 / 11)


def test_names_buffers_and_what_is_not_trained() -> None:
    net = nn.BatchNorm1d(2)
    net.bias.requires_grad_(False)
    ema = EMA(net, 0.5)
    net(torch.randn(8, 2))
    with torch.no_grad():
        net.weight.fill_(3.0)
        net.bias.fill_(5.0)
    ema.update()
    state = ema.state_dict()
    assert state.keys() == net.state_dict().keys() and ema.average.keys() == {"weight"}
    assert torch.equal(state["running_mean"], net.get_buffer("running_mean"))  # the network's of now
    assert torch.equal(state["bias"], net.bias) and not torch.equal(state["weight"], net.weight)


def test_the_average_is_float32_whatever_the_network_is() -> None:
    net = nn.Linear(2, 2).to(torch.bfloat16)
    ema = EMA(net, 0.999)
    ema.update()
    assert all(tensor.dtype == torch.float32 for tensor in ema.average.values())


# -- power-function profiles ---------------------------------------------------------------------------------


def test_exponents_of_the_paper() -> None:
    assert gamma_of(0.05) == pytest.approx(16.97, abs=0.01)
    assert gamma_of(0.10) == pytest.approx(6.94, abs=0.01)
    for sigma_rel in (0.01, 0.03, 0.1, 0.25, 0.28):
        assert sigma_rel_of(gamma_of(sigma_rel)) == pytest.approx(sigma_rel, rel=1e-9)


def test_the_width_is_that_of_the_profile() -> None:
    """sigma_rel against the standard deviation of tau^gamma on [0, 1], integrated."""
    tau = (np.arange(200_000) + 0.5) / 200_000
    for sigma_rel in (0.05, 0.2):
        weight = tau ** gamma_of(sigma_rel)
        weight /= weight.sum()
        mean = float(weight @ tau)
        assert float(weight @ (tau - mean) ** 2) ** 0.5 == pytest.approx(sigma_rel, rel=1e-4)


def test_overlaps_are_integrals() -> None:
    t_a, t_b = 0.6, 1.5
    g_a, g_b = gamma_of(0.1), gamma_of(0.05)
    tau = (np.arange(100_000) + 0.5) / 100_000 * t_a
    integral = (
        (g_a + 1) * tau**g_a / t_a ** (g_a + 1) * (g_b + 1) * tau**g_b / t_b ** (g_b + 1)
    ).mean() * t_a
    one, other = (np.asarray(x) for x in ((t_a, g_a), (t_b, g_b)))
    assert overlap(one[0], one[1], other[0], other[1]) == pytest.approx(integral, rel=1e-6)
    assert overlap(other[0], other[1], one[0], one[1]) == pytest.approx(integral, rel=1e-6)
    assert np.isfinite(overlap(np.asarray(1e9), np.asarray(200.0), np.asarray(1.0), np.asarray(200.0)))


class Walk:
    """Weights on a course in time, averaged at every step by several profiles."""

    def __init__(self, *sigma_rels: float) -> None:
        self.net = nn.Linear(1, 1, bias=False)
        self.averages = {sigma_rel: PowerEMA(self.net, sigma_rel) for sigma_rel in sigma_rels}

    def to(self, value: float) -> None:
        with torch.no_grad():
            self.net.weight.fill_(value)
        for ema in self.averages.values():
            ema.update()

    def value(self, sigma_rel: float) -> float:
        return float(self.averages[sigma_rel].average["weight"])


def test_the_tracked_average_is_the_integral() -> None:
    """Of theta(t) = t it is (gamma + 1) / (gamma + 2) t; of the random start nothing is left."""
    walk, steps = Walk(0.05, 0.2), 4000
    for n in range(1, steps + 1):
        walk.to(n / steps)
    for sigma_rel in (0.05, 0.2):
        gamma = gamma_of(sigma_rel)
        assert walk.value(sigma_rel) == pytest.approx((gamma + 1) / (gamma + 2), abs=2 / steps)


def test_a_tracked_profile_is_its_own_reconstruction() -> None:
    times, gammas = [1.0, 2.0, 3.0, 3.0], [gamma_of(s) for s in (0.05, 0.05, 0.05, 0.1)]
    assert np.allclose(solve(times, gammas, 3.0, gamma_of(0.1)), [0, 0, 0, 1], atol=1e-6)
    assert np.allclose(solve(times, gammas, 2.0, gamma_of(0.05)), [0, 1, 0, 0], atol=1e-6)


@pytest.mark.parametrize("sigma_rel", [0.07, 0.15])
def test_reconstruction_against_the_average_that_was_tracked(tmp_path: Path, sigma_rel: float) -> None:
    """On a course that bends; from 8 snapshots of 0.05 and 0.10."""
    steps, walk = 2048, Walk(0.05, 0.10, sigma_rel)
    for n in range(1, steps + 1):
        t = n / steps
        walk.to(float(np.sin(9 * t) + t**2))
        if n % (steps // 8) == 0:
            kept = {f"ema-{s:g}": walk.averages[s].average for s in (0.05, 0.10)}
            save_averages(tmp_path, kept, {"images": 32 * n})
    tensors, images = reconstruct(tmp_path, sigma_rel)
    assert images == 32 * steps
    expected, nearest = (
        walk.value(sigma_rel),
        min(abs(walk.value(s) - walk.value(sigma_rel)) for s in (0.05, 0.10)),
    )
    assert abs(float(tensors["weight"]) - expected) < min(2e-3, nearest / 10)


def test_the_command_writes_a_component(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    net = nn.BatchNorm1d(2)
    net.running_mean = torch.tensor([7.0, 8.0])
    averages: list[EMA] = [EMA(net, 0.9), PowerEMA(net, 0.05), PowerEMA(net, 0.1)]
    optimizer = torch.optim.AdamW(net.parameters())
    for images in (8, 16):
        with torch.no_grad():
            net.weight.add_(1)
        for ema in averages:
            ema.update()
        snapshot = Trained(net, averages, optimizer).snapshot(True)
        save_averages(tmp_path / "base-training", snapshot, {"images": images})
    save_component(tmp_path / "base", {"a": 1}, averages[0].state_dict(), "Stage")
    assert main([str(tmp_path), "base", "--sigma-rel", "0.1"]) == 0
    assert "base averaged by sigma_rel 0.1 at 16 images" in capsys.readouterr().out
    component = load_component(tmp_path / "base-ema-0.1", "Stage")
    assert component.config == {"a": 1}
    assert torch.allclose(component.tensors["weight"], averages[2].average["weight"])
    assert torch.equal(component.tensors["running_mean"], torch.tensor([7.0, 8.0]))
    assert (
        main([str(tmp_path), "base", "--sigma-rel", "0.1", "--images", "8", "--to", str(tmp_path / "x")]) == 0
    )
    assert (
        load_component(tmp_path / "x").tensors["weight"][0] == 2.0
    )  # the first average is the first weights


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["base", "--sigma-rel", "0.1"],
            "no snapshots of averages in .*base-training: expected",
        ),
        (["sr256", "--sigma-rel", "0.3"], "sigma_rel 0.3: expected a number from 0.01 to 0.28"),
        (
            ["sr256", "--sigma-rel", "0.1", "--images", "9"],
            "no snapshot at 9 images in .*; the nearest",
        ),
        (["sr256", "--sigma-rel", "0.1"], "no component folder"),
    ],
)
def test_bad_input_of_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    snapshot: dict[str, Any] = {"ema-0.1": {"weight": torch.ones(2)}}
    save_averages(tmp_path / "sr256-training", snapshot, {"images": 8})
    assert main([str(tmp_path), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("train.ema: ")
    assert re.search(message, error), error


def test_a_width_that_no_profile_has() -> None:
    with pytest.raises(InputError, match="sigma_rel 0.005"):
        gamma_of(0.005)
