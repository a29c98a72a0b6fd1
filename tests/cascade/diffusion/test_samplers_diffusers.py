"""Step by step against an independent implementation: the schedulers of diffusers, on the discrete grid.

diffusers keeps its tables in float32, which costs the noisiest levels of the cosine grid 2e-4. The schedulers
are therefore given the levels in float64, which `test_levels` compares on their own, so that the steps can be
held to a tolerance that an error in a coefficient does not pass.
"""

import pytest
import torch

from cascade.config import ScheduleConfig
from cascade.diffusion import alpha_sigma, ddim, ddpm, dpmpp_2m, dpmpp_2m_sde, heun, make_schedule
from cascade.diffusion.schedule import DiscreteSchedule

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation:DeprecationWarning"
)  # diffusers and numpy 2

STEPS = 25
COMMON = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "timestep_spacing": "trailing"}
BETAS = {"discrete_linear": "linear", "discrete_cosine": "squaredcos_cap_v2"}


def grid_of(name: str) -> DiscreteSchedule:
    schedule = make_schedule(ScheduleConfig(name=name))  # type: ignore[arg-type]
    assert isinstance(schedule, DiscreteSchedule)
    return schedule


def exact(kind: type, name: str, **settings):
    """A scheduler of diffusers on the float64 levels of the grid."""
    scheduler = kind(beta_schedule=BETAS[name], **COMMON, **settings)
    bar = grid_of(name).logsnrs.sigmoid()
    scheduler.alphas_cumprod = bar
    scheduler.alphas = bar / torch.cat([torch.ones(1), bar[:-1]])
    scheduler.betas = 1 - scheduler.alphas
    return scheduler


def estimate(x, logsnr):
    """A denoiser that is neither affine nor bounded by the data range."""
    alpha = alpha_sigma(logsnr)[0].to(x.dtype).reshape(-1, 1, 1, 1)
    return 1.2 * torch.tanh(1.5 * alpha * x + 0.2 * torch.roll(x, 1, -1))


def noises() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 4, 4, generator=generator, dtype=torch.float64)
    return x, torch.randn(STEPS, 2, 3, 4, 4, generator=generator, dtype=torch.float64)


def ours(sampler, name: str, **settings) -> list[torch.Tensor]:
    """x at every evaluation, and the result."""
    schedule, (x, step_noise) = grid_of(name), noises()
    seen = []

    def denoise(x, logsnr):
        seen.append(x)
        return estimate(x, logsnr)

    result = sampler(denoise, x, schedule.grid(STEPS), noise=lambda i: step_noise[i], **settings)
    return [*seen, result]


def theirs(scheduler, name: str, evaluate=estimate, **step_settings) -> list[torch.Tensor]:
    """The same trajectory, driven by a scheduler that is told eps."""
    schedule, (x, step_noise) = grid_of(name), noises()
    scheduler.set_timesteps(STEPS)
    assert len(scheduler.timesteps) >= STEPS
    x = x * scheduler.init_noise_sigma  # schedulers of the variance-exploding kind keep x / alpha
    seen = []
    for i, t in enumerate(scheduler.timesteps):
        scaled = scheduler.scale_model_input(x, t)
        seen.append(scaled)
        logsnr = schedule.logsnrs[int(t)].expand(len(x))
        alpha, sigma = alpha_sigma(logsnr[0])
        eps = (scaled - alpha * evaluate(scaled, logsnr)) / sigma
        settings = {key: value(step_noise[i]) for key, value in step_settings.items()}
        x = scheduler.step(eps, t, x, **settings).prev_sample
    return [*seen, x]


