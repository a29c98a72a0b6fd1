"""The fine network: what it sees, where it is asked, and that it learns to make flat areas flat."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from cascade.config import DiffusionConfig
from cascade.diffusion import Denoiser, corrupt
from cascade.nn.fine import CLEANEST, DIFFERENCES, ERROR, EXPONENT, NOISIEST, Fine, local_mean, windows
from cascade.nn.unet import UNet
from tests.cascade.nn.helpers import conditions, config, network

SIDE = 16
LOW, HIGH = -2 * math.log(NOISIEST), -2 * math.log(CLEANEST)  # log-SNRs


@pytest.fixture
def net() -> UNet:
    return network(patch=4, fine_channels=(8, 12))


def pictures(batch: int, seed: int = 0) -> Tensor:
    """Of four flat quarters each, B 3 16 16."""
    colours = torch.rand(batch, 3, 2, 2, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return colours.repeat_interleave(SIDE // 2, 2).repeat_interleave(SIDE // 2, 3)


def noise_like(x: Tensor, seed: int = 1) -> Tensor:
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))


def test_what_it_sees_of_a_flat_picture_is_the_noise_alone_in_its_own_units() -> None:
    """Of one colour, which the base has right, at every level: the colour, eps, eps beyond its local means by
    half, and nothing of x_0_hat."""
    x0 = torch.tensor([0.5, -0.2, 0.9])[None, :, None, None].expand(3, 3, SIDE, SIDE)
    eps = 0.5 * noise_like(x0)
    level = torch.tensor([NOISIEST, 0.2, CLEANEST])[:, None, None, None]
    seen, error = Fine.seen(x0 + level * eps, level, x0)
    told, noise, near, far, *own = seen.split(3, dim=1)
    assert torch.equal(told, x0)
    assert torch.allclose(noise, eps, atol=1e-4)
    for part, side in ((near, 3), (far, 7)):
        assert torch.allclose(part, (eps - local_mean(eps, side)) / 2, atol=1e-4)
    assert all(part.abs().max() < 1e-4 for part in own)
    assert torch.allclose(error, ERROR * level**EXPONENT)


def test_the_local_mean_takes_no_pixel_from_outside() -> None:
    x = torch.arange(16.0).view(1, 1, 4, 4)
    found = local_mean(x, 3)
    assert found[0, 0, 0, 0] == x[0, 0, :2, :2].mean()
    assert found[0, 0, 2, 1] == x[0, 0, 1:4, 0:3].mean()
    assert torch.allclose(local_mean(torch.full_like(x, 0.3), 7), torch.tensor(0.3))


def test_windows_are_the_parts_at_their_corners() -> None:
    x = torch.randn(3, 5, 8, 12, generator=torch.Generator().manual_seed(0))
    found = windows(x, torch.tensor([[0.0, 0.0], [0.999, 0.999], [0.5, 0.2]]))
    assert torch.equal(found[0], x[0, :, :4, :6])
    assert torch.equal(found[1], x[1, :, 4:, 6:])
    assert torch.equal(found[2], x[2, :, 2:6, 1:7])


def test_the_denoiser_asks_it_at_the_lowest_noise_alone(net: UNet) -> None:
    """With an answer of 1 the estimate is that of the network without it, cut to [-1, 1], plus the expected
    error; at noisier levels it is untouched. One cleaner than it knows is taken for the cleanest."""
    assert net.fine is not None
    fine, net.fine = net.fine, None
    denoiser, cond = Denoiser(net, DiffusionConfig()), conditions(4)
    logsnr = torch.tensor([-3.0, LOW - 0.01, LOW, HIGH + 5])
    x_t = corrupt(pictures(4), noise_like(pictures(4)), logsnr).x_t
    with torch.no_grad():
        plain = denoiser(x_t, logsnr, cond)
        out = fine.net.get_submodule("conv_out")
        for parameter in out.parameters():
            parameter.zero_()
        out.get_parameter("bias").fill_(1.0)
        net.fine = fine
        found = denoiser(x_t, logsnr, cond)
    assert torch.equal(found[:2], plain[:2])
    error = ERROR * torch.tensor([NOISIEST, CLEANEST]) ** EXPONENT
    assert torch.allclose(found[2:], plain[2:].clamp(-1, 1) + error[:, None, None, None], atol=1e-6)


def test_it_starts_by_leaving_the_estimate_as_it_is() -> None:
    torch.manual_seed(0)
    net = UNet(config(patch=4, fine_channels=(8, 12)))
    assert net.fine is not None
    x = pictures(2)
    noise, time = torch.tensor([0.1, 0.05])[:, None, None, None], torch.tensor([300.0, 400.0])
    found = net.fine(x, noise, time, x + 0.3)
    assert torch.equal(found, (x + 0.3).clamp(-1, 1))


def test_a_picture_is_refined_alike_alone_and_in_a_batch(net: UNet) -> None:
    assert net.fine is not None
    denoiser, logsnr = Denoiser(net, DiffusionConfig()), torch.tensor([2.0, 4.0, 6.0])
    told = (*denoiser.fine_input(pictures(3), logsnr, CLEANEST), pictures(3, seed=2))
    together = net.fine(*told)
    alone = torch.cat([net.fine(*(x[i : i + 1] for x in told)) for i in range(3)])
    assert torch.allclose(together, alone, atol=1e-5)


def test_the_loss_is_of_values_and_of_differences_in_the_window() -> None:
    """An estimate off by one and a half times the expected error everywhere, and one off by a stripe, which
    has an edge in one window alone."""
    torch.manual_seed(0)
    untouched = UNet(config(patch=4, fine_channels=(8, 12))).fine  # its answer is 0
    assert untouched is not None
    noise, time = torch.full((2, 1, 1, 1), 0.2), torch.full((2,), 300.0)
    error, x0 = ERROR * 0.2**EXPONENT, torch.zeros(2, 3, SIDE, SIDE)
    corner = torch.tensor([[0.0, 0.0], [0.0, 0.999]])
    found = untouched.loss(x0, noise, time, x0 + 1.5 * error, x0, corner)
    assert torch.allclose(found, torch.full((2,), 1.5), atol=1e-5)
    stripe = x0.clone()
    stripe[..., SIDE - 3 :] = error
    found = untouched.loss(x0, noise, time, stripe, x0, corner)
    half = SIDE // 2
    assert torch.allclose(found, torch.tensor([0.0, 3 / half + DIFFERENCES / (half - 1)]), atol=1e-5)


def test_it_learns_to_take_unevenness_away() -> None:
    """Of estimates whose patches are uneven, all in the same way, it takes most of the error."""
    torch.manual_seed(0)
    net = UNet(config(patch=4, fine_channels=(8, 12)))
    assert net.fine is not None
    denoiser, fine = Denoiser(net, DiffusionConfig()), net.fine
    uneven = 0.03 * noise_like(torch.zeros(1, 3, 4, 4)).repeat(1, 1, 4, 4)
    optimizer = torch.optim.Adam(fine.parameters(), lr=1e-2)
    logsnr = torch.linspace(LOW, HIGH, 8)

    def case(seed: int) -> tuple[Tensor, Tensor, Tensor]:
        x0 = 0.8 * pictures(8, seed)
        return corrupt(x0, noise_like(x0, seed), logsnr).x_t, x0 + uneven, x0

    for step in range(150):
        x_t, hat, x0 = case(step)
        corner = torch.rand(8, 2, generator=torch.Generator().manual_seed(step))
        loss = fine.loss(*denoiser.fine_input(x_t, logsnr, CLEANEST), hat, x0, corner).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    x_t, hat, x0 = case(1000)
    with torch.no_grad():
        left = (fine(*denoiser.fine_input(x_t, logsnr, CLEANEST), hat) - x0).abs().mean()
    assert left < 0.5 * uneven.abs().mean()
