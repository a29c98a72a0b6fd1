"""Intervals of shares from clustered votes, and agreement of raters."""

from __future__ import annotations

import math

import pytest
import torch

from eval.agreement import clustered_share, krippendorff_alpha
from eval.statistics import wilson

# Four observers, twelve units, five levels; 0 is no rating. The example of Krippendorff (2011), whose ordinal
# alpha is 0.815.
EXAMPLE = [
    [1, 2, 3, 3, 2, 1, 4, 1, 2, 0, 0, 0],
    [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, 0, 3],
    [0, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, 0],
    [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, 0],
]


def test_alpha_of_the_published_example() -> None:
    assert krippendorff_alpha(torch.tensor(EXAMPLE) - 1, 5) == pytest.approx(0.815, abs=5e-4)


def by_pairs(ratings: torch.Tensor, levels: int) -> float:
    """Alpha from its definition: mean disagreement of two ratings of one unit over that of any two."""
    units = [[r for r in unit.tolist() if r >= 0] for unit in ratings.T]
    units = [unit for unit in units if len(unit) > 1]
    every = [r for unit in units for r in unit]

    def apart(a: int, b: int) -> float:
        low, high = min(a, b), max(a, b)
        return (sum(low <= r <= high for r in every) - (every.count(a) + every.count(b)) / 2) ** 2

    within = sum(
        sum(apart(a, b) for i, a in enumerate(u) for j, b in enumerate(u) if i != j) / (len(u) - 1)
        for u in units
    ) / len(every)
    pairs = len(every) * (len(every) - 1)
    between = sum(apart(a, b) for i, a in enumerate(every) for j, b in enumerate(every) if i != j) / pairs
    return 1 - within / between


@pytest.mark.parametrize("seed", range(3))
def test_alpha_against_its_definition(seed: int) -> None:
    ratings = torch.randint(-1, 3, (4, 15), generator=torch.Generator().manual_seed(seed))
    assert krippendorff_alpha(ratings, 3) == pytest.approx(by_pairs(ratings, 3), abs=1e-12)


def test_alpha_of_perfect_and_of_no_agreement() -> None:
    same = torch.tensor([[0, 1, 2, 0], [0, 1, 2, 0]])
    assert krippendorff_alpha(same, 3) == 1.0
    generator = torch.Generator().manual_seed(0)
    chance = torch.randint(0, 3, (3, 3000), generator=generator)
    assert krippendorff_alpha(chance, 3) == pytest.approx(0.0, abs=0.03)


def test_alpha_says_nothing_where_there_is_nothing_to_agree_on() -> None:
    assert krippendorff_alpha(torch.tensor([[0, 1, 2]]), 3) is None  # one rater
    assert krippendorff_alpha(torch.tensor([[1, 1], [1, 1]]), 3) is None  # one level


@pytest.mark.parametrize(
    ("prompts", "raters", "share", "spread"), [(200, 5, 0.55, 2.0), (20, 5, 0.6, 2.0), (38, 3, 0.95, 5.0)]
)
def test_intervals_of_clustered_votes_cover(prompts: int, raters: int, share: float, spread: float) -> None:
    """Prompts differ (beta), raters of one prompt vote by its share: 95% intervals hold the mean."""
    torch.manual_seed(0)
    of_prompts = torch.distributions.Beta(share * spread, (1 - share) * spread).sample((1000, prompts))
    votes = torch.distributions.Binomial(raters, of_prompts.clamp(1e-6, 1 - 1e-6)).sample() / raters
    ends = [clustered_share(row, prompts * raters)[1:] for row in votes]
    covered = sum(low <= share <= high for low, high in ends) / len(ends)
    assert 0.93 <= covered <= 0.985


def test_the_interval_of_one_vote_a_prompt_is_wilsons() -> None:
    votes = torch.tensor([1.0] * 120 + [0.0] * 80)
    mean, low, high = clustered_share(votes, 200)
    expected = wilson(120, 200)
    assert mean == pytest.approx(0.6)
    assert (low, high) == pytest.approx(expected, abs=2e-3)  # Student's quantile at 199 is 0.6% larger


def test_prompts_on_which_all_agree_leave_an_interval() -> None:
    mean, low, high = clustered_share(torch.ones(7), 7 * 25)
    assert mean == high == 1.0 and 0.3 < low < 0.8
    assert clustered_share(torch.ones(1), 25) == (1.0, 0.0, 1.0)


def test_many_raters_do_not_stand_for_many_prompts() -> None:
    votes = torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0] * 4)
    few, many = clustered_share(votes, 20), clustered_share(votes, 20 * 1000)
    assert few == pytest.approx(many, abs=0.02)
    assert math.isclose(few[0], 0.6)
