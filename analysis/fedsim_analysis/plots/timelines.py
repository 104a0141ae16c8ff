"""Timelines: when the devices of a run worked, a bar for each client and round, by the virtual clock."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Patch

from fedsim_analysis import measures
from fedsim_analysis.measures.clients import STATUS
from fedsim_analysis.plots import page

if TYPE_CHECKING:
    from fedsim_analysis.measures.nodes import Runs

COLOURS = {"answered": "#4477aa", "late": "#ee9922", "failed": "#cc3344", "unfit": "#999999", "unavailable": "#cccccc"}
ROW, TALLEST = 0.12, 5.0  # inches of a client, and of all
NAMED = 30  # clients whose numbers are written


def timeline(
    runs: Runs, run: str | None = None, rounds: Sequence[int] | None = None, ax: Axes | None = None, width: str | float = "page"
) -> Axes:
    """When each client of a run received, trained and sent, in some rounds (by default the last three) by the virtual clock.

    Vertical lines: ends of rounds. Lacking (a ValueError) where no run has devices.
    """
    found = measures.timeline(runs, run, rounds)
    clients = np.unique(found.clients)
    with page.style():
        ax = page.axes(ax, width, min(TALLEST, 0.9 + ROW * len(clients)))
        scale = measures.scale_of(found.ended, "s", False)
        row = np.searchsorted(clients, found.clients)
        for code, name in enumerate(STATUS):
            mine = found.status == code
            spans = found.begun[mine] * scale.factor, (found.ended - found.begun)[mine] * scale.factor
            ax.barh(row[mine], spans[1], left=spans[0], height=0.8, color=COLOURS[name], linewidth=0)
        for end in found.ends * scale.factor:
            ax.axvline(end, color="#444444", linewidth=0.7)
        ax.set_ylim(len(clients) - 0.5, -0.5)
        if len(clients) <= NAMED:
            ax.set_yticks(range(len(clients)), [str(client) for client in clients])
        page.name(ax, scale.axis("Time of the devices"), "Client")
        handles = [Patch(color=COLOURS[name], label=f"{name} ({n})") for name, n in found.counts.items()]
        ax.legend(handles=handles, loc="lower left", bbox_to_anchor=(0, 1), ncols=len(handles), handlelength=1, borderaxespad=0.2)
    return ax
