"""Guidance and thresholding, as formulas and as the sampler meets them."""

import math
from typing import Any

import pytest
import torch

from cascade.config import SamplingConfig, ScheduleConfig
from cascade.diffusion import (
    GuidedDenoiser,
    apg,
    cfg,
    dynamic_threshold,
    make_schedule,
    rescale,
    static_threshold,
)
from cascade.errors import InputError

SCHEDULE = make_schedule(ScheduleConfig())


class Fake:
    """Stands for a Denoiser: the estimate is its condition; remembers the batch sizes it was run at."""

    def __init__(self, fraction: torch.Tensor | None = None) -> None:
        self.sizes: list[int] = []
        self.fraction = fraction

    def with_variance(self, x_t, logsnr, cond):
        self.sizes.append(len(x_t))
        assert logsnr.shape == (len(x_t),) and len(cond) == len(x_t)
        return cond, self.fraction


def halves(batch: int = 2):
    cond, uncond = 0.4 * torch.randn(2, batch, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return cond, uncond


def build(denoiser: Any, cond: torch.Tensor, uncond: torch.Tensor, **settings) -> GuidedDenoiser:
    settings = SamplingConfig(**{"threshold": "none", **settings})
    return GuidedDenoiser(denoiser, cond, torch.cat([cond, uncond]), settings, SCHEDULE)


def guided(denoiser: Fake, **settings) -> GuidedDenoiser:
    return build(denoiser, *halves(), **settings)


def logsnr_at(t: float) -> torch.Tensor:
    return SCHEDULE.logsnr(torch.full((2,), t, dtype=torch.float64))


X = torch.zeros(2, 3, 8, 8)


def estimate(denoiser: GuidedDenoiser, t: float = 0.5) -> torch.Tensor:
    result = denoiser(X, logsnr_at(t))
    assert isinstance(result, torch.Tensor)
    return result


def test_cfg_is_the_line_through_both():
    cond, uncond = halves()
    assert torch.equal(cfg(cond, uncond, 1.0), cond)
    assert torch.equal(cfg(cond, uncond, 0.0), uncond)
    assert torch.allclose(cfg(cond, uncond, 3.0), 3 * cond - 2 * uncond, atol=1e-6)


def test_guidance_is_one_batched_forward():
    denoiser = Fake()
    cond, uncond = halves()
    result = estimate(guided(denoiser, guidance=3.0))
    assert denoiser.sizes == [4]
    assert torch.allclose(result, cfg(cond, uncond, 3.0))


def test_guidance_one_runs_the_condition_alone_and_changes_nothing():
    denoiser = Fake()
    assert torch.equal(estimate(guided(denoiser, guidance=1.0)), halves()[0])
    assert denoiser.sizes == [2]


@pytest.mark.parametrize(
    ("t", "size"), [(1.0, 2), (0.8, 4), (0.81, 2), (0.5, 4), (0.2, 4), (0.19, 2), (0.01, 2)]
)
def test_interval_limits_guidance_to_its_times(t, size):
    denoiser = Fake()
    guided(denoiser, guidance=3.0, guidance_interval=(0.2, 0.8))(X, logsnr_at(t))
    assert denoiser.sizes == [size]


def test_a_number_serves_as_logsnr():
    number = guided(Fake(), guidance=2.0)(X, 0.5)
    assert isinstance(number, torch.Tensor)
    assert torch.equal(number, estimate(guided(Fake(), guidance=2.0)))


def test_variance_comes_from_the_conditional_half():
    fraction = torch.cat([torch.full((2, 3, 8, 8), 0.1), torch.full((2, 3, 8, 8), 0.9)])
    result = guided(Fake(fraction), guidance=3.0)(X, logsnr_at(0.5))
    assert isinstance(result, tuple)
    assert torch.equal(result[1], fraction[:2])


def test_thresholding_follows_guidance():
    cond, uncond = halves()
    result = estimate(guided(Fake(), guidance=8.0, threshold="static"))
    expected = cfg(cond, uncond, 8.0).clamp(-1, 1)
    assert torch.allclose(result, expected)
    assert (expected.abs() == 1).any()
    result = estimate(guided(Fake(), guidance=8.0, threshold="dynamic", threshold_percentile=0.9))
    assert torch.allclose(result, dynamic_threshold(cfg(cond, uncond, 8.0), 0.9))


def test_static_threshold():
    assert static_threshold(torch.tensor([-3.0, 0.5, 1.2])).tolist() == [-1.0, 0.5, 1.0]


@pytest.mark.parametrize("percentile", [0.5, 0.9, 0.995, 1.0])
def test_dynamic_threshold_is_a_percentile_of_each_sample(percentile):
    x = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * torch.tensor(
        [0.1, 2, 5]
    ).reshape(3, 1, 1, 1)
    result = dynamic_threshold(x, percentile)
    for i in range(3):
        bound = torch.quantile(x[i].abs(), percentile).clamp(min=1)
        assert torch.allclose(result[i], x[i].clamp(-bound, bound) / bound)
    assert torch.equal(result[0], x[0])  # within [-1, 1]: untouched
    assert result.abs().max() <= 1


def test_dynamic_threshold_cap():
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 5
    assert torch.equal(dynamic_threshold(x, 0.99, cap=1.0), static_threshold(x))
    assert torch.allclose(dynamic_threshold(x, 0.99, cap=1.5), x.clamp(-1.5, 1.5) / 1.5)


def test_rescale_restores_the_standard_deviation():
    cond, uncond = halves()
    strong = cfg(cond, uncond, 7.0)
    full = rescale(strong, cond, 1.0)
    assert torch.allclose(full.flatten(1).std(1), cond.flatten(1).std(1), rtol=1e-5)
    assert torch.equal(rescale(strong, cond, 0.0), strong)
    assert torch.allclose(rescale(strong, cond, 0.7), 0.7 * full + 0.3 * strong, atol=1e-6)
    result = estimate(guided(Fake(), guidance=7.0, guidance_rescale=0.7))
    assert torch.allclose(result, rescale(strong, cond, 0.7), atol=1e-6)


def test_apg_without_projection_bound_or_momentum_is_cfg():
    cond, uncond = halves()
    result, _ = apg(cond, uncond, 5.0, eta=1.0, norm_bound=math.inf, momentum=0.0)
    assert torch.allclose(result, cfg(cond, uncond, 5.0), atol=1e-5)


def test_apg_direction_is_orthogonal_and_bounded():
    cond, uncond = halves()
    result, _ = apg(cond, uncond, 3.0, eta=0.0, norm_bound=0.5)
    update = (result - cond).flatten(1)
    assert torch.allclose((update * cond.flatten(1)).sum(1), torch.zeros(2), atol=1e-5)
    assert (update.norm(dim=1) <= 2 * 0.5 + 1e-6).all()


def test_apg_keeps_its_average_over_a_run_and_no_longer():
    cond, uncond = halves()
    first, average = apg(cond, uncond, 5.0, momentum=-0.5)
    second, _ = apg(cond, uncond, 5.0, momentum=-0.5, average=average)
    assert not torch.allclose(first, second)
    half, _ = apg(cond, cond - 0.5 * (cond - uncond), 5.0)  # -0.5 times the same direction leaves half of it
    assert torch.allclose(second, half, atol=1e-5)
    near = cond + 0.01 * uncond  # a direction within the norm bound
    run, again = (build(Fake(), cond, near, guidance=5.0, apg=True) for _ in range(2))
    assert torch.allclose(estimate(run, 0.9), apg(cond, near, 5.0)[0], atol=1e-6)
    second, _ = apg(cond, near, 5.0, momentum=-0.5, average=cond - near)
    assert torch.allclose(estimate(run), second, atol=1e-6)
    assert torch.allclose(estimate(again), apg(cond, near, 5.0)[0], atol=1e-6)


def test_apg_agrees_with_diffusers():
    guider = pytest.importorskip("diffusers.guiders.adaptive_projected_guidance")
    cond, uncond = halves()
    buffer = guider.MomentumBuffer(-0.75)
    average = None
    for scale in (1.0, 0.4, -0.3):
        shifted = uncond * scale
        expected = guider.normalized_guidance(
            cond, shifted, 4.0, buffer, 0.3, 2.5, use_original_formulation=True
        )
        result, average = apg(cond, shifted, 5.0, eta=0.3, norm_bound=2.5, momentum=-0.75, average=average)
        assert torch.allclose(result, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"guidance": math.nan}, "guidance is nan"),
        ({"guidance": math.inf}, "guidance is inf"),
        ({"guidance_interval": (0.8, 0.2)}, "guidance_interval"),
        ({"guidance_interval": (math.nan, 1.0)}, "guidance_interval"),
        ({"guidance_rescale": 1.5}, "guidance_rescale"),
        ({"threshold": "dinamic"}, "did you mean 'dynamic'"),
        ({"threshold_percentile": 99.5}, "share in"),
        ({"threshold_cap": 0.5}, "threshold_cap"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        guided(Fake(), **settings)


def test_guidance_without_a_pair_is_refused():
    fake: Any = Fake()
    with pytest.raises(InputError, match="needs the pair"):
        GuidedDenoiser(fake, halves()[0], None, SamplingConfig(guidance=2.0), SCHEDULE)
