"""Intervals of distances: over many draws of prompts they hold the value of all prompts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from eval import distances
from eval.distances import OF_FEATURES, frechet
from eval.metrics.frechet import moments
from eval.statistics import make_groups


def draw(count: int, seed: int, shift: float = 0.5) -> Tensor:
    return torch.randn(count, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + shift


def test_frechet_interval_covers() -> None:
    """200 sets of 400 pictures. They estimate the mean over sets: bias is not the interval's affair."""
    real, groups = moments(draw(4000, 999, shift=0.0)), make_groups(400, 20)
    found = [frechet(real, draw(400, seed), groups)["fd"] for seed in range(200)]
    mean = sum(f.value for f in found) / 200
    covered = sum(f.low <= mean <= f.high for f in found if f.low is not None and f.high is not None) / 200
    assert 0.90 <= covered <= 0.99


@pytest.mark.parametrize("kind", OF_FEATURES)
def test_intervals_hold_the_value(kind: str) -> None:
    real, fake, groups = draw(150, 0), draw(120, 1, shift=0.8), make_groups(120, 20)
    for name, found in OF_FEATURES[kind](real, fake, groups, 0).items():
        assert found.low is not None and found.high is not None
        assert found.low < found.value < found.high, name
        assert found == OF_FEATURES[kind](real, fake, groups, 0)[name]


def test_pictures_of_a_prompt_are_left_out_together() -> None:
    """Eight copies of each picture are no more evidence than one: the interval does not shrink as if 8 N."""
    real, fake = moments(draw(1000, 0)), draw(40, 1)
    once = frechet(real, fake, make_groups(40, 20))["fd"]
    copies = frechet(real, fake.repeat_interleave(8, 0), make_groups(40, 20).repeat_interleave(8))["fd"]
    assert once.high is not None and copies.high is not None
    assert copies.high - copies.value == pytest.approx(once.high - once.value, rel=0.15)


def test_one_prompt_has_no_interval() -> None:
    found = frechet(moments(draw(50, 0)), draw(8, 1), torch.zeros(8, dtype=torch.long))["fd"]
    assert found.low is None and found.high is None


def test_neighbours_need_enough_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    assert OF_FEATURES["prdc"](draw(50, 0), draw(6, 1), torch.arange(6), 0) == {}
    monkeypatch.setattr(distances, "MOST", 40)
    some = OF_FEATURES["prdc"](draw(200, 0), draw(90, 1), make_groups(90, 5), 0)
    assert some == OF_FEATURES["prdc"](draw(200, 0), draw(90, 1), make_groups(90, 5), 0)
    assert some != OF_FEATURES["prdc"](draw(200, 0), draw(90, 1), make_groups(90, 5), 1)
