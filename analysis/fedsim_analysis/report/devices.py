"""Figures of runs whose clients have devices: accuracy over their clock and their energy, and when they worked."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from fedsim_analysis.measures import scale_of, timeline
from fedsim_analysis.measures.clients import STATUS
from fedsim_analysis.measures.nodes import has
from fedsim_analysis.plots.timelines import COLOURS
from fedsim_analysis.report import charts, trends
from fedsim_analysis.report.contents import Call, Figure

if TYPE_CHECKING:
    from fedsim_analysis.measures.nodes import Runs


def builders(runs: Runs) -> list[tuple[str, Callable[[], Any]]]:
    """What is drawn of devices; nothing where no run has some."""
    if not has(runs, "rounds", "clock"):
        return []
    trend = partial(trends.trend, runs, "accuracy")
    return [
        ("accuracy over time", partial(trend, "Accuracy over time", "Time of the clients' devices until then.", over="clock")),
        ("accuracy over energy", partial(trend, "Accuracy over energy", "Of the devices of all clients until then.", over="energy")),
        ("when devices worked", partial(worked, runs)),
    ]


def worked(runs: Runs) -> Figure:
    """A bar for each client in the last rounds of the first run with devices."""
    found = timeline(runs)
    scale = scale_of(found.ended, "s", False)
    clients = np.unique(found.clients)
    row = np.searchsorted(clients, found.clients)
    data: list[charts.Chart] = []
    for code, name in enumerate(STATUS):
        mine = found.status == code
        if not mine.any():
            continue
        base, length = found.begun[mine] * scale.factor, (found.ended - found.begun)[mine] * scale.factor
        texts = [f"client {client}, round {r}" for client, r in zip(found.clients[mine], found.round_of[mine], strict=True)]
        bar = {"type": "bar", "orientation": "h", "x": length, "y": row[mine], "base": base, "name": name, "text": texts}
        hover = f"%{{text}}: %{{x:.3~r}} {scale.units}, {name}<extra></extra>"
        data.append(bar | {"marker": {"color": COLOURS[name]}, "textposition": "none", "hovertemplate": hover})
    lines = [
        {"type": "line", "x0": end, "x1": end, "y0": 0, "y1": 1, "yref": "paper", "line": {"width": 1, "color": "#444444"}}
        for end in found.ends * scale.factor
    ]
    y = charts.names_at([f"client {client}" for client in clients], "") | {"autorange": "reversed"}
    layout = charts.layout(charts.axis("Time of the devices", scale), y, list(found.counts), barmode="overlay", shapes=lines)
    first, last = int(found.rounds.min()), int(found.rounds.max())
    text = f"The run {found.run}, rounds {first} to {last}. Bars: from the request to the answer. Lines: ends of rounds."
    return Figure(
        "timeline", "When devices worked", text, {"data": data, "layout": layout}, Call("timeline"), max(320, 140 + 18 * len(clients))
    )
