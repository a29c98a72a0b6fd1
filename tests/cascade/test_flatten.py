"""Mean shift of a picture's colours: by its definition, and by what it is for."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from cascade.flatten import ENOUGH, FEW, RADIUS, flattened
from tests.conftest import EMBED, ToyEncoder, tiny_stage


def by_definition(drawn: Tensor, bandwidth: float, rounds: int) -> Tensor:
    _, _, height, width = drawn.shape
    x, alike = drawn, torch.empty_like(drawn[:, :1])
    for _ in range(rounds):
        moved = torch.empty_like(x)
        for i in range(height):
            for j in range(width):
                rows = slice(max(0, i - RADIUS), i + RADIUS + 1)
                window = x[:, :, rows, max(0, j - RADIUS) : j + RADIUS + 1]
                distance = (window - x[:, :, i : i + 1, j : j + 1]).square().sum(1, keepdim=True)
                weight = (distance / (-2 * bandwidth**2)).exp()
                alike[:, :, i, j] = weight.sum((2, 3))
                moved[:, :, i, j] = (weight * window).sum((2, 3)) / alike[:, :, i, j]
        x = moved
    share = ((alike - FEW) / (ENOUGH - FEW)).clamp(0, 1)
    return share * x + (1 - share) * drawn


@pytest.mark.parametrize("size", [(7, 9), (1, 6), (2, 2), (1, 1)], ids=str)
def test_it_is_blurring_mean_shift(size: tuple[int, int]) -> None:
    x = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    kept = x.clone()
    for rounds in (1, 4):
        torch.testing.assert_close(
            flattened(x, 0.3, rounds), by_definition(x, 0.3, rounds), atol=1e-12, rtol=0
        )
    assert torch.equal(x, kept)


def test_areas_become_flat_while_edges_and_gradients_stay() -> None:
    clean = torch.full((1, 3, 32, 32), -0.5)
    clean[..., 16:] = 0.5
    noise = 0.03 * torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    left = flattened(clean + noise, 0.1) - clean
    assert left.std() < 0.1 * noise.std()
    assert left[..., 15:17].abs().max() < 0.03  # the two sides have not mixed
    ramp = torch.linspace(-0.6, 0.6, 32).expand(1, 3, 32, 32)
    inside = slice(8, -8)  # at its ends a gradient has neighbours on one side alone
    torch.testing.assert_close(flattened(ramp, 0.1)[..., inside], ramp[..., inside], atol=2e-3, rtol=0)


def test_antialiased_edges_stay_as_drawn() -> None:
    """Between two areas whose unevenness goes."""
    rows, columns = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    inside = (12.5 - torch.hypot(rows - 15.5, columns - 15.5)).clamp(0, 1)  # a disc
    clean = (inside * 1.6 - 0.8).expand(1, 3, 32, 32)
    drawn = clean + 0.02 * torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    mixed = ((inside > 0.25) & (inside < 0.75)).expand_as(clean)
    after = flattened(drawn, 0.1)
    assert mixed.sum() > 60 and torch.equal(after[mixed], drawn[mixed])
    flat = ((inside == 0) | (inside == 1)).expand_as(clean)
    assert (after - clean)[flat].std() < 0.4 * (drawn - clean)[flat].std()


def test_a_picture_is_the_same_bits_alone_and_in_a_batch() -> None:
    x = torch.rand(3, 3, 12, 10, generator=torch.Generator().manual_seed(0)) * 2 - 1
    together = flattened(x, 0.1)
    assert all(torch.equal(flattened(x[i : i + 1], 0.1)[0], together[i]) for i in range(3))
    assert together.abs().max() <= 1 + 1e-6


def test_a_stage_flattens_what_it_has_drawn_but_not_what_is_known() -> None:
    stage = tiny_stage("base", 16, inpaint_channels=4)
    told = dict(image_embed=torch.ones(1, EMBED) / math.sqrt(EMBED), seed=3)
    text = ToyEncoder()(["a red apple"])
    drawn = stage.sample(text, **told)
    changed = stage.sample(text, **told, flatten=0.2)
    assert torch.equal(changed, flattened(drawn, 0.2)) and not torch.equal(changed, drawn)
    assert torch.equal(stage.sample(text, **told, flatten=0.2, flatten_rounds=3), flattened(drawn, 0.2, 3))
    picture = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    mask = (torch.arange(16) < 7).expand(1, 1, 16, 16)
    inpainted = stage.sample(text, **told, inpaint=(picture, mask), flatten=0.2)
    assert torch.equal(inpainted[..., :7], picture[..., :7])
