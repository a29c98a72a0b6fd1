"""Schedules: monotone, invertible, of the published closed forms, and grids that samplers can trust."""

import dataclasses
import math

import pytest
import torch

from cascade.config import ScheduleConfig
from cascade.diffusion.schedule import (
    ZERO_SNR_LOGSNR,
    DiscreteSchedule,
    alpha_sigma,
    make_schedule,
    section_indices,
)
from cascade.errors import InputError

CONTINUOUS = [
    ScheduleConfig(name=name, shift=shift, shift_low=low)
    for name in ("cosine", "linear", "sigmoid")
    for shift, low in (
        (0.0, None),
        (2 * math.log(64 / 256), None),
        (2 * math.log(64 / 512), 2 * math.log(64 / 32)),
    )
]
DISCRETE = [
    ScheduleConfig(name=name, zero_terminal_snr=rescaled)
    for name in ("discrete_cosine", "discrete_linear")
    for rescaled in (False, True)
]


def times(count: int = 2001) -> torch.Tensor:
    return torch.linspace(0, 1, count, dtype=torch.float64)


@pytest.mark.parametrize("config", CONTINUOUS, ids=str)
def test_continuous_logsnr_falls_strictly_and_inverts(config):
    schedule = make_schedule(config)
    logsnr = schedule.logsnr(times())
    assert logsnr.dtype == torch.float64
    assert (logsnr.diff() < 0).all()
    assert logsnr.max() <= config.logsnr_max + 1e-8
    assert logsnr.min() >= config.logsnr_min - 1e-8
    assert (schedule.t(logsnr) - times()).abs().max() < 1e-12


@pytest.mark.parametrize("config", CONTINUOUS, ids=str)
def test_slope_is_the_derivative(config):
    schedule = make_schedule(config)
    t = times()[100:-100].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(schedule.logsnr(t).sum(), t)
    assert torch.allclose(schedule.slope(schedule.logsnr(t.detach())), -gradient, rtol=1e-8)


@pytest.mark.parametrize("config", DISCRETE, ids=str)
def test_discrete_levels_fall_and_invert(config):
    schedule = make_schedule(config)
    assert isinstance(schedule, DiscreteSchedule)
    indices = torch.arange(1000)
    assert (schedule.logsnrs.diff() < 0).all()
    assert torch.equal(schedule.index(schedule.logsnrs), indices)
    assert torch.equal(schedule.index(schedule.logsnrs.float()), indices)  # what a float32 caller hands over
    assert torch.equal(schedule.logsnr(schedule.t(schedule.logsnrs)), schedule.logsnrs)
    assert torch.equal(schedule.index(schedule.logsnr((indices + 0.999) / 1000)), indices)
    assert schedule.index(torch.tensor([math.inf, -math.inf])).tolist() == [0, 999]


def test_cosine_is_the_closed_form_with_its_shift():
    wide = ScheduleConfig(name="cosine", logsnr_min=-40.0, logsnr_max=40.0, shift=-1.5)
    t = times()[1:-1]
    expected = -2 * torch.log(torch.tan(math.pi * t / 2)) - 1.5
    assert torch.allclose(make_schedule(wide).logsnr(t), expected, atol=1e-4)  # the cut at 40 moves t by 1e-9


def test_linear_is_the_closed_form():
    t = times()
    expected = -torch.log(torch.expm1(1e-4 + 10 * t**2))
    assert torch.allclose(make_schedule(ScheduleConfig(name="linear")).logsnr(t), expected, atol=1e-12)


def test_sigmoid_signal_follows_a_rescaled_sigmoid():
    schedule = make_schedule(ScheduleConfig(name="sigmoid", logsnr_min=-30.0, logsnr_max=30.0))
    t = times(11)
    curve = torch.sigmoid(-3 + 6 * t)
    expected = (curve[-1] - curve) / (curve[-1] - curve[0])
    assert torch.allclose(schedule.logsnr(t).sigmoid(), expected, atol=1e-10)


def test_interpolated_shift_holds_at_both_ends():
    wide = ScheduleConfig(logsnr_min=-60.0, logsnr_max=60.0)
    plain = make_schedule(wide)
    mixed = make_schedule(dataclasses.replace(wide, shift=-4.0, shift_low=1.0))
    t = torch.tensor([1e-3, 0.5, 1 - 1e-3], dtype=torch.float64)
    difference = mixed.logsnr(t) - plain.logsnr(t)
    assert torch.allclose(difference, (1 - t) * 1.0 + t * -4.0, atol=1e-6)


def test_shift_comes_before_the_cut():
    schedule = make_schedule(ScheduleConfig(shift=-4.0))
    assert schedule.ends == pytest.approx((-15.0, 15.0))


def test_discrete_grids_match_ddpm():
    linear = make_schedule(ScheduleConfig(name="discrete_linear"))
    cosine = make_schedule(ScheduleConfig(name="discrete_cosine"))
    assert isinstance(linear, DiscreteSchedule) and isinstance(cosine, DiscreteSchedule)
    assert float(linear.logsnrs[0]) == pytest.approx(math.log((1 - 1e-4) / 1e-4))
    assert float(alpha_sigma(linear.logsnrs[-1])[0]) == pytest.approx(0.0064, abs=5e-5)
    assert float(cosine.logsnrs[-1].exp()) == pytest.approx(2.4e-9, rel=0.03)


