"""Weights mean the same in every prediction, and the hybrid loss is the bound it claims to be."""

import math

import pytest
import torch
from torch import nn

from cascade.config import DiffusionConfig, ScheduleConfig
from cascade.diffusion import PREDICTIONS, Denoiser, corrupt, diffusion_loss, loss_weight, make_schedule
from cascade.diffusion.loss import variational_bound
from cascade.diffusion.prediction import to_edm, to_eps, to_v
from cascade.diffusion.schedule import DiscreteSchedule
from cascade.errors import InputError

LOGSNRS = torch.linspace(-12, 12, 25, dtype=torch.float64)
WEIGHTINGS = [("min_snr", 5.0), ("clamped_snr", 5.0), ("soft_min_snr", 4.0), ("sigmoid", -1.0)]


class Affine(nn.Module):
    """A network small enough to reason about: scale * x, with `multiple` times the channels."""

    def __init__(self, multiple: int = 1) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.linspace(0.3, 0.9, multiple))

    def forward(self, x, time, cond):
        return torch.cat([scale * x for scale in self.scale], dim=1)


def batch(size: int = 25):
    generator = torch.Generator().manual_seed(0)
    x0 = torch.rand(size, 3, 4, 4, generator=generator) * 2 - 1
    return x0, torch.randn(size, 3, 4, 4, generator=generator)