def largest_difference(left: list[torch.Tensor], right: list[torch.Tensor]) -> float:
    assert len(left) == len(right)
    return max(float((a - b).abs().max()) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("name", BETAS)
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_ddim(name, eta):
    scheduler = exact(diffusers.DDIMScheduler, name, clip_sample=False, set_alpha_to_one=True)
    expected = theirs(scheduler, name, eta=lambda _: eta, variance_noise=lambda noise: noise)
    assert largest_difference(ours(ddim, name, eta=eta), expected) < 1e-9


@pytest.mark.parametrize("name", BETAS)
@pytest.mark.parametrize("variance", ["small", "large"])
def test_ddpm(name, variance, monkeypatch):
    """diffusers draws inside the step: its draw is replaced by the same noise."""
    scheduler = exact(diffusers.DDPMScheduler, name, variance_type=f"fixed_{variance}", clip_sample=False)
    queue = iter(noises()[1])
    monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *_, **__: next(queue))
    expected = theirs(scheduler, name)
    if variance == "large":
        # its last step adds noise of the first betas although nothing is left to draw: compare up to there
        assert largest_difference(ours(ddpm, name, variance=variance)[:-1], expected[:-1]) < 1e-9
    else:
        assert largest_difference(ours(ddpm, name, variance=variance), expected) < 1e-9


def test_ddpm_learned_range(monkeypatch):
    scheduler = exact(
        diffusers.DDPMScheduler, "discrete_linear", variance_type="learned_range", clip_sample=False
    )
    schedule, (x, step_noise) = grid_of("discrete_linear"), noises()
    queue = iter(step_noise)
    monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *_, **__: next(queue))
    scheduler.set_timesteps(STEPS)
    expected = []
    y = x
    for t in scheduler.timesteps:
        expected.append(y)
        logsnr = schedule.logsnrs[int(t)].expand(2)
        alpha, sigma = alpha_sigma(logsnr[0])
        eps = (y - alpha * estimate(y, logsnr)) / sigma
        y = scheduler.step(torch.cat([eps, torch.tanh(y)], dim=1), t, y).prev_sample
    seen = []

    def denoise(x, logsnr):
        seen.append(x)
        return estimate(x, logsnr), (torch.tanh(x) + 1) / 2

    ddpm(denoise, x, schedule.grid(STEPS), noise=lambda i: step_noise[i])
    assert largest_difference(seen, expected) < 1e-9


@pytest.mark.parametrize("name", BETAS)
@pytest.mark.parametrize(
    ("sampler", "algorithm"), [(dpmpp_2m, "dpmsolver++"), (dpmpp_2m_sde, "sde-dpmsolver++")]
)
def test_dpmpp_2m(name, sampler, algorithm):
    """Its sigmas are float32 whatever the levels are."""
    scheduler = exact(
        diffusers.DPMSolverMultistepScheduler,
        name,
        algorithm_type=algorithm,
        solver_order=2,
        solver_type="midpoint",
        final_sigmas_type="zero",
    )
    expected = theirs(scheduler, name, variance_noise=lambda noise: noise)
    assert largest_difference(ours(sampler, name), expected) < 2e-5


def test_heun():
    """Its float32 sigmas go up to 157, and with them its x."""
    scheduler = exact(diffusers.HeunDiscreteScheduler, "discrete_linear")
    expected = theirs(scheduler, "discrete_linear")
    assert largest_difference(ours(heun, "discrete_linear"), expected) < 1e-4


@pytest.mark.parametrize("name", BETAS)
def test_levels(name):
    bar = diffusers.DDPMScheduler(beta_schedule=BETAS[name], **COMMON).alphas_cumprod.double()
    assert torch.allclose(grid_of(name).logsnrs.sigmoid(), bar, atol=1e-6)


def test_zero_terminal_snr_rescale():
    from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr

    betas = rescale_zero_terminal_snr(torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64))
    schedule = make_schedule(ScheduleConfig(name="discrete_linear", zero_terminal_snr=True))
    assert isinstance(schedule, DiscreteSchedule)
    assert torch.allclose(schedule.logsnrs.sigmoid(), (1 - betas).cumprod(0), atol=1e-12)