def test_zero_terminal_snr_keeps_the_first_level_and_ends_without_signal():
    schedule = make_schedule(ScheduleConfig(name="discrete_linear", zero_terminal_snr=True))
    plain = make_schedule(ScheduleConfig(name="discrete_linear"))
    assert isinstance(schedule, DiscreteSchedule) and isinstance(plain, DiscreteSchedule)
    assert float(schedule.logsnrs[0]) == pytest.approx(float(plain.logsnrs[0]), abs=1e-9)
    assert float(schedule.logsnrs[-1]) == ZERO_SNR_LOGSNR
    assert float(schedule.logsnrs[-2]) > -20


@pytest.mark.parametrize("config", [*CONTINUOUS, *DISCRETE], ids=str)
@pytest.mark.parametrize("spacing", ["t", "logsnr", "edm"])
def test_grid_rises_to_the_clean_picture(config, spacing):
    schedule = make_schedule(config)
    grid = schedule.grid(20, spacing)
    assert grid.shape == (21,)
    assert grid.dtype == torch.float64
    assert (grid.diff() > 0).all()
    assert grid[-1] == math.inf
    noisiest = schedule.ends[0]
    if spacing != "edm" or schedule.discrete:
        assert float(grid[0]) == pytest.approx(noisiest, abs=1e-6)
    else:
        assert float(grid[0]) == pytest.approx(max(noisiest, -2 * math.log(80)), abs=1e-6)


def test_edm_grid_is_the_rho_7_grid():
    grid = make_schedule(ScheduleConfig()).grid(18, "edm")
    i = torch.arange(18, dtype=torch.float64) / 17
    sigma = (80 ** (1 / 7) + i * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    assert torch.allclose(grid[:-1], -2 * sigma.log(), atol=1e-9)


def test_discrete_t_grid_takes_trailing_steps():
    schedule = make_schedule(ScheduleConfig(name="discrete_cosine"))
    assert isinstance(schedule, DiscreteSchedule)
    assert schedule.index(schedule.grid(4)[:-1]).tolist() == [999, 749, 499, 249]


def test_respacing_sections():
    assert section_indices("5") == [0, 250, 500, 749, 999]  # even strides of 249.75, both ends
    assert section_indices("2,1") == [0, 499, 500]
    smart50 = section_indices("10,6,4,3,2,2,3,4,6,10")  # DeepFloyd IF
    counts = [sum(index // 100 == section for index in smart50) for section in range(10)]
    assert counts == [10, 6, 4, 3, 2, 2, 3, 4, 6, 10]
    schedule = make_schedule(ScheduleConfig(name="discrete_linear"))
    assert isinstance(schedule, DiscreteSchedule)
    grid = schedule.respaced("2,1")
    assert torch.equal(grid[:-1], schedule.logsnrs[torch.tensor([500, 499, 0])])
    assert torch.equal(schedule.respaced([0, 499, 500]), grid)


@pytest.mark.parametrize("config", [ScheduleConfig(), ScheduleConfig(name="discrete_linear")], ids=str)
def test_previous_is_a_thousandth_of_time(config):
    schedule = make_schedule(config)
    t = torch.tensor([0.0, 0.0002, 0.3335, 0.9995], dtype=torch.float64)
    logsnr = schedule.logsnr(t)
    target, first = schedule.previous(logsnr)
    assert first.tolist() == [True, True, False, False]
    assert (target > logsnr).all() and target.isfinite().all()
    assert torch.allclose(target[2:], schedule.logsnr(t[2:] - 0.001), atol=1e-9)


def test_alpha_sigma_at_the_ends():
    alpha, sigma = alpha_sigma(torch.tensor([math.inf, 0.0, -math.inf], dtype=torch.float64))
    assert torch.allclose(alpha**2 + sigma**2, torch.ones(3, dtype=torch.float64))
    assert (alpha[0], sigma[0], alpha[2], sigma[2]) == (1, 0, 0, 1)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (ScheduleConfig(logsnr_min=5.0, logsnr_max=-5.0), "logsnr_min"),
        (ScheduleConfig(shift=10.0, shift_low=0.0), "would not fall"),
        (ScheduleConfig(name="linear", logsnr_min=10.0), "spans log-SNR"),
        (ScheduleConfig(zero_terminal_snr=True), "zero_terminal_snr needs"),
        (ScheduleConfig(name="discrete_linear", shift_low=1.0), "shift_low needs"),
    ],
)
def test_impossible_schedules_are_refused(config, message):
    with pytest.raises(InputError, match=message):
        make_schedule(config)


@pytest.mark.parametrize("name", ["cosine", "discrete_linear"])
def test_bad_grids_are_refused(name):
    schedule = make_schedule(ScheduleConfig(name=name))
    with pytest.raises(InputError, match="steps is 0"):
        schedule.grid(0)
    with pytest.raises(InputError, match="did you mean 'logsnr'"):
        schedule.grid(4, "logsn")  # type: ignore[arg-type]


@pytest.mark.parametrize("sections", ["", "ten", "1001", "0", "501,1"])
def test_bad_respacing_is_refused(sections):
    with pytest.raises(InputError, match="respacing"):
        section_indices(sections)


def test_indices_beyond_the_grid_are_refused():
    schedule = make_schedule(ScheduleConfig(name="discrete_linear"))
    assert isinstance(schedule, DiscreteSchedule)
    for indices in ([1000], [-1], []):
        with pytest.raises(InputError, match="expected indices"):
            schedule.respaced(indices)
