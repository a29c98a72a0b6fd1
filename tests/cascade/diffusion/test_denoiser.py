"""The denoiser: what the network is fed, and what its output comes to mean."""

import pytest
import torch
from torch import nn

from cascade.config import DiffusionConfig, ScheduleConfig
from cascade.diffusion import PREDICTIONS, Denoiser, corrupt
from cascade.errors import InputError


class Recorder(nn.Module):
    """Answers with `cond` and remembers what it was asked."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones((), dtype=dtype))

    def forward(self, x, time, cond):
        self.x, self.time = x, time
        return cond


def sample(sigma_data: float = 0.5):
    generator = torch.Generator().manual_seed(0)
    logsnr = torch.linspace(-8, 8, 6)
    x0, eps = torch.randn(2, 6, 3, 4, 4, generator=generator)
    return corrupt(x0, eps, logsnr, sigma_data), logsnr


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_perfect_output_gives_x0(prediction):
    corrupted, logsnr = sample()
    denoiser = Denoiser(Recorder(), DiffusionConfig(prediction=prediction))
    x0_hat = denoiser(corrupted.x_t, logsnr, corrupted.targets[prediction])
    assert torch.allclose(x0_hat, corrupted.targets["x0"], atol=2e-5)  # eps: 1 / alpha is 55 at -8


def test_edm_network_sees_unit_variance():
    """Its input is c_in x_edm, of unit variance for data of standard deviation sigma_data at every level."""
    generator = torch.Generator().manual_seed(0)
    x0 = 0.5 * torch.randn(6, 20_000, generator=generator)
    logsnr = torch.linspace(-8, 8, 6)
    corrupted = corrupt(x0, torch.randn(6, 20_000, generator=generator), logsnr)
    net = Recorder()
    Denoiser(net, DiffusionConfig(prediction="edm", sigma_data=0.5))(corrupted.x_t, logsnr, x0)
    assert torch.allclose(net.x.std(dim=1), torch.ones(6), atol=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_network_works_in_its_dtype_and_the_rest_in_float32(dtype):
    corrupted, logsnr = sample()
    net = Recorder(dtype)
    denoiser = Denoiser(net, DiffusionConfig())
    output, fraction = denoiser.raw(corrupted.x_t, logsnr, corrupted.targets["v"].to(dtype))
    assert net.x.dtype == dtype and net.time.dtype == torch.float32
    assert output.dtype == torch.float32 and fraction is None


def test_casting_the_denoiser_leaves_noise_levels_exact():
    denoiser = Denoiser(
        Recorder(), DiffusionConfig(schedule=ScheduleConfig(name="discrete_linear"))
    ).bfloat16()
    logsnr = denoiser.schedule.logsnr(torch.tensor([0.0, 0.5, 0.999]))
    assert denoiser.time_input(logsnr).tolist() == [0.0, 500.0, 999.0]


def test_time_input_of_a_continuous_schedule():
    denoiser = Denoiser(Recorder(), DiffusionConfig())
    logsnr = torch.tensor([25.0, 20.0, 0.0, -20.0, -100.0], dtype=torch.float64)
    assert denoiser.time_input(logsnr).tolist() == [0.0, 0.0, 500.0, 1000.0, 1000.0]


def test_learned_variance_is_the_second_half_of_the_channels():
    corrupted, logsnr = sample()
    denoiser = Denoiser(Recorder(), DiffusionConfig(learned_variance=True))
    variance = torch.linspace(-1, 1, 6).reshape(6, 1, 1, 1).expand(6, 3, 4, 4)
    output = torch.cat([corrupted.targets["v"], variance], dim=1)
    x0_hat, fraction = denoiser.with_variance(corrupted.x_t, logsnr, output)
    assert torch.allclose(x0_hat, corrupted.targets["x0"], atol=1e-5)
    assert fraction is not None
    assert torch.allclose(fraction, (variance + 1) / 2)


def test_eps_at_zero_snr_is_refused():
    schedule = ScheduleConfig(name="discrete_linear", zero_terminal_snr=True)
    with pytest.raises(InputError, match="says nothing at zero SNR"):
        Denoiser(Recorder(), DiffusionConfig(prediction="eps", schedule=schedule))
    denoiser = Denoiser(Recorder(), DiffusionConfig(prediction="v", schedule=schedule))
    x, v = torch.randn(2, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    logsnr = denoiser.schedule.logsnr(torch.ones(2))
    assert torch.allclose(denoiser(x, logsnr, v), -v)  # pure noise: v is -x_0
