"""Pieces of plotly's figures, as plain values: lines with their interval, heat maps, axes with units, and the layout that all share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedsim_analysis.report import escaping

if TYPE_CHECKING:
    from fedsim_analysis.measures.colours import Style
    from fedsim_analysis.measures.curves import Curve

Chart = dict[str, Any]
Numbers = NDArray[np.float64]
Styles = Mapping[str, "Style"]  # by the label of a group

LEGEND = {"orientation": "h", "x": 0, "xanchor": "left", "y": 1.02, "yanchor": "bottom"}
MOST_IN_LEGEND = 8  # beyond them the switches at the top of the page are the legend
MARKED = 60  # points of a curve that each have a marker
PREFIXED = ("B", "FLOP", "B/s", "FLOP/s")


def line(
    name: str, style: Style, x: Numbers, y: Numbers, low: Numbers | None = None, high: Numbers | None = None, **more: Any
) -> list[Chart]:
    """A curve, and before it the band of its interval where there is one. Both belong to the group `name`."""
    mode = "lines+markers" if len(x) <= MARKED else "lines"
    curve = of_group(name) | {
        "type": "scatter",
        "mode": mode,
        "x": x,
        "y": y,
        "line": {"color": style.colour, "width": 2, "dash": style.dash},
    }
    curve |= {"marker": {"color": style.colour, "size": 5, "symbol": style.marker}} | more
    if low is None or high is None or not np.isfinite(low).any():
        return [curve]
    held = np.isfinite(low) & np.isfinite(high) & np.isfinite(x)
    outline = {"x": np.concatenate([x[held], x[held][::-1]]), "y": np.concatenate([high[held], low[held][::-1]])}
    band = of_group(name) | outline | {"type": "scatter", "mode": "lines", "fill": "toself", "fillcolor": faint(style.colour)}
    return [band | {"line": {"width": 0}, "hoverinfo": "skip", "showlegend": False}, curve]


def of_curves(found: Sequence[Curve], styles: Styles, **more: Any) -> Chart:
    """Curves of `measures` with their axes; values outside what a share can be are not shown."""
    first = found[0]
    data = [trace for one in found for trace in line(one.label, styles[one.label], one.x, one.mean, one.low, one.high)]
    x = axis(first.x_label, first.x_units, rangemode="tozero")
    y = axis(first.y_label, first.units, first.share)
    if first.share:
        y["range"] = share_range([value for one in found for value in (one.mean, one.low, one.high)])
    return {"data": data, "layout": layout(x, y, len(found), **more)}


def share_range(values: Sequence[Numbers]) -> list[float]:
    """From 0 % or less than the least value to 100 % or the largest, with a margin; never far outside of what shares can be."""
    held = np.clip(np.concatenate(values), 0, 1)
    held = held[np.isfinite(held)]
    least, most = (float(held.min()), float(held.max())) if len(held) else (0.0, 1.0)
    margin = 0.05 * max(most - least, 0.02)
    return [least - margin, most + margin]


def of_group(name: str) -> Chart:
    return {"name": escaping.label(name), "legendgroup": escaping.shown(name)}


def faint(colour: str, opacity: float = 0.2) -> str:
    """A colour #rrggbb that lets through what lies below."""
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{opacity})"


def axis(title: str, units: str = "1", share: bool = False, **more: Any) -> Chart:
    """An axis with its unit: a share in percent, bytes, FLOPs and rates with a prefix of their size."""
    unit = "%" if share else "" if units == "1" else units
    found: Chart = {"title": {"text": escaping.label(f"{title} ({unit})" if unit else title), "standoff": 8}}
    if share:
        found |= {"tickformat": "~%", "hoverformat": ".1%"}
    elif units in PREFIXED:
        found |= {"tickformat": "~s", "hoverformat": ".3s", "ticksuffix": f"{units}" if units == "B" else ""}
    else:
        found |= {"hoverformat": "~r" if units == "1" else ".3~r"}
    return found | more


def names_at(names: Sequence[str], title: str, longest: int = 24) -> Chart:
    """An axis of names at 0, 1, …: names that look like numbers or dates are not read as such."""
    places = np.unique(np.linspace(0, len(names) - 1, min(len(names), 30)).round().astype(int)) if names else np.empty(0, int)
    ticks = {"tickvals": places, "ticktext": [escaping.label(names[i], longest) for i in places]}
    return {"type": "linear", "title": {"text": escaping.label(title), "standoff": 8}, "showgrid": False, "zeroline": False} | ticks


def layout(x: Chart, y: Chart, groups: int = 0, **more: Any) -> Chart:
    found: Chart = {"xaxis": x, "yaxis": y, "margin": {"l": 10, "r": 10, "t": 30, "b": 10}, "hovermode": "closest"}
    return found | {"showlegend": 1 <= groups <= MOST_IN_LEGEND, "legend": dict(LEGEND)} | more
