"""Figures of masks: density of each layer and round, how much the masks change, and how much they share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedsim_analysis.measures import Lacking, churn, layer_density, overlap, overlap_of_runs, scale_of
from fedsim_analysis.measures.colours import COUNTS, HEAT
from fedsim_analysis.plots.lines import is_wide
from fedsim_analysis.report import charts, escaping, trends
from fedsim_analysis.report.contents import Block, Call, Figure

if TYPE_CHECKING:
    from fedsim_analysis.measures import Group, Heat, Scale
    from fedsim_analysis.measures.nodes import Numbers, Runs

MOST_COLUMNS, MOST_ROWS = 500, 400  # of a heat map on the page
MOST_MAPS = 6  # groups with a heat map of their own
TICKS = (0.001, 0.01, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)  # of a logarithmic scale of percentages
SCALES: dict[str, Any] = {
    "viridis": "Viridis",
    "Blues": [[0, "#F7FBFF"], [0.25, "#C6DBEF"], [0.5, "#6BAED6"], [0.75, "#2171B5"], [1, "#08306B"]],
}


def densities(runs: Runs, groups: Sequence[Group], most: int = MOST_MAPS) -> Iterator[Block]:
    """A heat map for each group whose masks remove weights."""
    pruned = [(group, heat) for group in groups if (heat := _density(runs, group)) is not None and np.nanmin(heat.values) < 1]
    if not pruned:
        raise Lacking("all layers keep all weights in all rounds")
    for number, (group, heat) in enumerate(pruned[:most], start=1):
        left = f" Maps left out: {len(pruned) - most}, of other jobs." if number == most < len(pruned) else ""
        text = f"Kept share of each layer's weights after each round{_of_seeds(heat.n)}.{left}"
        call = Call("layer_density", {"group": group.label})
        yield heat_map(f"layer_density_{number}", f"Density of layers: {group.label}", text, call, heat)


def _density(runs: Runs, group: Group) -> Heat | None:
    """None of a group without densities of layers."""
    try:
        return layer_density(runs, group=group.label)
    except Lacking:
        return None


def _of_seeds(n: int) -> str:
    return f", mean over {n} seeds" if n > 1 else ", of one run"


def changes(runs: Runs) -> Figure:
    found = [charts.part(one, one.mean > 0) for one in churn(runs)]
    found = [one for one in found if len(one.x)]
    if not found:
        raise Lacking("no mask has changed in any round")
    text = "Weights that came to the masks or left them, as a share of the kept weights, in the rounds in which the masks changed."
    return trends.of_curves("churn", "Churn of masks", text, Call("mask_churn"), found)


def overlaps(runs: Runs) -> Figure:
    text = "Weights that the mask of a round shares with the first mask, over the weights that either of them keeps (Jaccard index)."
    return trends.of_curves("overlap", "Overlap with the first mask", text, Call("mask_overlap"), overlap(runs))


def overlaps_of_runs(runs: Runs) -> Figure:
    found = overlap_of_runs(runs)
    if len(found.rows) < 2:
        raise Lacking("one run alone has masks")
    text = "Weights that the last masks of two runs share, over the weights that either of them keeps (Jaccard index)."
    return heat_map("overlap_of_runs", "Overlap of the last masks of runs", text, Call("mask_overlap", {"against": "runs"}), found)


def heat_map(name: str, title: str, text: str, call: Call, found: Heat) -> Figure:
    """A heat map, thinned to what a page can show. The colours of shares go from 0 to 100 %."""
    rows, columns = _some(len(found.rows), MOST_ROWS), _some(len(found.columns), MOST_COLUMNS)
    if len(rows) < len(found.rows) or len(columns) < len(found.columns):
        shown = f"{len(rows)} of {len(found.rows)} rows and {len(columns)} of {len(found.columns)} columns"
        text = f"{text} The page shows {shown}, evenly chosen."
    scale = scale_of(found.values, found.units, found.share)
    row_names, column_names = (_unique([names[i] for i in places]) for names, places in ((found.rows, rows), (found.columns, columns)))
    places = [int(name) for name in column_names] if found.column_label == "Round" else column_names
    data = {"type": "heatmap", "x": places, "y": row_names, "colorscale": SCALES[HEAT if found.share else COUNTS]}
    data |= _colours(found, found.values[np.ix_(rows, columns)] * scale.factor, scale)
    x, y = (charts.axis(title, showgrid=False, zeroline=False) for title in (found.column_label, found.row_label))
    x["type"] = "linear" if found.column_label == "Round" else "category"
    height = int(min(max(220 + 16 * len(rows), 300), 640))
    return Figure(
        name, title, text, {"data": [data], "layout": charts.layout(x, y | {"type": "category", "autorange": "reversed"})}, call, height
    )


def _colours(found: Heat, values: Numbers, scale: Scale) -> dict[str, Any]:
    """The values and what their colours mean: of densities that differ much their logarithms, as in `plots`."""
    bar: dict[str, Any] = {"title": {"text": scale.units}, "thickness": 12, "outlinewidth": 0}
    where = f"{escaping.label(found.row_label.lower())} %{{y}}, {escaping.label(found.column_label.lower())} %{{x}}"
    known = values[np.isfinite(values)]
    if not (found.row_label == "Layer" and is_wide([float(known.min(initial=100)), 100.0])):
        most = 100.0 if found.share else float(known.max(initial=1))
        shown = {"z": values, "zmin": 0, "zmax": most, "hovertemplate": f"{where}: {charts.number('z', scale)}<extra></extra>"}
        return shown | {"colorbar": bar}
    ticks = [tick for tick in TICKS if tick >= 10 ** np.floor(np.log10(known.min()))]
    bar |= {"tickvals": np.log10(ticks), "ticktext": [f"{tick:g}" for tick in ticks]}
    shown = {"z": np.log10(values), "zmin": float(np.log10(ticks[0])), "zmax": 2, "customdata": values}
    return shown | {"colorbar": bar, "hovertemplate": f"{where}: {charts.number('customdata', scale)}<extra></extra>"}


def _some(size: int, most: int) -> NDArray[np.int64]:
    """At most `most` places of `size`, evenly chosen, the first and the last among them."""
    return np.unique(np.linspace(0, size - 1, min(size, most)).round().astype(np.int64))


def _unique(names: Sequence[str]) -> list[str]:
    """Labels of rows or columns; plotly puts equal ones into one place."""
    labels = [escaping.label(name, 24) for name in names]
    taken = Counter(labels)
    return [f"{label} ({i + 1})" if taken[label] > 1 else label for i, label in enumerate(labels)]
