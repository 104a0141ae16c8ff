"""Figures of masks: density of each layer and round, how much the masks change, and how much they share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fedsim_analysis.measures import Lacking, churn, layer_density, overlap, overlap_of_runs, scale_of
from fedsim_analysis.measures.colours import COUNTS, HEAT
from fedsim_analysis.report import charts, escaping, trends
from fedsim_analysis.report.contents import Block, Call, Figure

if TYPE_CHECKING:
    from fedsim_analysis.measures import Group, Heat
    from fedsim_analysis.measures.nodes import Runs
    from fedsim_analysis.report.charts import Styles

MOST_COLUMNS, MOST_ROWS = 500, 400  # of a heat map on the page
MOST_MAPS = 6  # groups with a heat map of their own
SCALES = {"viridis": "Viridis", "Blues": [[0, "#F7FBFF"], [0.25, "#C6DBEF"], [0.5, "#6BAED6"], [0.75, "#2171B5"], [1, "#08306B"]]}


def densities(runs: Runs, groups: Sequence[Group]) -> Iterator[Block]:
    """A heat map for each group whose masks remove weights."""
    pruned = [(group, heat) for group in groups if (heat := _density(runs, group)) is not None and np.nanmin(heat.values) < 1]
    if not pruned:
        raise Lacking("all layers keep all weights in all rounds")
    for number, (group, heat) in enumerate(pruned[:MOST_MAPS], start=1):
        left = f" The maps of {len(pruned) - MOST_MAPS} other jobs are left out." if number == MOST_MAPS < len(pruned) else ""
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


def changes(runs: Runs, styles: Styles) -> Figure:
    text = "Weights that came to the masks or left them in a round, as a share of the kept weights."
    return trends.of_curves("churn", "Churn of masks", text, Call("mask_churn"), churn(runs), styles)


def overlaps(runs: Runs, styles: Styles) -> Figure:
    text = "Weights that the mask of a round shares with the first mask, over the weights that either of them keeps (Jaccard index)."
    return trends.of_curves("overlap", "Overlap with the first mask", text, Call("mask_overlap"), overlap(runs), styles)


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
    row_names, column_names = ([str(names[i]) for i in places] for names, places in ((found.rows, rows), (found.columns, columns)))
    scale = scale_of(found.values, found.units, found.share)
    most = 1.0 if found.share else float(np.nanmax(found.values))
    data: dict[str, Any] = {
        "type": "heatmap",
        "z": found.values[np.ix_(rows, columns)] * scale.factor,
        "zmin": 0,
        "zmax": most * scale.factor,
        "colorscale": SCALES[HEAT if found.share else COUNTS],
        "colorbar": {"title": {"text": scale.units}, "thickness": 12, "outlinewidth": 0},
        "text": _texts(found, row_names, column_names),
        "hovertemplate": f"%{{text}}: {charts.number('z', scale)}<extra></extra>",
    }
    x, y = (
        charts.names_at(column_names, found.column_label, 11, 16),
        charts.names_at(row_names, found.row_label) | {"autorange": "reversed"},
    )
    height = int(min(max(220 + 16 * len(rows), 300), 640))
    return Figure(name, title, text, {"data": [data], "layout": charts.layout(x, y)}, call, height)


def _some(size: int, most: int) -> np.ndarray:
    """At most `most` places of `size`, evenly chosen, the first and the last among them."""
    return np.unique(np.linspace(0, size - 1, min(size, most)).round().astype(int))


def _texts(found: Heat, rows: Sequence[str], columns: Sequence[str]) -> list[list[str]]:
    return [
        [f"{escaping.label(row, 40)}, {escaping.label(found.column_label.lower())} {escaping.label(column, 40)}" for column in columns]
        for row in rows
    ]
