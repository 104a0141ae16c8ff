"""Figures over runs: Pareto fronts of accuracy against what it costs, and differences of pairs of runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from fedsim_analysis.measures import Lacking, differences, pareto
from fedsim_analysis.report import charts
from fedsim_analysis.report.contents import Call, Figure

if TYPE_CHECKING:
    from fedsim_analysis.measures import Front, Point
    from fedsim_analysis.measures.nodes import Runs
    from fedsim_analysis.report.charts import Chart, Styles

COSTS = {
    "bytes": "bytes that all clients sent and received",
    "flops": "training FLOPs of all clients",
    "memory": "memory of the client that needs most",
}


def front(runs: Runs, styles: Styles, cost: str) -> Figure:
    """Lacking where there is one group alone."""
    found = pareto(runs, cost)
    if len(found.points) < 2:
        raise Lacking("one job alone has no front")
    x = charts.axis(found.cost_label, found.cost_units, found.cost_share)
    y = charts.axis(found.value_label, found.units, found.share)
    if found.share:
        y["range"] = charts.share_range([np.array([point.value, point.low, point.high]) for point in found.points])
    data = [_steps(found), *(_point(point, styles, found) for point in found.points)]
    open_ones = " A hollow marker is a job whose runs have not all ended." if not all(point.finished for point in found.points) else ""
    best = " and ".join(filter(None, [", ".join(point.label for point in found.front[:-1]), found.front[-1].label]))
    text = f"Last accuracy against {COSTS[cost]}. Nothing beats {best}. {_interval(found)}{open_ones}"
    return Figure(
        f"pareto_{cost}",
        f"Accuracy against {cost if cost != 'flops' else 'FLOPs'}",
        text,
        {"data": data, "layout": charts.layout(x, y, len(found.points))},
        Call("pareto", {"cost": cost}),
    )


def _interval(found: Front) -> str:
    most = max(point.n for point in found.points)
    return f"Crosses: 95 % intervals of the means over {most} seeds." if most > 1 else "One seed each, so no interval is shown."


def _steps(found: Front) -> Chart:
    """The edge of what is reached: what a budget buys."""
    xs, ys = [point.cost for point in found.front], [point.value for point in found.front]
    line = {"color": "#888888", "width": 1, "dash": "dot", "shape": "hv"}
    return {"type": "scatter", "mode": "lines", "x": xs, "y": ys, "line": line, "hoverinfo": "skip", "showlegend": False}


def _point(point: Point, styles: Styles, found: Front) -> Chart:
    style = styles[point.label]
    symbol = style.marker if point.finished else f"{style.marker}-open"
    marker = {"color": style.colour, "size": 11, "symbol": symbol, "line": {"width": 1 if point.finished else 2, "color": style.colour}}
    bars = {
        "error_x": _bar(point.cost_high - point.cost, style.colour),
        "error_y": _bar(point.high - point.value, style.colour),
    }
    unit = found.cost_units if found.cost_units != "1" else ""
    hover = f"%{{fullData.name}}: %{{y:.1%}} at %{{x:.3s}}{unit}<extra></extra>"
    return (
        charts.of_group(point.label)
        | {"type": "scatter", "mode": "markers", "x": [point.cost], "y": [point.value], "marker": marker, "hovertemplate": hover}
        | bars
    )


def _bar(half: float, colour: str) -> Chart:
    return {
        "type": "data",
        "array": [half],
        "visible": bool(np.isfinite(half)),
        "color": charts.faint(colour, 0.6),
        "thickness": 1.5,
        "width": 4,
    }


def pairs(runs: Runs, styles: Styles) -> Figure:
    """The difference of each job from the reference, seed by seed, and its mean with the interval."""
    found = differences(runs)
    data: list[Chart] = []
    for place, one in enumerate(found):
        style = styles[one.label]
        group = charts.of_group(one.label) | {"type": "scatter", "mode": "markers"}
        each = {"x": one.values, "y": [place] * len(one.values), "text": [f"seed {seed}" for seed in one.seeds], "showlegend": False}
        each |= {
            "marker": {"color": charts.faint(style.colour, 0.55), "size": 8},
            "hovertemplate": "%{fullData.name}, %{text}: %{x:+.1%}<extra></extra>",
        }
        mean = {"x": [one.mean], "y": [place], "marker": {"color": style.colour, "size": 12, "symbol": "diamond"}}
        mean |= {"error_x": _bar(one.high - one.mean, style.colour), "hovertemplate": "%{fullData.name}, mean: %{x:+.1%}<extra></extra>"}
        data += [group | each, group | mean]
    x = charts.axis(f"{found[0].title}, less that of {found[0].against}", found[0].units, found[0].share) | {
        "zeroline": True,
        "zerolinewidth": 2,
    }
    y = charts.names_at([one.label for one in found], "") | {"autorange": "reversed"}
    text = f"Each job less {found[0].against}, in pairs of runs with the same seed. Dots: pairs. Diamonds: their means with 95 % intervals; an interval that holds 0 shows no difference."
    return Figure(
        "differences",
        f"Differences from {found[0].against}",
        text,
        {"data": data, "layout": charts.layout(x, y)},
        Call("differences"),
        200 + 36 * len(found),
        wide=True,
    )
