"""Groups against each other: Pareto fronts, and paired differences."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from fedsim_analysis import measures
from fedsim_analysis.measures import Difference, Front, Point
from fedsim_analysis.plots import page
from fedsim_analysis.plots.legends import SHORT, legend
from fedsim_analysis.plots.lines import MARKERS, is_wide, labelled, logarithmic, within
from fedsim_analysis.plots.text import brief, shortened, width_of

if TYPE_CHECKING:
    from fedsim_analysis.measures.nodes import Runs

ROW = 0.3  # inches of a group's difference


def pareto(
    runs: Runs, over: str = "bytes", metric: str = "accuracy", ax: Axes | None = None, width: str | float = "column", each_run: bool = False
) -> Axes:
    """The last accuracy of each group against what its runs cost in all: bytes, FLOPs, memory or seconds.

    A line joins the groups that no other one beats in both, and these are filled. Bars are 95 % intervals over seeds.
    """
    with page.style():
        found = measures.pareto(runs, over, metric, each_run)
        ax = page.axes(ax, width)
        x = measures.scale_of([point.cost for point in found.points], found.cost_units, found.cost_share)
        y = measures.scale_of([point.value for point in found.points], found.units, found.share)
        handles = _points(ax, found, x.factor, y.factor)
        page.name(ax, x.axis(found.cost_label), y.axis(found.value_label))
        costs = [point.cost for point in found.points]
        if is_wide(costs):
            logarithmic(ax, [cost * x.factor for cost in costs])
        ax.margins(0.08)
        within(ax, max(point.value for point in found.points) if found.share else np.inf, positive=True)
        if ax.get_xlim()[0] < 0:
            ax.set_xlim(left=0)
        legend(ax, handles, [labelled(point) for point in found.points], _note(found))
    return ax


def _note(found: Front) -> str:
    note = measures.note(point.n for point in found.points)
    return "; ".join(["filled: Pareto front", *([note] if note else [])])


def _points(ax: Axes, found: Front, x: float, y: float) -> list[Line2D]:
    best = found.front
    ax.plot(
        [point.cost * x for point in best],
        [point.value * y for point in best],
        color=page.INK,
        linewidth=0.7,
        alpha=0.55,
        zorder=1.5,
        drawstyle="steps-post",
    )
    return [_point(ax, point, x, y) for point in found.points]


def _point(ax: Axes, point: Point, x: float, y: float) -> Line2D:
    colour = point.style.colour
    at, half = ([point.cost * x], [point.value * y]), lambda low, high, factor: None if np.isnan(low) else [(high - low) / 2 * factor]
    wide, tall = half(point.cost_low, point.cost_high, x), half(point.low, point.high, y)
    ax.errorbar(*at, xerr=wide, yerr=tall, fmt="none", ecolor=colour, elinewidth=0.8, capsize=1.5, capthick=0.8)
    inside = colour if point.on_front else "white"
    mark: dict[str, Any] = {"marker": MARKERS[point.style.marker], "markersize": 5, "markeredgecolor": colour, "markeredgewidth": 1.0}
    return ax.plot(*at, linestyle="none", markerfacecolor=inside, **mark)[0]


def differences(
    runs: Runs, metric: str = "accuracy", against: str | None = None, ax: Axes | None = None, width: str | float = "column"
) -> Axes:
    """The last value of each group minus that of `against`, by pairs of runs: pairs (small), their mean and its 95 % interval.

    Which runs are pairs: as in `fedsim compare`. Without `against` groups are held against the dense method, else against the first group.
    """
    with page.style():
        found = measures.differences(runs, metric, against)
        ax = page.axes(ax, width, 0.8 + ROW * len(found))
        scale = measures.scale_of(np.concatenate([one.values for one in found]), found[0].units, found[0].share, difference=True)
        ax.axvline(0, color=page.INK, linewidth=0.7)
        for row, one in enumerate(found):
            _difference(ax, row, one, scale.factor)
        rivals = list(dict.fromkeys(one.against for one in found))
        rival = f"that of {brief(rivals[0], SHORT)}" if len(rivals) == 1 else "its baseline"
        names = shortened([one.label if len(rivals) == 1 else f"{one.label} − {one.against}" for one in found], SHORT * len(rivals[:2]))
        ax.set_yticks(range(len(found)), names)
        ax.set_ylim(len(found) - 0.4, -0.6)
        ax.grid(False, axis="y")
        ax.tick_params(axis="y", length=0)
        ax.spines["left"].set_visible(False)
        title = scale.axis(f"{found[0].title} minus {rival}")
        page.name(ax, title, "", max(width_of(name, page.SMALL) for name in names))
        pairs = sorted({len(one.values) for one in found})
        of = " to ".join(map(str, dict.fromkeys((pairs[0], pairs[-1]))))
        legend(ax, [], [], f"mean and 95 % interval of {of} pairs" if pairs[-1] > 1 else "one pair")
    return ax


def _difference(ax: Axes, row: int, one: Difference, factor: float) -> None:
    colour, marker = one.style.colour, MARKERS[one.style.marker]
    small: dict[str, Any] = {"linestyle": "none", "markersize": 2.5, "alpha": 0.5}
    ax.plot(one.values * factor, np.full(len(one.values), row - 0.22), color=colour, marker=marker, **small)
    wide = None if np.isnan(one.low) else [(one.high - one.mean) * factor]
    ax.errorbar([one.mean * factor], [row], xerr=wide, color=colour, marker=marker, markersize=5, capsize=2, elinewidth=1.2)
