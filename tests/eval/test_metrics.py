"""Figures of known sets, and agreement with independent implementations on the same features."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import linalg
from scipy.spatial import distance
from torch import Tensor
from torch_fidelity import metric_fid, metric_kid

from eval.metrics import alignment, frechet, kernel, lettering, prdc


def features(count: int, width: int, seed: int, shift: float = 0.0) -> Tensor:
    """Correlated, and none negative, as pooled features are."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    rows = torch.randn(count, width, generator=generator, dtype=torch.float64)
    return (rows @ mix / math.sqrt(width) + shift).relu()


# -- Frechet distance ----------------------------------------------------------------------------------------


def scipy_frechet(a: Tensor, b: Tensor) -> float:
    """By the matrix square root, as the metric was published."""
    x, y = a.numpy(), b.numpy()
    s, t = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = linalg.sqrtm(s @ t)
    return float(((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(s + t - 2 * root.real))


@pytest.mark.parametrize(("count", "width"), [(500, 24), (2500, 192)])
def test_frechet_agrees_with_scipy(count: int, width: int) -> None:
    a, b = features(count, width, 0), features(count + 100, width, 1, shift=0.1)
    found = frechet.frechet_distance(frechet.moments(a), frechet.moments(b))
    assert found == pytest.approx(scipy_frechet(a, b), rel=1e-6)


def test_frechet_agrees_with_torch_fidelity() -> None:
    a, b = features(2500, 192, 2), features(2600, 192, 3, shift=0.1)
    statistics = [metric_fid.fid_features_to_statistics(x) for x in (a, b)]
    expected = metric_fid.fid_statistics_to_metric(*statistics, False)[metric_fid.KEY_METRIC_FID]
    found = frechet.frechet_distance(frechet.moments(a), frechet.moments(b))
    assert found == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("count", "width"), [(300, 40), (40, 300)])
def test_frechet_of_a_set_with_itself_is_0(count: int, width: int) -> None:
    a = frechet.moments(features(count, width, 0))
    assert 0 <= frechet.frechet_distance(a, a) < 1e-8


def test_frechet_of_two_gaussians_is_the_closed_form() -> None:
    """Diagonal covariances commute, so that the trace is that of (sigma - tau)^2."""
    generator = torch.Generator().manual_seed(0)
    sigma, tau, apart = torch.linspace(0.5, 2, 16), torch.linspace(1.5, 1, 16), 0.5
    a = torch.randn(50_000, 16, generator=generator) * sigma
    b = torch.randn(50_000, 16, generator=generator) * tau + apart
    expected = 16 * apart**2 + (sigma - tau).square().sum().item()
    found = frechet.frechet_distance(frechet.moments(a), frechet.moments(b))
    assert found == pytest.approx(expected, rel=0.01)


def test_fewer_pictures_than_dimensions_need_no_covariance() -> None:
    """The thin and the square factor are of one covariance."""
    a, b = features(60, 100, 0), features(80, 100, 1)
    thin = frechet.frechet_distance(frechet.moments(a), frechet.moments(b))
    square = [frechet.moments_of_covariance(x.mean(0), x.T.cov()) for x in (a, b)]
    assert thin == pytest.approx(frechet.frechet_distance(*square), rel=1e-6)


def test_one_picture_has_no_covariance() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        frechet.moments(torch.zeros(1, 4))


# -- kernel distances ----------------------------------------------------------------------------------------


def slow_mmd(k, x: np.ndarray, y: np.ndarray, diagonal: bool) -> float:
    """Pair by pair."""

    def mean(a: np.ndarray, b: np.ndarray, own: bool) -> float:
        pairs = [k(p, q) for i, p in enumerate(a) for j, q in enumerate(b) if diagonal or not own or i != j]
        return sum(pairs) / len(pairs)

    return mean(x, x, True) + mean(y, y, True) - 2 * mean(x, y, False)


def test_kid_pair_by_pair() -> None:
    x, y = features(40, 12, 0), features(40, 12, 1, shift=0.3)
    expected = slow_mmd(lambda p, q: (p @ q / 12 + 1) ** 3, x.numpy(), y.numpy(), diagonal=False)
    assert kernel.kid(x, y) == pytest.approx(expected, rel=1e-9)


def test_kid_agrees_with_torch_fidelity() -> None:
    x, y = features(300, 64, 0), features(300, 64, 1, shift=0.2)
    settings = dict(kid_kernel_poly_degree=3, kid_kernel_poly_gamma=None, kid_kernel_poly_coef0=1.0)
    values = [metric_kid.kernel_poly(a.numpy(), b.numpy(), **settings) for a, b in ((x, x), (x, y), (y, y))]
    expected = metric_kid.mmd2(*values)
    assert kernel.kid(x, y) == pytest.approx(expected, rel=1e-9)


def test_kid_of_subsets_is_keyed_and_near_the_whole() -> None:
    x, y = features(600, 16, 0), features(500, 16, 1, shift=0.5)
    whole = kernel.kernel_sums(kernel.polynomial, x, y).unbiased()
    assert kernel.kid(x, y, seed=1, subsets=50, size=100) == pytest.approx(whole, rel=0.1)
    assert kernel.kid(x, y, 1, 5, 100) == kernel.kid(x, y, 1, 5, 100) != kernel.kid(x, y, 2, 5, 100)


def test_kid_of_one_distribution_is_0_in_the_mean() -> None:
    values = [kernel.kid(features(100, 8, 2 * i), features(100, 8, 2 * i + 1)) for i in range(60)]
    mean = sum(values) / 60
    assert min(values) < 0 < max(values)  # unbiased, so negative at times
    assert abs(mean) < 3 * float(np.std(values)) / math.sqrt(60)


def test_cmmd_pair_by_pair() -> None:
    x, y = (torch.nn.functional.normalize(features(n, 12, n), dim=1) for n in (30, 40))
    expected = 1000 * slow_mmd(lambda p, q: math.exp(-((p - q) ** 2).sum() / 200), x.numpy(), y.numpy(), True)
    assert kernel.cmmd(x, y) == pytest.approx(expected, rel=1e-5)
    assert kernel.cmmd(x, x) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("estimate", ["unbiased", "biased"])
def test_sums_without_a_group_are_those_of_the_rest(estimate: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "BLOCK", 500)  # several blocks of rows
    x, y, groups = features(50, 8, 0), features(60, 8, 1), torch.arange(60) % 7
    sums = kernel.kernel_sums(kernel.polynomial, x, y, groups)
    rest = kernel.kernel_sums(kernel.polynomial, x, y[groups != 3])
    assert getattr(sums.without(3), estimate)() == pytest.approx(getattr(rest, estimate)(), rel=1e-9)
    whole = kernel.kernel_sums(kernel.polynomial, x, y)
    assert getattr(sums, estimate)() == pytest.approx(getattr(whole, estimate)(), rel=1e-9)


# -- precision, recall, density, coverage --------------------------------------------------------------------


def test_prdc_row_by_row() -> None:
    """As the definitions read."""
    x, y, k = features(60, 6, 0).numpy(), features(50, 6, 1, shift=0.2).numpy(), 3

    def radius(rows: np.ndarray, i: int) -> float:
        return sorted(np.linalg.norm(rows[i] - r) for j, r in enumerate(rows) if j != i)[k - 1]

    rx, ry = [radius(x, i) for i in range(60)], [radius(y, j) for j in range(50)]
    near = [[float(np.linalg.norm(p - q)) for q in y] for p in x]
    expected = {
        "precision": sum(any(near[i][j] < rx[i] for i in range(60)) for j in range(50)) / 50,
        "recall": sum(any(near[i][j] < ry[j] for j in range(50)) for i in range(60)) / 60,
        "density": sum(near[i][j] < rx[i] for i in range(60) for j in range(50)) / (k * 50),
        "coverage": sum(min(near[i]) < rx[i] for i in range(60)) / 60,
    }
    found = prdc.Neighbours(torch.from_numpy(x), torch.from_numpy(y), k).measure()
    assert found == pytest.approx(expected, abs=1e-12)
    assert all(0 < value < 1.5 for value in expected.values())


def test_prdc_agrees_with_its_authors_formulas_by_scipy() -> None:
    x, y = features(200, 32, 0), features(150, 32, 1, shift=0.1)
    rr, ff, rf = (distance.cdist(a, b) for a, b in ((x, x), (y, y), (x, y)))
    rx, ry = np.sort(rr, axis=1)[:, 5], np.sort(ff, axis=1)[:, 5]  # column 0 is the row itself
    found = prdc.Neighbours(x, y).measure()
    assert found["precision"] == pytest.approx((rf < rx[:, None]).any(0).mean(), abs=1e-12)
    assert found["recall"] == pytest.approx((rf < ry[None]).any(1).mean(), abs=1e-12)
    assert found["density"] == pytest.approx((rf < rx[:, None]).sum(0).mean() / 5, abs=1e-12)
    assert found["coverage"] == pytest.approx((rf.min(1) < rx).mean(), abs=1e-12)


def test_prdc_of_a_set_with_itself_and_with_one_far_away() -> None:
    x = features(80, 6, 0)
    same, far = prdc.Neighbours(x, x).measure(), prdc.Neighbours(x, x + 1000).measure()
    assert same["precision"] == same["recall"] == same["coverage"] == 1.0
    assert same["density"] >= 1.0
    assert set(far.values()) == {0.0}


def test_prdc_of_a_part_is_that_of_the_part() -> None:
    x, y, kept = features(60, 6, 0), features(50, 6, 1), torch.arange(50) % 4 > 0
    assert prdc.Neighbours(x, y).measure(kept) == prdc.Neighbours(x, y[kept]).measure()


def test_prdc_needs_more_rows_than_neighbours() -> None:
    with pytest.raises(ValueError, match="more than 5"):
        prdc.Neighbours(torch.zeros(5, 2), torch.zeros(9, 2))


# -- alignment -----------------------------------------------------------------------------------------------


def test_cosine_and_clip_score() -> None:
    x, y = (torch.randn(30, 16, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    expected = np.array([1 - distance.cosine(p, q) for p, q in zip(x.double(), y.double(), strict=True)])
    assert alignment.cosine(x, y).numpy() == pytest.approx(expected, abs=1e-12)
    assert alignment.clip_score(alignment.cosine(x, y)).numpy() == pytest.approx(
        np.maximum(2.5 * expected, 0), abs=1e-12
    )
    assert (expected < 0).any()


def test_ranks_count_the_better_texts() -> None:
    texts = torch.eye(4)
    image = torch.tensor([[9.0, 1, 0, 0], [3, 2, 1, 0], [1, 2, 3, 4], [1, 1, 1, 1]])
    own = torch.tensor([0, 1, 0, 2])
    assert alignment.text_ranks(image, texts, own).tolist() == [
        0,
        1,
        3,
        3,
    ]  # a tie is a miss
    assert alignment.recall_at(torch.tensor([0, 1, 3, 3]), 2).tolist() == [1, 1, 0, 0]


# -- lettering -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [("kitten", "sitting", 3), ("", "abc", 3), ("abc", "", 3), ("flaw", "lawn", 2), ("same", "same", 0)],
)
def test_edit_distance(a: str, b: str, expected: int) -> None:
    assert lettering.edit_distance(a, b) == expected


def test_similarity_takes_the_best_reading() -> None:
    assert lettering.similarity("Hello World", ["HELLO", "WORLD!"]) == 1.0
    assert lettering.similarity("Hello", ["price 5", "Hallo"]) == pytest.approx(0.8)
    assert lettering.similarity("Hello", []) == 0.0
    assert lettering.shown("Deep Learning", ["a shop:", "Deeplearning", "open"])
    assert not lettering.shown("Deep Learning", ["Deep Leaning"])
