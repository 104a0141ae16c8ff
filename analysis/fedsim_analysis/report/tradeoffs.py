"""Figures over runs: Pareto fronts of accuracy against what it costs, and differences of pairs of runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from fedsim_analysis.measures import Lacking, differences, groups, pareto, scale_of, seeds_of
from fedsim_analysis.plots.lines import is_wide
from fedsim_analysis.report import charts
from fedsim_analysis.report.contents import Call, Figure

if TYPE_CHECKING:
    from fedsim_analysis.measures import Difference, Front, Point, Scale
    from fedsim_analysis.measures.nodes import Runs
    from fedsim_analysis.report.charts import Chart

NAMES = {"flops": "FLOPs"}
ZERO = {"zeroline": True, "zerolinewidth": 2, "rangemode": "tozero"}
COSTS = {
    "bytes": "bytes that all clients sent and received",
    "flops": "training FLOPs of all clients",
    "memory": "memory of the client that needs most",
}


def front(runs: Runs, cost: str) -> Figure:
    """Lacking where there is one group alone."""
    found = pareto(runs, cost)
    if len(found.points) < 2:
        raise Lacking("one job alone has no front")
    scales = _scales(found)
    x, y = (charts.axis(title, scale) for title, scale in zip((found.cost_label, found.value_label), scales, strict=True))
    if found.share:
        y |= charts.share_axis([np.array([point.value, point.low, min(point.high, max(point.value, 1.0))]) for point in found.points])
    order = [group.label for group in groups(runs)]
    data = [_steps(found, scales), *(_point(point, scales) for point in sorted(found.points, key=lambda point: order.index(point.label)))]
    if is_wide([point.cost for point in found.points]):
        x |= charts.LOGARITHMIC
    title = f"Accuracy against {NAMES.get(cost, cost)}"
    return Figure(
        f"pareto_{cost}",
        title,
        _caption(found, cost),
        {"data": data, "layout": charts.layout(x, y, [point.label for point in found.points])},
        Call("pareto", {"over": cost}),
    )


def _scales(found: Front) -> tuple[Scale, Scale]:
    costs, values = np.array([[point.cost, point.value] for point in found.points]).T
    return scale_of(costs, found.cost_units, found.cost_share), scale_of(values, found.units, found.share)


def _caption(found: Front, cost: str) -> str:
    late = [point.label for point in found.points if not point.finished]
    beaten = " Hollow: another job is at least as cheap and as accurate." if len(found.front) < len(found.points) else ""
    unfinished = f" Not all runs have ended of {', '.join(late)}." if late else ""
    return f"The last accuracy against {COSTS[cost]}.{beaten} {_interval(found)}{unfinished}"


def _interval(found: Front) -> str:
    seeds = seeds_of(point.n for point in found.points)
    return f"Crosses: 95 % intervals of the means over {seeds}." if seeds else "One seed each, so no interval is shown."


def _steps(found: Front, scales: tuple[Scale, Scale]) -> Chart:
    """The edge of what is reached: what a budget buys."""
    x, y = scales
    xs, ys = [point.cost * x.factor for point in found.front], [point.value * y.factor for point in found.front]
    line = {"color": "#888888", "width": 1, "dash": "dot", "shape": "hv"}
    return {"type": "scatter", "mode": "lines", "x": xs, "y": ys, "line": line, "hoverinfo": "skip", "showlegend": False}


def _point(point: Point, scales: tuple[Scale, Scale]) -> Chart:
    style, (x, y) = point.style, scales
    symbol = style.marker if point.on_front else f"{style.marker}-open"
    marker = {"color": style.colour, "size": 11, "symbol": symbol, "line": {"width": 1 if point.on_front else 2, "color": style.colour}}
    bars = {
        "error_x": _bar((point.cost_high - point.cost) * x.factor, style.colour),
        "error_y": _bar((point.high - point.value) * y.factor, style.colour),
    }
    hover = f"%{{fullData.name}}: {charts.number('y', y)} at {charts.number('x', x)}<extra></extra>"
    place = {"type": "scatter", "mode": "markers", "x": [point.cost * x.factor], "y": [point.value * y.factor]}
    return charts.of_group(point.label) | place | {"marker": marker, "hovertemplate": hover} | bars


def _bar(half: float, colour: str) -> Chart:
    return {
        "type": "data",
        "array": [half],
        "visible": bool(np.isfinite(half)),
        "color": charts.faint(colour, 0.6),
        "thickness": 1.5,
        "width": 4,
    }


def pairs(runs: Runs) -> Figure:
    """The difference of each job from the reference, seed by seed, and its mean with the interval."""
    found = differences(runs)
    scale = scale_of(np.concatenate([one.values for one in found]), found[0].units, found[0].share, difference=True)
    data = [trace for place, one in enumerate(found) for trace in _pairs_of(one, place, scale)]
    alone = len({one.against for one in found}) == 1
    rival = found[0].against if alone else "its baseline"
    x = charts.axis(f"{found[0].title}, less that of {rival}", scale) | ZERO
    y = charts.names_at([one.label if alone else f"{one.label} − {one.against}" for one in found], "") | {"autorange": "reversed"}
    listed = "" if alone else f" Baselines: {'; '.join(f'of {one.label}, {one.against}' for one in found)}."
    bars = ", with 95 % intervals" if any(len(one.values) > 1 for one in found) else ""
    text = f"Each job less {rival}, in pairs of runs with the same seed. Small: pairs. Large: their means{bars}.{listed}"
    chart, title = {"data": data, "layout": charts.layout(x, y)}, f"Differences from {rival if alone else 'baselines'}"
    return Figure("differences", title, text, chart, Call("differences"), max(360, 160 + 36 * len(found)))


def _pairs_of(one: Difference, place: int, scale: Scale) -> list[Chart]:
    style, group = one.style, charts.of_group(one.label) | {"type": "scatter", "mode": "markers"}
    value = f"%{{x:+.3~r}} {'points' if one.share else scale.units}"
    each = {"x": one.values * scale.factor, "y": [place] * len(one.values), "text": [f"seed {seed}" for seed in one.seeds]}
    each |= {
        "marker": {"color": charts.faint(style.colour, 0.55), "size": 7, "symbol": style.marker},
        "hovertemplate": f"%{{fullData.name}}, %{{text}}: {value}<extra></extra>",
    }
    mean = {"x": [one.mean * scale.factor], "y": [place], "marker": {"color": style.colour, "size": 12, "symbol": style.marker}}
    mean |= {
        "error_x": _bar((one.high - one.mean) * scale.factor, style.colour),
        "hovertemplate": f"%{{fullData.name}}, mean: {value}<extra></extra>",
    }
    return [group | each, group | mean]
