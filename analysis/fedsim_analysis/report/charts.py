"""Pieces of plotly's figures, as plain values: lines with their interval, heat maps, axes with units, and the layout that all share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from textwrap import wrap
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fedsim_analysis.measures import scale_of
from fedsim_analysis.plots.lines import is_wide
from fedsim_analysis.report import escaping

if TYPE_CHECKING:
    from fedsim_analysis.measures import Curve, Scale
    from fedsim_analysis.measures.colours import Style

Chart = dict[str, Any]
Numbers = NDArray[np.float64]

LEGEND = {"orientation": "h", "x": 0, "xanchor": "left", "y": 1.02, "yanchor": "bottom"}
LOGARITHMIC = {"type": "log", "dtick": "D2", "tickformat": "~r"}
UNIFIED = {"hovermode": "x unified", "hoverdistance": -1}  # the numbers of all curves at the round nearest to the pointer
LEGEND_ROOM = 90  # characters of all names
MARKED = 25  # points of a curve that each have a marker
TITLE = 36  # characters in a line of an axis' title


class Named(Protocol):
    """A curve or a point of a group."""

    @property
    def label(self) -> str: ...
    @property
    def style(self) -> Style: ...


def line(one: Named, x: Numbers, y: Numbers, low: Numbers | None = None, high: Numbers | None = None, **more: Any) -> list[Chart]:
    """A curve, and before it the band of its interval where there is one. Both belong to one group."""
    name, style = one.label, one.style
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


def of_curves(found: Sequence[Curve]) -> Chart:
    """Curves of `measures` with their axes, in units of their size."""
    first = found[0]
    over_rounds = first.x_label == "Round"
    wide = not over_rounds and is_wide([float(one.x[-1]) for one in found])
    found = [part(one, one.x > 0) for one in found] if wide else found
    x, y = (scale_of(np.concatenate([np.ravel(each) for each in values]), units, share) for values, units, share in _held(found))
    data: list[Chart] = []
    for one in found:
        mean, low, high = (each * y.factor for each in (one.mean, one.low, one.high))
        shown = number("y", y)
        more: Chart = {}
        if np.isfinite(low).all():
            more["customdata"] = np.stack([low, high], axis=1)
            shown += " (%{customdata[0]:.4~r} to %{customdata[1]:.4~r})"
        at = "" if over_rounds else f" at {number('x', x)}"
        more["hovertemplate"] = f"%{{fullData.name}}: {shown}{at}<extra></extra>"
        data += line(one, one.x * x.factor, mean, low, high, **more)
    below = (
        rounds([one.rounds for one in found])
        if over_rounds
        else axis(first.x_label, x) | (LOGARITHMIC if wide else {"rangemode": "tozero"})
    )
    beside = axis(first.y_label, y) | (share_axis([one.mean for one in found] + [one.low for one in found]) if first.share else {})
    return {"data": data, "layout": layout(below, beside, [one.label for one in found], **(UNIFIED if over_rounds else {}))}


def part(one: Curve, there: NDArray[np.bool_]) -> Curve:
    """The points of a curve that are `there`."""
    return replace(one, **{name: getattr(one, name)[there] for name in ("rounds", "x", "mean", "low", "high", "n")})


def _held(found: Sequence[Curve]) -> tuple[tuple[list[Numbers], str, bool], tuple[list[Numbers], str, bool]]:
    return ([one.x for one in found], found[0].x_units, False), ([one.mean for one in found], found[0].units, found[0].share)


def share_axis(values: Sequence[Numbers]) -> Chart:
    """The range of an axis of shares in percent: all values, with a margin; of their intervals, which may reach further, nothing below 0.

    values: means and the lower ends of their intervals. A share may be above 1: weights that changed, over the few that are kept.
    """
    held = np.maximum(np.concatenate([np.ravel(each) for each in values]), 0)
    held = held[np.isfinite(held)]
    least, most = (float(held.min()), float(held.max())) if len(held) else (0.0, 1.0)
    margin = 0.05 * max(most - least, 0.2)
    return {"range": [100 * (least - margin), 100 * (most + margin)]}


def of_group(name: str) -> Chart:
    return {"name": escaping.label(name), "legendgroup": escaping.shown(name)}


def faint(colour: str, opacity: float = 0.2) -> str:
    """A colour #rrggbb that lets through what lies below."""
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{opacity})"


def axis(title: str, scale: Scale | None = None, **more: Any) -> Chart:
    """An axis with its unit."""
    return {"title": _title(scale.axis(title) if scale else title)} | more


def number(name: str, scale: Scale) -> str:
    """A number of plotly's with its unit, for a hovertemplate."""
    return f"%{{{name}:.4~r}}{f' {scale.units}' if scale.units else ''}"


def rounds(numbers: Sequence[NDArray[np.int64]]) -> Chart:
    """The axis of rounds, which has whole numbers."""
    last = max((int(each.max()) for each in numbers if len(each)), default=0)
    title = {"unifiedhovertitle": {"text": "Round %{x}"}}
    return axis("Round", rangemode="tozero") | title | ({"dtick": 1} if last <= 10 else {})


def _title(text: str) -> Chart:
    """In lines that fit beside a small figure."""
    return {"text": "<br>".join(escaping.label(part) for part in wrap(escaping.shown(text).replace(" (", "\u00a0("), TITLE)), "standoff": 8}


def names_at(names: Sequence[str], title: str, most: int = 30, longest: int = 24) -> Chart:
    """An axis of names at 0, 1, …, of which `most` are written: names that look like numbers or dates are not read as such."""
    step = max(1, -(-len(names) // most))
    places = list(range(0, len(names), step))
    ticks = {"tickvals": places, "ticktext": [escaping.label(names[i], longest) for i in places]}
    return {"title": _title(title), "showgrid": False, "zeroline": False, "range": [-0.5, len(names) - 0.5]} | ticks


def layout(x: Chart, y: Chart, names: Sequence[str] = (), **more: Any) -> Chart:
    """names: of the legend, which a figure has where they fit; elsewhere the switches at the top of the page name the curves."""
    found: Chart = {"xaxis": x, "yaxis": y, "margin": {"l": 10, "r": 10, "t": 30, "b": 10}, "hovermode": "closest"}
    return found | {"showlegend": bool(names) and sum(map(len, names)) <= LEGEND_ROOM, "legend": dict(LEGEND)} | more
