"""Figures over rounds, bytes and FLOPs: accuracy, loss, costs and density, a curve for each group of runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from fedsim_analysis.measures import curves, note_of, phases, scale_of, seeds_of
from fedsim_analysis.measures.colours import of_phase
from fedsim_analysis.report import charts, escaping
from fedsim_analysis.report.contents import Call, Figure

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fedsim_analysis.measures import Curve
    from fedsim_analysis.measures.nodes import Runs


def trend(runs: Runs, metric: str, title: str, text: str, over: str = "round", per_round: bool = False) -> Figure:
    """The curves of a metric; Lacking where no run has measured it."""
    found = curves(runs, metric, over, per_round)
    keywords: dict[str, Any] = ({"over": over} if over != "round" else {}) | ({"per_round": True} if per_round else {})
    return of_curves(f"{metric}_over_{over}", title, text, Call(metric, keywords), found)


def of_curves(name: str, title: str, text: str, call: Call, found: Sequence[Curve]) -> Figure:
    return Figure(name, title, f"{text} {interval(found)}", charts.of_curves(found), call)


def interval(found: Sequence[Curve]) -> str:
    """Of how many seeds lines and bands are."""
    note = note_of(found)
    return f"Lines and bands: {note}." if note else "One seed each, so no interval is shown."


def cost_of_phases(runs: Runs) -> Figure:
    """Bars of the seconds of each phase, a bar for each group."""
    found = phases(runs)
    names = found[0].phases
    seconds = {phase: np.array([one.total[i] for one in found]) for i, phase in enumerate(names)}
    scale = scale_of(sum(seconds.values()), "s")
    data = [
        {
            "type": "bar",
            "orientation": "h",
            "name": escaping.label(phase),
            "y": list(range(len(found))),
            "x": seconds[phase] * scale.factor,
            "marker": {"color": of_phase(phase)},
            "hovertemplate": f"%{{fullData.name}}: {charts.number('x', scale)}<extra></extra>",
        }
        for phase in names
        if seconds[phase].any()
    ]
    y = charts.names_at([one.label for one in found], "") | {"autorange": "reversed"}
    layout = charts.layout(charts.axis("Time of all rounds", scale, rangemode="tozero"), y, names, barmode="stack")
    layout["legend"] |= {"traceorder": "normal"}
    seeds = seeds_of(one.n for one in found)
    of = f", mean over {seeds}" if seeds else ""
    text = f"Where the time of the simulator goes, over all rounds{of}. It says more about the machine than about the method."
    return Figure("phases", "Time by phase", text, {"data": data, "layout": layout}, Call("phases"), 240 + 30 * len(found))
