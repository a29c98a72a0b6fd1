"""Samplers against Gaussian data N(mu, s^2), for which the best denoiser is known.

That denoiser is affine, so every sampler is an affine map of its initial noise and its step noises. One
run with unit vectors in place of noise yields the map's coefficients, hence the exact mean and variance
of what the sampler draws: no Monte Carlo error, and every tolerance is about discretisation alone.
"""

import functools
import math
import typing

import pytest
import torch

from cascade.config import SamplerName, ScheduleConfig
from cascade.diffusion import (
    SAMPLERS,
    alpha_sigma,
    ddim,
    ddim_invert,
    ddpm,
    dpmpp_2m,
    dpmpp_2m_sde,
    heun,
    make_schedule,
)
from cascade.diffusion.schedule import step_log_variances
from cascade.errors import InputError

MU = 0.4


def gaussian(std: float, mu: float = MU):
    """E[x_0 | x_t] of N(mu, std^2)."""

    def denoise(x, logsnr):
        alpha, sigma = (part.to(x.dtype)[:1] for part in alpha_sigma(logsnr))
        gain = alpha * std**2 / (alpha**2 * std**2 + sigma**2)
        return mu + gain * (x - alpha * mu)

    return denoise


def moments(sampler, grid, denoise, **settings) -> tuple[float, float]:
    """Exact mean and variance of the sampler's output: column 0 carries no noise, column 1 the initial
    unit noise, column 2 + i that of step i."""
    steps = len(grid) - 1
    x = torch.zeros(1, steps + 2, dtype=torch.float64)
    x[0, 1] = 1

    def noise(i: int) -> torch.Tensor:
        return torch.eye(steps + 2, dtype=torch.float64)[2 + i : 3 + i]

    drawn = sampler(denoise, x, grid, noise=noise, **settings)[0]
    return float(drawn[0]), float((drawn[1:] - drawn[0]).square().sum())


COSINE = ScheduleConfig()
MATCHED = ScheduleConfig(shift=-2 * math.log(0.5))  # t is then the angle atan(sigma / (alpha s)) for s = 0.5
NARROW = ScheduleConfig(logsnr_min=-8.5, logsnr_max=8.5)


@pytest.mark.parametrize(
    ("sampler", "steps", "schedule", "spacing"),
    [
        (functools.partial(ddpm, variance="large"), 250, COSINE, "t"),
        (functools.partial(ddim, eta=0.0), 250, MATCHED, "t"),  # first order: see the next test
        (dpmpp_2m, 50, COSINE, "t"),
        (dpmpp_2m, 50, ScheduleConfig(name="linear"), "logsnr"),
        (dpmpp_2m, 50, ScheduleConfig(name="discrete_cosine"), "t"),
        (functools.partial(dpmpp_2m_sde, eta=1.0), 50, NARROW, "logsnr"),
        (heun, 50, COSINE, "t"),
        (heun, 50, ScheduleConfig(name="linear"), "logsnr"),
    ],
    ids=str,
)
def test_reaches_mean_and_variance_within_one_percent(sampler, steps, schedule, spacing):
    mean, variance = moments(sampler, make_schedule(schedule).grid(steps, spacing), gaussian(0.5))
    assert mean == pytest.approx(MU, rel=0.01)
    assert variance == pytest.approx(0.25, rel=0.01)


@pytest.mark.parametrize("steps", [50, 250])
def test_ddim_variance_is_the_product_of_squared_cosines(steps):
    """For s = 1 a DDIM step turns x by the angle between its levels and shortens it by the cosine of it.
    So the variance falls short by pi^2 / (4 N) at best: 4.8% at 50 steps, 1.0% at 250."""
    grid = make_schedule(COSINE).grid(steps)
    angle = torch.atan((-grid / 2).exp())
    _, variance = moments(functools.partial(ddim, eta=0.0), grid, gaussian(1.0))
    assert variance == pytest.approx(float(angle.diff().cos().square().prod()), rel=1e-10)
    assert 1 - variance == pytest.approx(math.pi**2 / (4 * steps), rel=0.05)


@pytest.mark.parametrize(
    "sampler", [dpmpp_2m, heun, functools.partial(ddim, eta=0.0)], ids=["2m", "heun", "ddim"]
)
def test_order_of_convergence(sampler):
    """From a moderate noise level to another, against the exact flow: doubling the steps divides the
    error by 2 for the first-order sampler and by at least 3.3 for the second-order ones."""
    start, end = -6.0, 6.0
    errors = []
    for steps in (40, 80):
        grid = torch.linspace(start, end, steps + 1, dtype=torch.float64)
        _, variance = moments(sampler, grid, gaussian(0.5))
        level = [float(part) for pair in (grid[0], grid[-1]) for part in alpha_sigma(pair)]
        spread_start = level[0] ** 2 * 0.25 + level[1] ** 2
        spread_end = level[2] ** 2 * 0.25 + level[3] ** 2
        errors.append(abs(variance / (spread_end / spread_start) - 1))
    order = 1 if sampler not in (dpmpp_2m, heun) else 2
    assert errors[0] / errors[1] > (1.8 if order == 1 else 3.3)


