"""Every prediction says the same as every other, to 1e-10 in float64."""

import itertools

import pytest
import torch

from cascade.diffusion import PREDICTIONS, corrupt, to_edm, to_eps, to_v, to_x0
from cascade.errors import InputError

CONVERT = {"x0": to_x0, "eps": to_eps, "v": to_v, "edm": to_edm}
PAIRS = list(itertools.product(PREDICTIONS, repeat=2))
LOGSNRS = torch.linspace(-15, 15, 31, dtype=torch.float64)


def sample(sigma_data: float = 0.5, dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(0)
    x0 = torch.rand(31, 3, 4, 4, generator=generator, dtype=torch.float64) * 2 - 1
    eps = torch.randn(31, 3, 4, 4, generator=generator, dtype=torch.float64)
    return corrupt(x0.to(dtype), eps.to(dtype), LOGSNRS, sigma_data)


@pytest.mark.parametrize("sigma_data", [0.5, 1.0])
@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_conversion_finds_the_target_of_every_other(source, target, sigma_data):
    """Errors of the inputs' rounding are magnified by 1 / alpha or 1 / sigma, 1800 at a log-SNR of 15."""
    corrupted = sample(sigma_data)
    converted = CONVERT[target](source, corrupted.targets[source], corrupted.x_t, LOGSNRS, sigma_data)
    assert (converted - corrupted.targets[target]).abs().max() < 1e-10


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_round_trip_of_an_arbitrary_output(first, second):
    """Not only the true targets: any output survives the way to another prediction and back."""
    corrupted = sample()
    output = torch.randn(corrupted.x_t.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    there = CONVERT[second](first, output, corrupted.x_t, LOGSNRS, 0.5)
    back = CONVERT[first](second, there, corrupted.x_t, LOGSNRS, 0.5)
    assert (back - output).abs().max() < 1e-10


def test_edm_target_is_the_preconditioning_of_the_paper():
    """Karras et al. 2022, table 1, in their own variables x = x_t / alpha and sigma = exp(-logsnr / 2)."""
    corrupted, sigma_data = sample(), 0.5
    sigma = (-LOGSNRS / 2).exp().reshape(-1, 1, 1, 1)
    x = corrupted.x_t / LOGSNRS.sigmoid().sqrt().reshape(-1, 1, 1, 1)
    c_skip = sigma_data**2 / (sigma**2 + sigma_data**2)
    c_out = sigma * sigma_data / (sigma**2 + sigma_data**2).sqrt()
    expected = (corrupted.targets["x0"] - c_skip * x) / c_out
    assert (corrupted.targets["edm"] - expected).abs().max() < 1e-10


def test_edm_with_unit_data_is_minus_v():
    corrupted = sample(sigma_data=1.0)
    assert torch.allclose(corrupted.targets["edm"], -corrupted.targets["v"], atol=1e-14)


def test_corrupt_is_variance_preserving_and_lists_its_targets():
    corrupted = sample()
    alpha, sigma = LOGSNRS.sigmoid().sqrt(), (-LOGSNRS).sigmoid().sqrt()
    expected = (
        alpha.reshape(-1, 1, 1, 1) * corrupted.targets["x0"]
        + sigma.reshape(-1, 1, 1, 1) * corrupted.targets["eps"]
    )
    assert torch.equal(corrupted.x_t, expected)
    assert set(corrupted.targets) == set(PREDICTIONS)
    without = corrupt(corrupted.targets["x0"], corrupted.targets["eps"], LOGSNRS)
    assert set(without.targets) == {"x0", "eps", "v"}


def test_one_logsnr_serves_a_batch_of_vectors():
    x0, eps = torch.randn(4, 7), torch.randn(4, 7)
    one = corrupt(x0, eps, torch.tensor(0.3))
    many = corrupt(x0, eps, torch.full((4,), 0.3))
    assert torch.equal(one.x_t, many.x_t)
    assert one.x_t.dtype == torch.float32


@pytest.mark.parametrize("source", ["v", "edm", "x0"])
def test_float32_is_enough_for_x0(source):
    corrupted = sample(dtype=torch.float32)
    x0 = to_x0(source, corrupted.targets[source], corrupted.x_t, LOGSNRS, 0.5)
    assert x0.dtype == torch.float32
    assert (x0 - corrupted.targets["x0"]).abs().max() < 1e-6


def test_unknown_prediction_is_refused():
    x = torch.zeros(1, 2)
    with pytest.raises(InputError, match="unknown prediction 'epsilon'"):
        to_x0("epsilon", x, x, torch.zeros(1))
    with pytest.raises(InputError, match="unknown prediction 'epsilon'"):
        to_eps("epsilon", x, x, torch.zeros(1))
