"""fronts: what no other point beats, against trying every pair; and the points of runs."""

from __future__ import annotations

from pathlib import Path

import fedsim_analysis
import numpy as np
import pytest
from drawn_runs import write
from fedsim_analysis import measures
from fedsim_analysis.measures.fronts import not_beaten
from hypothesis import given
from hypothesis import strategies as st

POINTS = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=12)


@given(POINTS)
def test_a_point_is_on_the_front_where_none_beats_it(points: list[tuple[int, int]]) -> None:
    def beaten(cost: int, gain: int) -> bool:
        return any((c < cost and g >= gain) or (c <= cost and g > gain) for c, g in points)

    costs, gains = np.array(points, float).T
    assert not_beaten(costs, gains).tolist() == [not beaten(*point) for point in points]


def test_points_are_what_runs_cost_and_reached(tmp_path: Path) -> None:
    write(tmp_path / "a.h5", (0.1, 0.3, np.nan), scale=2)
    write(tmp_path / "b.h5", (0.1, np.nan, 0.5), seed=1)
    write(tmp_path / "c.h5", (0.9, np.nan, 0.2), "fedavg", fields="", scale=3, planned=9)
    write(tmp_path / "d.h5", (0.1, np.nan, 0.6), "fedmef", scale=3)
    runs = fedsim_analysis.open(tmp_path)
    found = measures.pareto(runs)
    assert [(point.label, point.cost, point.n, point.on_front, point.finished) for point in found.points] == [
        ("fedtiny", 1.5 * 33, 2, True, True),
        ("fedavg", 99, 1, False, False),
        ("fedmef", 99, 1, True, True),
    ]
    assert [point.value for point in found.points] == pytest.approx([0.4, 0.2, 0.6])
    half = 12.706204736432095 / 2 * 0.2
    assert (found.points[0].low, found.points[0].high) == pytest.approx((0.4 - half, 0.4 + half))
    assert np.isnan(found.points[1].low)
    assert [point.label for point in found.front] == ["fedtiny", "fedmef"]
    assert [point.label for point in measures.pareto(runs, each_run=True).front] == ["b", "d"]
    loss = measures.pareto(runs, "seconds", "loss")
    assert loss.lower_is_better
    assert [point.label for point in loss.front] == ["fedmef"]
