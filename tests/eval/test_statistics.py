"""Intervals cover what they should, and tests reject as often as they should."""

from __future__ import annotations

import itertools

import pytest
import torch
from scipy import stats
from scipy.special import expit
from torch import Tensor

from eval.statistics import (
    EXACT,
    bootstrap_mean,
    bootstrap_means,
    effect_size,
    holm,
    jackknife_half_width,
    make_groups,
    percentiles,
    permutation_test,
    smallest_p,
    verdict,
)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# -- intervals -----------------------------------------------------------------------------------------------


def normal(count: int, trials: int) -> tuple[Tensor, float]:
    return 3 + 2 * draw(count, trials), 3.0


def skewed(count: int, trials: int) -> tuple[Tensor, float]:
    """Scores in (0, 1) that crowd at the upper end, as those of good models do."""
    return (1 - draw(count, trials)).sigmoid(), stats.norm.expect(lambda x: expit(1 - x))


@pytest.mark.parametrize(("scores", "count"), [(normal, 10), (normal, 20), (skewed, 20), (skewed, 100)])
def test_95_percent_intervals_cover_95_percent(scores, count: int) -> None:
    """2,000 repetitions. All see the same draws of prompts, which only spares time: the data differ."""
    values, mean = scores(count, 2000)
    low, high = percentiles(bootstrap_means(values, resamples=5000), count)
    covered = ((low <= mean) & (mean <= high)).double().mean().item()
    assert 0.93 <= covered <= 0.97


def test_plain_percentiles_would_not_do() -> None:
    """Why the percentiles are moved out: 7 prompts, which Rare Words has."""
    values, mean = normal(7, 2000)
    ends = torch.tensor([0.025, 0.975], dtype=torch.float64)
    low, high = bootstrap_means(values, resamples=2000).quantile(ends, dim=0)
    assert ((low <= mean) & (mean <= high)).double().mean() < 0.92


def test_bootstrap_means_are_means_of_drawn_rows() -> None:
    values = torch.tensor([[1.0, 10.0], [2.0, 20.0]])
    means = bootstrap_means(values, resamples=400)
    assert set(means[:, 0].tolist()) == {1.0, 1.5, 2.0}
    assert torch.equal(means[:, 0] * 10, means[:, 1])  # columns see the same draws
    assert means[:, 0].mean().item() == pytest.approx(1.5, abs=0.06)
    assert not torch.equal(means, bootstrap_means(values, seed=1, resamples=400))


def test_blocks_do_not_change_the_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    values = draw(20, 3)
    whole = bootstrap_means(values, resamples=100), permutation_test(values)
    monkeypatch.setattr("eval.statistics.BLOCK", 20 * 7)
    parts = bootstrap_means(values, resamples=100), permutation_test(values)
    assert all(torch.allclose(a, b, atol=1e-14) for a, b in zip(whole, parts, strict=True))


def test_one_prompt_has_no_width() -> None:
    assert bootstrap_mean(torch.tensor([0.25])) == (0.25, 0.25)


def test_jackknife_of_a_mean_is_the_t_interval() -> None:
    """One value a group: the delete-one means have exactly the classical standard error."""
    values = draw(20)
    without = (values.sum() - values) / 19
    expected = stats.t.ppf(0.975, 19) * stats.sem(values.numpy())
    assert jackknife_half_width(without) == pytest.approx(expected, rel=1e-12)


def test_groups_are_even_and_keyed() -> None:
    groups = make_groups(103, 20, seed=3)
    assert set(groups.bincount(minlength=20).tolist()) == {5, 6}
    assert torch.equal(groups, make_groups(103, 20, seed=3))
    assert not torch.equal(groups, make_groups(103, 20, seed=4))
    assert make_groups(3, 20).sort().values.tolist() == [0, 1, 2]


# -- tests ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [10, 30])
def test_false_positive_rate_is_5_percent(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """No difference, from the exact and from the random test, 4,000 times; of skewed size, which a t-test
    would not like."""
    monkeypatch.setattr("eval.statistics.FLIPS", 2000)
    differences = draw(count, 4000).sinh()
    rate = (permutation_test(differences) < 0.05).double().mean().item()
    assert 0.04 <= rate <= 0.06


def test_exact_p_is_the_share_of_all_sign_changes() -> None:
    differences = torch.tensor([0.3, 0.3, -0.1, 0.0, 0.7, 0.2])
    observed = differences.sum().abs().item()
    sums = [
        abs(sum(sign * d for sign, d in zip(signs, differences.tolist(), strict=True)))
        for signs in itertools.product((1, -1), repeat=6)
    ]
    expected = sum(s >= observed - 1e-9 for s in sums) / 64
    assert permutation_test(differences[:, None]).tolist() == [pytest.approx(expected, abs=1e-15)]


def test_random_p_agrees_with_scipy() -> None:
    differences = draw(25, 1, seed=2) + 0.5
    found = permutation_test(differences).item()
    reference = stats.permutation_test(
        (differences[:, 0].numpy(),),
        lambda x, axis: x.mean(axis=axis),
        permutation_type="samples",
        n_resamples=20_000,
        vectorized=True,
        rng=1,
    )
    assert 0.02 < found < 0.5
    assert found == pytest.approx(reference.pvalue, abs=0.01)


def test_no_difference_at_all_is_p_1() -> None:
    assert permutation_test(torch.zeros(5, 1)).item() == permutation_test(torch.zeros(50, 1)).item() == 1.0


@pytest.mark.parametrize("count", [1, 7, EXACT, EXACT + 1, 200])
def test_smallest_p_is_reached(count: int) -> None:
    """By differences that all have one sign. 7 prompts reach 1/64; times 11 categories that is above 0.05."""
    assert permutation_test(torch.ones(count, 1)).item() == pytest.approx(
        smallest_p(count), rel=0.5, abs=1e-4
    )
    assert smallest_p(7) == 1 / 64


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_effect_size() -> None:
    assert effect_size(torch.tensor([1.0, 2.0, 3.0])) == pytest.approx(2.0)
    assert effect_size(torch.tensor([1.0, 1.0, 1.0])) is None
    assert effect_size(torch.tensor([1.0])) is None


def test_verdict_knows_the_better_direction() -> None:
    assert verdict(0.1, 0.01, higher_is_better=True) == "A better"
    assert verdict(0.1, 0.01, higher_is_better=False) == "B better"
    assert verdict(-0.1, 0.01, higher_is_better=True) == "B better"
    assert verdict(0.1, 0.05, higher_is_better=True) == "not significant"