@pytest.mark.parametrize(("weighting", "param"), WEIGHTINGS)
def test_weighted_error_does_not_depend_on_the_prediction(weighting, param):
    x0, eps = (part.double() for part in batch())
    corrupted = corrupt(x0, eps, LOGSNRS, sigma_data=0.5)
    x0_hat = x0 + 0.1 * torch.randn(x0.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    outputs = {"x0": x0_hat}
    for name, convert in (("eps", to_eps), ("v", to_v), ("edm", to_edm)):
        outputs[name] = convert("x0", x0_hat, corrupted.x_t, LOGSNRS, 0.5)
    losses = []
    for prediction in PREDICTIONS:
        config = DiffusionConfig(prediction=prediction, weighting=weighting, weighting_param=param)
        error = (outputs[prediction] - corrupted.targets[prediction]).square().flatten(1).mean(1)
        losses.append(loss_weight(LOGSNRS, config) * error)
    for loss in losses[1:]:
        assert torch.allclose(loss, losses[0], rtol=1e-5)


def test_min_snr_formulas_of_the_paper():
    snr, gamma = LOGSNRS.exp(), 5.0
    clipped = snr.clamp(max=gamma)
    expected = {"x0": clipped, "eps": clipped / snr, "v": clipped / (snr + 1)}
    for prediction in PREDICTIONS[:3]:
        config = DiffusionConfig(prediction=prediction, weighting="min_snr", weighting_param=gamma)
        assert torch.allclose(loss_weight(LOGSNRS, config).double(), expected[prediction], rtol=1e-5)


def test_soft_min_snr_is_the_edm_form():
    """(sigma sigma_data)^2 / (sigma^2 + sigma_data^2)^2 on the raw network output (k-diffusion)."""
    config = DiffusionConfig(prediction="edm", weighting="soft_min_snr", weighting_param=4.0, sigma_data=0.5)
    sigma = (-LOGSNRS / 2).exp()
    expected = (sigma * 0.5) ** 2 / (sigma**2 + 0.25) ** 2
    assert torch.allclose(loss_weight(LOGSNRS, config).double(), expected, rtol=1e-5)


def test_sigmoid_weight_on_eps():
    config = DiffusionConfig(prediction="eps", weighting="sigmoid", weighting_param=2.0)
    slope = make_schedule(config.schedule).slope(LOGSNRS)
    assert torch.allclose(loss_weight(LOGSNRS, config).double(), slope * (2.0 - LOGSNRS).sigmoid(), rtol=1e-5)


@pytest.mark.parametrize("name", ["cosine", "sigmoid", "linear"])
def test_sigmoid_loss_does_not_depend_on_the_schedule(name):
    """E over t of weight(logsnr) f(logsnr) is the integral of sigmoid(b - logsnr) f over the log-SNRs."""
    schedule = ScheduleConfig(name=name, logsnr_min=-9.0, logsnr_max=9.0)
    config = DiffusionConfig(prediction="eps", weighting="sigmoid", weighting_param=-1.0, schedule=schedule)
    t = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    logsnr = make_schedule(schedule).logsnr(t)
    expectation = (loss_weight(logsnr, config).double() * torch.cos(logsnr / 5)).mean()
    grid = torch.linspace(-9, 9, 100_001, dtype=torch.float64)
    integral = torch.trapezoid((-1 - grid).sigmoid() * torch.cos(grid / 5), grid)
    assert float(expectation) == pytest.approx(float(integral), rel=1e-4)


def test_no_weighting_is_one_in_the_predicted_space():
    config = DiffusionConfig(prediction="eps", weighting="none")
    assert torch.equal(loss_weight(LOGSNRS, config), torch.ones(25))


def test_unknown_weighting_is_refused():
    with pytest.raises(InputError, match="did you mean 'min_snr'"):
        loss_weight(LOGSNRS, DiffusionConfig(weighting="minsnr"))  # type: ignore[arg-type]


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_loss_is_the_weighted_mean_error_of_each_sample(prediction):
    config = DiffusionConfig(prediction=prediction, sigma_data=0.5)
    denoiser, (x0, eps) = Denoiser(Affine(), config), batch()
    loss = diffusion_loss(denoiser, x0, None, LOGSNRS, eps)
    corrupted = corrupt(x0, eps, LOGSNRS, 0.5)
    output, _ = denoiser.raw(corrupted.x_t, LOGSNRS)
    expected = torch.stack(
        [(output[i] - corrupted.targets[prediction][i]).square().mean() for i in range(25)]
    )
    assert loss.shape == (25,) and loss.dtype == torch.float32
    assert torch.allclose(loss, loss_weight(LOGSNRS, config) * expected, rtol=1e-5)
    alone = diffusion_loss(denoiser, x0[3:4], None, LOGSNRS[3:4], eps[3:4])
    assert torch.allclose(alone, loss[3:4], rtol=1e-5)


def test_perfect_network_has_no_loss():
    class Oracle(nn.Module):
        def forward(self, x, time, cond):
            return cond

    config = DiffusionConfig(prediction="v")
    x0, eps = batch()
    target = corrupt(x0, eps, LOGSNRS).targets["v"]
    assert diffusion_loss(Denoiser(Oracle(), config), x0, target, LOGSNRS, eps).max() == 0


@pytest.mark.parametrize("name", ["cosine", "discrete_linear"])
def test_bound_teaches_only_the_variance(name):
    schedule = ScheduleConfig(name=name)
    x0, eps = batch()
    logsnr = make_schedule(schedule).logsnr(torch.linspace(0, 1, 25))
    gradients = []
    for learned in (False, True):
        net = Affine(2 if learned else 1)
        config = DiffusionConfig(schedule=schedule, learned_variance=learned)
        diffusion_loss(Denoiser(net, config), x0, None, logsnr, eps).sum().backward()
        assert net.scale.grad is not None and net.scale.grad.isfinite().all()
        gradients.append(net.scale.grad)
    assert torch.allclose(gradients[0][0], gradients[1][0], rtol=1e-5)
    assert gradients[1][1] != 0


def test_bound_is_the_kl_divergence_of_ddpm():
    """Against torch.distributions and the discrete formulas of Ho et al. 2020, equation 7."""
    schedule = make_schedule(ScheduleConfig(name="discrete_linear"))
    assert isinstance(schedule, DiscreteSchedule)
    x0, eps = (part.double() for part in batch(4))
    index = torch.tensor([1, 10, 500, 999])
    logsnr = schedule.logsnrs[index]
    x_t = corrupt(x0, eps, logsnr).x_t
    x0_hat = x0 + 0.05
    fraction = torch.full_like(x0, 0.3)
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    alpha_bar = (1 - betas).cumprod(0)
    for i, t in enumerate(index.tolist()):
        beta, bar, before = betas[t], alpha_bar[t], alpha_bar[t - 1]
        small = beta * (1 - before) / (1 - bar)

        def mean(x, beta=beta, bar=bar, before=before, i=i):
            return (before.sqrt() * beta * x + (1 - beta).sqrt() * (1 - before) * x_t[i]) / (1 - bar)

        std = (0.3 * beta.log() + 0.7 * small.log()).mul(0.5).exp()
        true = torch.distributions.Normal(mean(x0[i]), small.sqrt())
        model = torch.distributions.Normal(mean(x0_hat[i]), std)
        expected = torch.distributions.kl_divergence(true, model).mean() / math.log(2)
        bound = variational_bound(schedule, x0, x0_hat, logsnr, fraction)[i]
        assert float(bound) == pytest.approx(float(expected), rel=1e-6)


def test_first_step_is_the_likelihood_of_pixels():
    """exp(-loss) of all 256 values a pixel can take sums to 1."""
    schedule = make_schedule(ScheduleConfig(name="discrete_linear"))
    pixels = (torch.arange(256, dtype=torch.float64) / 127.5 - 1).reshape(256, 1)
    logsnr = schedule.logsnr(torch.zeros(256))
    guess = torch.full_like(pixels, 0.2)
    bits = variational_bound(schedule, pixels, guess, logsnr, torch.full_like(pixels, 0.5))
    assert float((-bits * math.log(2)).exp().sum()) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("learned", [False, True])
def test_loss_compiles_into_one_graph(learned):
    """A graph break or a host synchronisation (`.item()`) would raise under fullgraph."""
    config = DiffusionConfig(
        weighting="sigmoid", learned_variance=learned, schedule=ScheduleConfig(name="discrete_linear")
    )
    denoiser, (x0, eps) = Denoiser(Affine(1 + learned), config), batch(4)
    logsnr = denoiser.schedule.logsnr(torch.tensor([0.0, 0.3, 0.6, 0.99]))
    torch.compiler.reset()
    compiled = torch.compile(diffusion_loss, fullgraph=True, backend="aot_eager")
    eager = diffusion_loss(denoiser, x0, None, logsnr, eps)
    assert torch.allclose(compiled(denoiser, x0, None, logsnr, eps), eager, rtol=1e-5)