@pytest.mark.parametrize("std", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("steps", [5, 25])
def test_ddpm_with_the_true_variance_is_exact_at_any_number_of_steps(std, steps):
    """The reverse step of Gaussian data is Gaussian; a network that emits its log variance as a fraction of
    the way from the smallest to the largest samples it without error."""
    grid = make_schedule(ScheduleConfig(logsnr_max=14.0)).grid(steps, "logsnr")[:-1]

    def denoise(x, logsnr):
        here = float(logsnr[0])
        there = float(grid[grid > here][0])
        (alpha, sigma), (alpha_s, _) = (
            map(float, alpha_sigma(torch.tensor(v).double())) for v in (here, there)
        )
        posterior = std**2 * sigma**2 / (alpha**2 * std**2 + sigma**2)  # Var[x_0 | x_t]
        low, high = (float(v) for v in step_log_variances(*torch.tensor([here, there]).double()))
        share = (1 - math.exp(here - there)) * alpha_s
        log_variance = math.log(math.exp(low) + share**2 * posterior)
        fraction = torch.full_like(x, (log_variance - low) / (high - low))
        assert -1e-6 <= float(fraction[0, 0]) <= 1 + 1e-6
        return gaussian(std)(x, logsnr), fraction

    mean, variance = moments(ddpm, grid, denoise)
    alpha, sigma = (float(part) for part in alpha_sigma(grid[-1]))
    start_alpha, start_sigma = (float(part) for part in alpha_sigma(grid[0]))
    assert variance == pytest.approx(alpha**2 * std**2 + sigma**2, rel=1e-4)
    assert mean == pytest.approx(alpha * MU, rel=2e-3)  # the run starts at mean 0 instead of alpha mu = 2e-4
    assert start_alpha * MU < 1e-3 and start_sigma > 0.999


def test_ddpm_variances_are_beta_tilde_beta_and_between():
    """Learned range against the formula with DDPM's own symbols (improved DDPM, equation 15)."""
    bar_t, bar_s = 0.3, 0.45
    logit = [math.log(bar / (1 - bar)) for bar in (bar_t, bar_s)]
    grid = torch.tensor(logit, dtype=torch.float64)
    beta = 1 - bar_t / bar_s
    tilde = beta * (1 - bar_s) / (1 - bar_t)

    def variance_of(fraction=None, **settings):
        def denoise(x, logsnr):
            x0 = torch.zeros_like(x)
            return x0 if fraction is None else (x0, torch.full_like(x, fraction))

        return moments(ddpm, grid, denoise, **settings)[1] - (bar_s / bar_t) * (1 - beta / (1 - bar_t)) ** 2

    assert variance_of() == pytest.approx(tilde, rel=1e-9)
    assert variance_of(variance="small") == pytest.approx(tilde, rel=1e-9)
    assert variance_of(variance="large") == pytest.approx(beta, rel=1e-9)
    assert variance_of(variance=0.3) == pytest.approx(tilde**0.7 * beta**0.3, rel=1e-9)
    assert variance_of(fraction=0.3) == pytest.approx(tilde**0.7 * beta**0.3, rel=1e-9)  # learned by default
    assert variance_of(fraction=0.3, variance="small") == pytest.approx(tilde, rel=1e-9)


def test_ddim_with_eta_one_is_ddpm_with_the_small_variance():
    grid = make_schedule(COSINE).grid(10)
    assert moments(ddim, grid, gaussian(0.5), eta=1.0) == pytest.approx(
        moments(ddpm, grid, gaussian(0.5), variance="small"), rel=1e-10
    )


def test_dpmpp_2m_sde_without_noise_is_dpmpp_2m():
    grid = make_schedule(COSINE).grid(10)
    assert moments(dpmpp_2m_sde, grid, gaussian(0.5), eta=0.0) == moments(dpmpp_2m, grid, gaussian(0.5))


@pytest.mark.parametrize("name", SAMPLERS)
def test_zero_terminal_snr_grid_starts_from_pure_noise(name):
    """At a log-SNR of -100 nothing overflows, also in float32 and for a nonlinear denoiser."""
    grid = make_schedule(ScheduleConfig(name="discrete_linear", zero_terminal_snr=True)).grid(20)

    def denoise(x, logsnr):
        return torch.tanh(x * alpha_sigma(logsnr)[0].float().reshape(-1, 1) + 0.2)

    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(20, 4, 6, generator=torch.Generator().manual_seed(1))
    result = SAMPLERS[name](denoise, x, grid, noise=lambda i: noise[i], eta=1.0)
    assert result.isfinite().all() and result.abs().max() <= 1


@pytest.mark.parametrize("name", SAMPLERS)
def test_point_data_is_found_in_one_step(name):
    grid = make_schedule(COSINE).grid(1)
    x = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    result = SAMPLERS[name](lambda x, logsnr: torch.full_like(x, 0.7), x, grid)
    assert torch.equal(result, torch.full_like(x, 0.7))


def mixture(x, logsnr):
    """E[x_0 | x_t] of an even mixture of N(-0.5, 0.1^2) and N(0.5, 0.1^2): a denoiser that is not affine."""
    alpha, sigma = (part.to(x.dtype).reshape(-1, 1) for part in alpha_sigma(logsnr))
    spread = alpha**2 * 0.01 + sigma**2
    log_odds = 2 * alpha * 0.5 * x / spread
    estimates = [m + alpha * 0.01 / spread * (x - alpha * m) for m in (-0.5, 0.5)]
    share = torch.sigmoid(log_odds)
    return (1 - share) * estimates[0] + share * estimates[1]


def test_inversion_round_trip():
    generator = torch.Generator().manual_seed(0)
    modes = torch.where(torch.rand(200, 4, generator=generator) < 0.5, -0.5, 0.5).double()
    x0 = modes + 0.1 * torch.randn(200, 4, generator=generator, dtype=torch.float64)
    errors = []
    for steps in (100, 400):
        grid = make_schedule(ScheduleConfig(logsnr_max=12.0, logsnr_min=-12.0)).grid(steps, "logsnr")
        latent = ddim_invert(mixture, x0, grid)
        assert float(latent.std()) == pytest.approx(1.0, abs=0.1)  # it is noise, not a picture
        errors.append(float((ddim(mixture, latent, grid) - x0).abs().mean()))
    assert errors[1] < 0.005
    assert errors[1] < errors[0] / 3  # first order


@pytest.mark.parametrize("name", ["ddpm", "ddim", "heun"])
def test_two_halves_of_a_grid_make_a_whole(name):
    """A run may stop at a finite level and go on from there. (A multistep sampler would lose its history.)"""
    grid = make_schedule(COSINE).grid(8)
    x = torch.randn(2, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noise = torch.randn(8, 2, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    whole = SAMPLERS[name](mixture, x, grid, noise=lambda i: noise[i], eta=1.0)
    middle = SAMPLERS[name](mixture, x, grid[:5], noise=lambda i: noise[i], eta=1.0)
    result = SAMPLERS[name](mixture, middle, grid[4:], noise=lambda i: noise[4 + i], eta=1.0)
    assert torch.allclose(result, whole, atol=1e-12)


@pytest.mark.parametrize("name", SAMPLERS)
def test_steps_are_reported_and_rows_are_independent(name):
    grid = make_schedule(COSINE).grid(6)
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noise = torch.randn(6, 3, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    seen = []
    whole = SAMPLERS[name](
        mixture,
        x,
        grid,
        noise=lambda i: noise[i],
        on_step=lambda i, total, x0: seen.append((i, total, x0.shape)),
    )
    assert seen == [(i, 6, x.shape) for i in range(6)]
    alone = SAMPLERS[name](mixture, x[1:2], grid, noise=lambda i: noise[i, 1:2])
    assert torch.allclose(alone, whole[1:2], atol=1e-12)


def test_every_sampler_of_the_config_exists():
    assert set(SAMPLERS) == set(typing.get_args(SamplerName))


def test_bad_arguments_are_refused():
    x, grid = torch.zeros(1, 2), make_schedule(COSINE).grid(3)
    with pytest.raises(InputError, match="strictly rising"):
        ddim(gaussian(1.0), x, grid.flip(0))
    with pytest.raises(InputError, match="eta is 1.5"):
        ddim(gaussian(1.0), x, grid, eta=1.5)
    with pytest.raises(InputError, match="eta is nan"):
        dpmpp_2m_sde(gaussian(1.0), x, grid, eta=math.nan)
    with pytest.raises(InputError, match="unknown variance"):
        ddpm(gaussian(1.0), x, grid, variance="huge")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="gives no variance"):
        ddpm(gaussian(1.0), x, grid, variance="learned")
    with pytest.raises(InputError, match="gamma in"):
        ddpm(gaussian(1.0), x, grid, variance=2.0)
