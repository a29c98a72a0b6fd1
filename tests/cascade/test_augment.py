import math

import numpy as np
import pytest
import torch
from PIL import Image

from cascade import augment
from cascade.config import AugmentConfig
from cascade.diffusion.samplers import dpmpp_2m
from cascade.errors import InputError
from cascade.images import downsample


def smooth(batch: int = 2, size: int = 16) -> torch.Tensor:
    """Smooth pictures, B 3 size size."""
    noise = torch.randn(batch, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.interpolate(noise, size, mode="bicubic").clamp(-0.9, 0.9)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_level_is_variance_preserving_and_starts_clean(schedule):
    levels = torch.linspace(0, 1, 101)
    alpha, sigma = augment.level_alpha_sigma(levels, schedule)
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones(101, dtype=torch.float64), atol=1e-12, rtol=0)
    assert alpha[0] == 1 and sigma[0] == 0
    assert bool((alpha.diff() < 0).all()) and bool((sigma.diff() > 0).all())


def test_level_formulae():
    level = torch.tensor([0.25], dtype=torch.float64)
    alpha, _ = augment.level_alpha_sigma(level, "cosine")
    assert alpha.item() == pytest.approx(math.cos(math.pi / 8))
    alpha, sigma = augment.level_alpha_sigma(level, "linear")
    logsnr = 2 * (alpha.log() - sigma.log()).item()
    # Imagen's public reimplementations have 1e-4 + 10 t^2 here
    assert logsnr == pytest.approx(-math.log(math.expm1(1e-4 + 10 * 0.25**2)), abs=3e-4)
    with pytest.raises(InputError, match="did you mean 'cosine'"):
        augment.level_alpha_sigma(level, "cosin")


def test_condition_lowres_at_the_ends():
    x, noise = smooth(), torch.randn(2, 3, 64, 64)
    out = augment.condition_lowres(x, (64, 64), AugmentConfig(), torch.tensor([0.0, 1.0]), noise)
    assert torch.equal(out[0], augment.upsample(x, (64, 64))[0])  # level 0: clean, exactly
    assert torch.equal(out[1], noise[1])  # level 1: pure noise


def test_condition_lowres_is_rowwise():
    x, noise, level = smooth(), torch.randn(2, 3, 32, 48), torch.tensor([0.3, 0.7])
    out = augment.condition_lowres(x, (32, 48), AugmentConfig(), level, noise)
    alone = augment.condition_lowres(x[1:], (32, 48), AugmentConfig(), level[1:], noise[1:])
    assert torch.equal(out[1:], alone)
    up = augment.upsample(x, (32, 48))
    expected = math.cos(math.pi / 2 * 0.3) * up[0] + math.sin(math.pi / 2 * 0.3) * noise[0]
    torch.testing.assert_close(out[0], expected, atol=1e-6, rtol=0)


def test_condition_lowres_clamps_the_overshoot_of_guidance():
    x, noise, level = smooth(), torch.randn(2, 3, 64, 64), torch.zeros(2)
    out = augment.condition_lowres(3 * x, (64, 64), AugmentConfig(), level, noise)
    assert torch.equal(out, augment.upsample((3 * x).clamp(-1, 1), (64, 64)))


def test_noise_before_upsampling():
    x, level = smooth(), torch.full((2,), 0.5)
    noise = torch.randn(2, 3, 16, 16)
    out = augment.condition_lowres(x, (64, 64), AugmentConfig(), level, noise)
    torch.testing.assert_close(
        out, augment.upsample((x + noise) * math.sqrt(0.5), (64, 64)), atol=1e-5, rtol=0
    )
    with pytest.raises(InputError, match=r"expected shape \(2, 3, 64, 64\) or \(2, 3, 16, 16\)"):
        augment.condition_lowres(x, (64, 64), AugmentConfig(), level, torch.randn(2, 3, 32, 32))


@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
def test_upsample(mode):
    line = torch.arange(8.0).expand(1, 3, 8, 8) / 4 - 1
    out = augment.upsample(line, (32, 32), mode)
    # linear ramps stay linear away from the edges, and pixel centres (not corners) are aligned
    expected = (torch.arange(32.0) + 0.5) / 4 - 0.5
    torch.testing.assert_close(out[0, 0, 0, 10:22], expected[10:22] / 4 - 1, atol=1e-5, rtol=0)
    assert (downsample(augment.upsample(smooth(), (64, 64), mode), 16) - smooth()).abs().mean() < 0.03


def test_upsample_is_pillows_bicubic():
    x = smooth(1)[0, 0]
    resized = Image.fromarray(x.numpy()).resize((64, 64), Image.Resampling.BICUBIC)
    expected = torch.from_numpy(np.array(resized))
    torch.testing.assert_close(
        augment.upsample(x.expand(1, 3, 16, 16), (64, 64))[0, 0], expected, atol=1e-5, rtol=0
    )


