"""Pareto fronts: which groups, or runs, no other one beats in cost and in accuracy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fedsim_analysis.measures.colours import Style
from fedsim_analysis.measures.groups import groups
from fedsim_analysis.measures.intervals import mean_and_half
from fedsim_analysis.measures.metrics import Metric, final, metric_of
from fedsim_analysis.measures.nodes import Numbers, along_runs, labels

if TYPE_CHECKING:
    from fedsim_analysis.measures.nodes import Runs


@dataclass(frozen=True)
class Point:
    """What a group, or a run, has cost until its end, and its last measured value; means over seeds with their 95 % intervals."""

    label: str
    method: str
    cost: float
    cost_low: float  # NaN where fewer than two runs have both
    cost_high: float
    value: float
    low: float
    high: float
    n: int
    on_front: bool  # no other point costs less and is better, or is equal in one of these
    finished: bool  # whether all its runs have ended
    runs: tuple[str, ...]
    style: Style


@dataclass(frozen=True)
class Front:
    """All points, in the order of the groups."""

    points: tuple[Point, ...]
    cost_label: str
    cost_units: str
    value_label: str
    units: str
    share: bool
    cost_share: bool
    lower_is_better: bool

    @property
    def front(self) -> tuple[Point, ...]:
        """The points that no other one beats, by rising cost."""
        return tuple(sorted((point for point in self.points if point.on_front), key=lambda point: (point.cost, point.value)))


def pareto(runs: Runs, cost: str = "bytes", metric: str = "accuracy", each_run: bool = False) -> Front:
    """Points of all groups, or with `each_run` of all runs: the last measured `metric` against the `cost` of the whole run.

    cost: "bytes" and "flops" of all clients and rounds, "memory" of the largest client, "seconds", or a column of the node `rounds`
    at its last row. Groups are compared by their means. Lacking where no run has measured one of the two.
    """
    x, y = metric_of(runs, cost), metric_of(runs, metric)
    costs, values = final(runs, x), final(runs, y)
    names = labels(runs, "rounds", "run")
    ended = along_runs(runs, "rounds", "finished") or [True] * len(names)
    found = []
    for group in groups(runs):
        for held in [[i] for i in group.places] if each_run else [list(group.places)]:
            label = names[held[0]] if each_run else group.label
            there = [i for i in held if np.isfinite(costs[i]) and np.isfinite(values[i])]
            if there:
                x_and_y = *_interval(costs[there]), *_interval(values[there])
                done, own = all(bool(ended[i]) for i in held), tuple(names[i] for i in there)
                found.append(Point(label, group.method, *x_and_y, len(there), False, done, own, group.style))
    return _front(found, x, y)


def _interval(values: Numbers) -> tuple[float, float, float]:
    mean, half, _ = mean_and_half(values)
    return float(mean), float(mean - half), float(mean + half)


def _front(found: list[Point], x: Metric, y: Metric) -> Front:
    gain = np.array([-point.value if y.lower_is_better else point.value for point in found])
    best = not_beaten(np.array([point.cost for point in found]), gain)
    marked = [Point(**(vars(point) | {"on_front": bool(on)})) for point, on in zip(found, best, strict=True)]
    return Front(tuple(marked), x.title, x.units, y.title, y.units, y.share, x.share, y.lower_is_better)


def not_beaten(cost: Numbers, gain: Numbers) -> NDArray[np.bool_]:
    """(points,) True where no other point has a cost at most as high and a gain at least as high, one of them really better."""
    cheaper, better = cost[:, None] <= cost[None, :], gain[:, None] >= gain[None, :]  # of the first, against the second
    really = (cost[:, None] < cost[None, :]) | (gain[:, None] > gain[None, :])
    return np.asarray(~(cheaper & better & really).any(axis=0))
