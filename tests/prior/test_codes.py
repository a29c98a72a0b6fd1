"""Statistics of embeddings and their codes: round trips, error bounds, and what cannot be fitted."""

import pytest
import torch
from torch import Tensor

from cascade.errors import InputError
from prior.codes import PCAQuantizer, components_for, principal_components
from prior.statistics import Standardizer

DIM = 6
SCALES = torch.tensor([3.0, 2.0, 1.0, 0.5, 0.1, 0.05])


@pytest.fixture
def embeds() -> Tensor:
    """500 points of a Gaussian with known axes and scales, off the origin."""
    generator = torch.Generator().manual_seed(0)
    axes = torch.linalg.qr(torch.randn(DIM, DIM, generator=generator)).Q
    return torch.randn(500, DIM, generator=generator) * SCALES @ axes.T + 2.0


def test_standardizer_gives_zero_mean_unit_variance_and_inverts(embeds):
    statistics = Standardizer(DIM)
    statistics.fit(embeds)
    standard = statistics(embeds)
    torch.testing.assert_close(standard.mean(0), torch.zeros(DIM), atol=1e-5, rtol=0)
    torch.testing.assert_close(standard.std(0, correction=0), torch.ones(DIM))
    torch.testing.assert_close(statistics.inverse(standard), embeds)


def test_standardizer_keeps_a_constant_dimension(embeds):
    embeds[:, 2] = 0.7
    statistics = Standardizer(DIM)
    statistics.fit(embeds)
    assert torch.isfinite(statistics(embeds)).all()
    torch.testing.assert_close(statistics.inverse(torch.zeros(1, DIM))[0, 2], torch.tensor(0.7))


def test_statistics_are_stored_with_the_weights(embeds):
    standardizer, quantizer = Standardizer(DIM), PCAQuantizer(DIM, 4, 32)
    standardizer.fit(embeds)
    quantizer.fit(embeds)
    same_standardizer, same_quantizer = Standardizer(DIM), PCAQuantizer(DIM, 4, 32)
    same_standardizer.load_state_dict(standardizer.state_dict())
    same_quantizer.load_state_dict(quantizer.state_dict())
    assert torch.equal(same_standardizer(embeds), standardizer(embeds))
    codes = quantizer.encode(embeds)
    assert torch.equal(same_quantizer.encode(embeds), codes)
    assert torch.equal(same_quantizer.decode(codes), quantizer.decode(codes))


def test_all_components_lose_half_a_bucket_at_most(embeds):
    quantizer = PCAQuantizer(DIM, DIM, 64)
    quantizer.fit(embeds)
    codes = quantizer.encode(embeds)
    assert codes.dtype == torch.int64 and codes.min() == 0 and codes.max() == 63
    error = (quantizer.decode(codes) - embeds) @ quantizer.basis.T  # along each component
    width = (quantizer.high - quantizer.low) / 64
    assert (error.abs() <= 0.5 * width + 1e-5).all()
    assert (error.abs().amax(0) > 0.4 * width).all()  # and no finer than that: the buckets are of this width
    assert torch.equal(quantizer.encode(quantizer.decode(codes)), codes)


def test_fewer_codes_keep_the_largest_components(embeds):
    quantizer = PCAQuantizer(DIM, 3, 1024)
    quantizer.fit(embeds)
    scales = ((embeds - embeds.mean(0)) @ quantizer.basis.T).std(0)
    torch.testing.assert_close(scales, SCALES[:3], rtol=0.1, atol=0)
    lost = (quantizer.decode(quantizer.encode(embeds)) - embeds).square().sum(1).mean()
    torch.testing.assert_close(lost, SCALES[3:].square().sum(), rtol=0.1, atol=1e-3)
    codes = quantizer.encode(embeds)
    coarse = (quantizer.decode(codes[:, :1]) - embeds).square().sum(1).mean()
    torch.testing.assert_close(coarse, SCALES[1:].square().sum(), rtol=0.1, atol=1e-3)


def test_values_out_of_range_go_to_the_nearest_bucket(embeds):
    quantizer = PCAQuantizer(DIM, 2, 16)
    quantizer.fit(embeds)
    far = embeds.mean(0) + torch.stack([100 * quantizer.basis[0], -100 * quantizer.basis[0]])
    assert quantizer.encode(far)[:, 0].tolist() == [15, 0]


def test_components_for_a_share_of_variance(embeds):
    _, _, variances = principal_components(embeds)
    torch.testing.assert_close(variances.sqrt().float(), SCALES, rtol=0.1, atol=0)
    shares = SCALES.square().cumsum(0) / SCALES.square().sum()  # .63 .91 .982 .9991 .9998 1
    assert [components_for(embeds, share) for share in (0.3, 0.9, 0.95, 0.99, 1.0)] == [1, 2, 3, 4, DIM]
    assert shares[2] < 0.99 < shares[3]


def test_what_cannot_be_fitted_gets_one_line(embeds):
    for make in (lambda: Standardizer(DIM), lambda: PCAQuantizer(DIM, 3, 16)):
        for bad, words in [
            (embeds[:1], "at least"),
            (embeds[:, :4], "width 6"),
            (embeds * torch.nan, "finite"),
        ]:
            with pytest.raises(InputError, match=words):
                make().fit(bad)
    with pytest.raises(InputError, match="share of variance"):
        components_for(embeds, 1.5)
