"""Intervals, signed ranks and Holm's correction, against hand, brute force and scipy's own test."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from fedsim_analysis.comparison.statistics import half_interval, holm, mean, signed_rank
from scipy.stats import rankdata, wilcoxon


def test_the_interval_is_student_s() -> None:
    assert half_interval([1.0, 2.0, 3.0]) == pytest.approx(
        4.302653 / 3**0.5
    )  # s = 1; 4.302653 is the table's value of 2 degrees of freedom
    assert half_interval([0.1] * 3) == 0
    assert np.isnan(half_interval([1.0]))
    assert np.isnan(half_interval([]))


def test_what_is_not_finite_gives_no_warning() -> None:
    assert np.isnan(half_interval([np.inf, 1.0]))
    assert mean([np.inf, 1.0]) == np.inf
    assert np.isnan(mean([]))
    assert np.isnan(signed_rank([np.inf, 1.0], [np.inf, 2.0]))


def brute(differences: list[float]) -> float:
    """Two-sided p: the share of all signs of the ranks whose smaller sum is no larger."""
    moved = [value for value in differences if value]
    ranks = rankdata(np.abs(moved))

    def smaller(signs: tuple[int, ...] | list[bool]) -> float:
        positive = float(ranks[np.array(signs, bool)].sum())
        return min(positive, float(ranks.sum()) - positive)

    found = smaller([value > 0 for value in moved])
    sums = [smaller(signs) for signs in product((0, 1), repeat=len(moved))]
    return sum(value <= found + 1e-9 for value in sums) / len(sums)


@pytest.mark.parametrize("n", [1, 2, 3, 6, 9, 12])
def test_the_test_is_exact(n: int) -> None:
    drawn = np.random.default_rng(n).normal(0.4, 1, n)
    assert signed_rank(drawn, np.zeros(n)) == pytest.approx(brute(list(drawn)))
    assert signed_rank(drawn, np.zeros(n)) == pytest.approx(wilcoxon(drawn, method="exact").pvalue)
    tied = np.random.default_rng(n).integers(-2, 5, n).astype(float)
    assert signed_rank(tied, np.zeros(n)) == pytest.approx(brute(list(tied)) if tied.any() else 1)


@pytest.mark.parametrize("n", [1, 3, 5, 6, 10, 40])
def test_n_pairs_cannot_give_less(n: int) -> None:
    assert signed_rank(np.arange(n) + 1.0, np.zeros(n)) == pytest.approx(2.0 ** (1 - n))


def test_equal_runs_and_none() -> None:
    assert signed_rank([0.5, 0.7], [0.5, 0.7]) == 1
    assert np.isnan(signed_rank([], []))
    assert signed_rank([3.0, 5.0, 7.0, 9.0], [0.0, 5.0, 0.0, 0.0]) == pytest.approx(2.0**-2)  # the pair of equals is left out


def test_equal_differences_are_equal_whatever_rounding_says() -> None:
    ones, others = np.array([10, 200, 303, 77, 120]) / 360, np.array([7, 197, 300, 80, 118]) / 360
    assert len(set(np.abs(ones - others))) > 2  # 3 / 360 in several ways, and 2 / 360
    assert signed_rank(ones, others) == pytest.approx(brute([3, 3, 3, -3, 2]))


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])  # 3 x, then 2 x 0.03, and 0.04 no less than that
    assert holm([0.5, 0.6]) == pytest.approx([1.0, 1.0])
    assert holm([]) == []
    assert holm([0.02, np.nan, 0.01]) == pytest.approx([0.02, np.nan, 0.02], nan_ok=True)
