"""Means over seeds and paired differences: Student's t, Wilcoxon's signed ranks, Holm's correction."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import stdtrit

LEVEL = 0.95  # of every interval
DIGITS = 12  # of a number; what stands behind them comes from rounding, and would hide that two differences are equal


def half_interval(values: ArrayLike) -> float:
    """Half the 95 % confidence interval of the mean, by Student's t; NaN of fewer than two values."""
    given = np.asarray(values, np.float64)
    n = len(given)
    if n < 2:
        return np.nan
    if (given == given[0]).all():
        return 0.0  # which rounding of the mean may miss
    with np.errstate(all="ignore"):  # a value that was recorded may be any
        return float(stdtrit(n - 1, (1 + LEVEL) / 2) * np.std(given, ddof=1) / np.sqrt(n))


def mean(values: ArrayLike) -> float:
    """NaN of no values."""
    given = np.asarray(values, np.float64)
    with np.errstate(all="ignore"):
        return float(given.mean()) if len(given) else np.nan


def signed_rank(ones: ArrayLike, others: ArrayLike) -> float:
    """The two-sided p of Wilcoxon's signed-rank test of pairs: exact for every n, also with ties, over all 2^n signs of the ranks.

    Differences of 0 are left out, as Wilcoxon does; p is 1 where all are 0, and NaN where there are none. With n differences the
    smallest p is 2^(1-n).
    """
    given = _differences(np.asarray(ones, np.float64), np.asarray(others, np.float64))
    if not len(given) or np.isnan(given).any():
        return np.nan
    moved = given[given != 0]
    sizes, place, count = np.unique(np.abs(moved), return_inverse=True, return_counts=True)
    doubled = (2 * np.cumsum(count) - count + 1)[place] if len(sizes) else np.empty(0, int)  # ranks, their mean where equal, times 2
    chance = np.zeros(int(doubled.sum()) + 1)  # of each sum of the ranks of one sign
    chance[0] = 1
    for rank in doubled:
        chance[rank:] += chance[:-rank].copy()
        chance /= 2
    smaller = min(int(doubled[moved > 0].sum()), int(doubled[moved < 0].sum()))
    return min(1.0, 2 * float(chance[: smaller + 1].sum()))


def holm(ps: Sequence[float]) -> list[float]:
    """The p values of one family, corrected by Holm's step-down rule, in the order given. NaN stays NaN and is not counted."""
    found, known = [np.nan] * len(ps), [i for i, p in enumerate(ps) if not np.isnan(p)]
    largest = 0.0
    for left, i in zip(range(len(known), 0, -1), sorted(known, key=lambda i: ps[i]), strict=True):
        largest = max(largest, min(1.0, left * ps[i]))
        found[i] = largest
    return found


def _differences(ones: NDArray[np.float64], others: NDArray[np.float64]) -> NDArray[np.float64]:
    """(n,) in the unit of the largest number: 3 of 360 images are as many, whichever two shares differ by them."""
    scale = np.maximum(np.abs(ones), np.abs(others)).max(initial=0)
    with np.errstate(all="ignore"):  # a value that was recorded may be any
        return np.asarray(np.round((ones - others) / (scale or 1.0), DIGITS), np.float64)