def test_blur():
    impulse = torch.zeros(3, 3, 5, 5)
    impulse[:, :, 2, 2] = 1
    out = augment.blur(impulse, torch.tensor([0.0, 0.6, 0.4]))
    assert torch.equal(out[0], impulse[0])
    side = math.exp(-0.5 / 0.36)
    centre = 1 / (1 + 2 * side)
    assert out[1, 0, 2, 2].item() == pytest.approx(centre**2, rel=1e-5)
    assert out[1, 0, 1, 2].item() == pytest.approx(side * centre**2, rel=1e-5)
    assert out[1, 0, 1, 1].item() == pytest.approx((side * centre) ** 2, rel=1e-5)
    assert out[1, 0, 0].abs().max() == 0  # 3x3
    assert out[2, 0, 2, 2] > out[1, 0, 2, 2]
    flat = torch.full((1, 3, 1, 2), 0.5)  # edges are repeated, not darkened; any size
    torch.testing.assert_close(augment.blur(flat, torch.tensor([0.6])), flat)


def test_corrupt_training_shares_and_keys():
    seeds = list(range(400))
    x = smooth(1).expand(400, 3, 16, 16)
    cfg = AugmentConfig(blur_prob=0.5, degrade_prob=0.0)
    out = augment.corrupt_training(x, cfg, seeds, "sr256", 7)
    changed = (out != x).flatten(1).any(1)
    assert abs(changed.float().mean() - 0.5) < 0.08  # 3 standard errors
    again = augment.corrupt_training(x[:3], cfg, [5, 399, 0], "sr256", 7)
    assert torch.equal(again, out[[5, 399, 0]])
    other = augment.corrupt_training(x, cfg, seeds, "sr256", 8)
    assert not torch.equal(other, out)
    assert torch.equal(augment.corrupt_training(x, AugmentConfig(), seeds, "sr256"), x)


def test_corrupt_training_degrades_rows_alone():
    x = smooth(4)
    cfg = AugmentConfig(blur_prob=0.5, degrade_prob=0.5)
    out = augment.corrupt_training(x, cfg, [1, 2, 3, 4], "sr1024")
    assert out.shape == x.shape and bool(out.isfinite().all())
    for i in range(4):
        assert torch.equal(augment.corrupt_training(x[i : i + 1], cfg, [i + 1], "sr1024")[0], out[i])


def test_blur_sigma_is_drawn_from_its_range(monkeypatch):
    drawn = []
    monkeypatch.setattr(augment, "blur", lambda x, sigma: (drawn.append(sigma), x)[1])
    cfg = AugmentConfig(blur_prob=1.0, blur_sigma=(0.4, 0.6))
    augment.corrupt_training(torch.zeros(200, 3, 2, 2), cfg, list(range(200)), "x")
    (sigma,) = drawn
    assert 0.4 <= sigma.min() < 0.41 and 0.59 < sigma.max() <= 0.6


def test_degrade_is_keyed_mild_and_keeps_size():
    x = smooth(1, 24)[0, :, :, :20]
    outs = [augment.degrade(x, torch.Generator().manual_seed(seed)) for seed in range(20)]
    assert torch.equal(outs[3], augment.degrade(x, torch.Generator().manual_seed(3)))
    for out in outs:
        assert out.shape == x.shape and out.dtype == x.dtype and out.abs().max() <= 1
        assert 0.005 < (out - x).abs().mean() < 0.25
    assert len({out.sum().item() for out in outs}) == 20
    # what is taken away is detail: the mean colour stays
    mean = torch.stack([out.mean() - x.mean() for out in outs])
    assert mean.abs().max() < 0.03


def test_anisotropic_kernel_turns():
    impulse = torch.zeros(3, 7, 7)
    impulse[:, 3, 3] = 1
    along_x = augment._gaussian(impulse, 0.7, 0.2, 0.0)[0]
    assert along_x[3, 4] > 10 * along_x[4, 3]
    turned = augment._gaussian(impulse, 0.7, 0.2, math.pi / 2)[0]
    torch.testing.assert_close(turned, along_x.T, atol=1e-6, rtol=0)
    assert along_x.sum().item() == pytest.approx(1, abs=1e-5)


