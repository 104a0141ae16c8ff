"""The seconds of a round, and the time left."""

from __future__ import annotations

import numpy as np
import pytest
from fedsim_analysis.watch.pace import pace_of
from watched_runs import nothing


def flags(rounds: int, every: int) -> np.ndarray:
    return np.arange(rounds) % every == 0


def test_evaluated_rounds_are_counted_apart() -> None:
    seconds = np.where(flags(31, 5), 5.0, 2.0)
    pace = pace_of(seconds, flags(31, 5), 5)
    assert (pace.plain, pace.evaluation) == (2, 3)
    # rounds 31 … 62: 32 rounds, of which 35, 40, 45, 50, 55, 60 and the last, 62, are evaluated
    assert pace.left(30, 62) == 32 * 2 + 7 * 3
    assert pace.left(30, 60) == 30 * 2 + 6 * 3
    assert pace.left(60, 60) == 0
    assert pace.left(61, 60) == 0


def test_a_slow_round_and_the_first_do_not_count_and_old_ones_are_forgotten() -> None:
    seconds = np.concatenate([np.full(40, 9.0), np.full(20, 2.0)])
    seconds[[0, 45, 50]] = 500
    assert pace_of(seconds, np.zeros(60, bool)).left(59, 100) == 41 * 2


def test_every_round_evaluated_none_and_nothing_known() -> None:
    assert pace_of(np.full(6, 4.0), np.ones(6, bool), 1).left(5, 10) == 20
    assert pace_of(np.full(6, 4.0), np.zeros(6, bool), 0).left(5, 10) == 20
    assert pace_of(np.array([7.0]), np.ones(1, bool), 5).plain == 7  # round 0 alone
    for nobody_knows in (nothing(0), nothing(5)):
        assert np.isnan(pace_of(nobody_knows, np.zeros(len(nobody_knows), bool)).left(0, 10))
    assert pace_of(np.array([1.0, np.inf, np.nan, 3.0]), np.zeros(4, bool)).plain == pytest.approx(3)