def test_truncated_grid():
    logsnrs = torch.tensor([-10.0, -5.0, 0.0, 5.0, math.inf], dtype=torch.float64)
    grid = augment.truncated_grid(logsnrs, 0.25)
    target = 2 * math.log(1 / math.tan(math.pi / 8))
    assert grid[:-1].tolist() == [-10.0, -5.0, 0.0] and grid[-1].item() == pytest.approx(target)
    assert torch.equal(augment.truncated_grid(logsnrs, 0.0), logsnrs)
    assert bool((augment.truncated_grid(logsnrs, 0.9).diff() > 0).all())
    for level in (-0.1, 1.0, 1.5, math.nan):
        with pytest.raises(InputError, match="expected 0 <= level < 1"):
            augment.truncated_grid(logsnrs, level)
    with pytest.raises(InputError, match="noisier than the first step"):
        augment.truncated_grid(logsnrs, 0.9999)


def test_truncated_process_has_the_noise_of_the_level():
    """Stopping the reverse process of N(mu, s^2) at level a gives the mean alpha mu and the variance
    alpha^2 s^2 + sigma^2 of `noise_lowres` at level a."""
    mu, s, level = 0.3, 0.5, 0.4

    def denoise(x, logsnr):  # E[x_0 | x_t] of Gaussian data
        snr, alpha = logsnr.exp()[:, None], torch.sigmoid(logsnr).sqrt()[:, None]
        return mu + snr * s**2 / (1 + snr * s**2) * (x / alpha - mu)

    start = torch.randn(20_000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    start = (start - start.mean()) / start.std()
    logsnrs = torch.cat([torch.linspace(-14, 14, 200), torch.tensor([math.inf])]).double()
    x = dpmpp_2m(denoise, start, augment.truncated_grid(logsnrs, level))
    alpha, sigma = math.cos(math.pi / 2 * level), math.sin(math.pi / 2 * level)
    assert x.mean().item() == pytest.approx(alpha * mu, rel=0.01)
    assert x.var().item() == pytest.approx(alpha**2 * s**2 + sigma**2, rel=0.01)


# -- residual base -------------------------------------------------------------------------------------------


def test_residual_base_is_the_input_at_level_0_nothing_at_level_1_and_the_best_linear_guess_between() -> None:
    cfg = AugmentConfig(residual=True)
    generator = torch.Generator().manual_seed(0)
    clean = augment.PICTURE_VARIANCE**0.5 * torch.randn(3, 3, 64, 64, generator=generator)
    noise = torch.randn(3, 3, 64, 64, generator=generator)
    level = torch.tensor([0.0, 0.4, 1.0])
    corrupted = augment.noise_lowres(clean, level, noise)
    base = augment.residual_base(corrupted, level, cfg)
    assert torch.equal(base[0], clean[0])
    assert base[2].abs().max() < 1e-6
    error = (base[1] - clean[1]).square().mean()
    for other in (0.9, 1.1):  # any other gain is worse on Gaussian data of that variance
        assert (other * base[1] - clean[1]).square().mean() > error
    variance = augment.residual_variance(level, cfg)
    assert variance.tolist() == pytest.approx([0.0, error.item(), augment.PICTURE_VARIANCE], rel=0.02)


def test_levels_of_a_discrete_grid_are_diffusers_steps():
    """Aug level a is step floor(1000 a) of 1000, for the noise and for what the network is told."""
    diffusers = pytest.importorskip("diffusers")
    steps = torch.tensor([0, 1, 29, 250, 333, 999])
    levels = torch.tensor([0.0004, 0.001, 0.029, 0.25, 0.3339, 1.0])
    picture, noise = smooth(6), torch.randn(6, 3, 16, 16)
    for schedule, theirs in (("discrete_cosine", "squaredcos_cap_v2"), ("discrete_linear", "linear")):
        beta = dict(beta_start=1e-4, beta_end=0.02)
        expected = diffusers.DDPMScheduler(beta_schedule=theirs, **beta).add_noise(picture, noise, steps)
        got = augment.noise_lowres(picture, levels, noise, schedule)
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(1000 * augment.told_level(levels, schedule), steps.float())
    assert torch.equal(augment.told_level(levels, "cosine"), levels)


def test_enlarging_by_aligned_corners_and_rounding_to_8_bits():
    picture = smooth()
    aligned = augment.upsample(picture, (31, 31), "bilinear_aligned")
    torch.testing.assert_close(aligned[..., ::2, ::2], picture)  # 16 px to 31: every other is one of the 16
    level, noise = torch.zeros(2), torch.zeros(2, 3, 32, 32)
    rounded = augment.condition_lowres(
        picture, (32, 32), AugmentConfig(upsample="bilinear", eight_bit=True), level, noise
    )
    eight_bit = ((picture + 1) * 127.5).round() / 127.5 - 1
    assert not torch.equal(eight_bit, picture)
    torch.testing.assert_close(rounded, augment.upsample(eight_bit, (32, 32), "bilinear"))
