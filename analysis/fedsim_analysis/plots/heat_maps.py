"""Heat maps: density of layers, overlap of masks, and who holds images of which class."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, cast

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, Normalize
from matplotlib.ticker import FuncFormatter, NullLocator

from fedsim_analysis import measures
from fedsim_analysis.measures import Heat, colours
from fedsim_analysis.measures.nodes import Numbers
from fedsim_analysis.plots import page
from fedsim_analysis.plots.lines import draw, part
from fedsim_analysis.plots.text import brief, plain, shortened, width_of, wrapped

if TYPE_CHECKING:
    from matplotlib.spines import Spine

    from fedsim_analysis.measures.nodes import Runs

ROW = 0.145  # inches of a row that has a name
LONGEST, TITLE, BAR = 22, 26, 0.75  # signs of a name and of a title; inches of the colour bar
TALLEST = 5.5  # inches
WIDTH = 0.08  # inches of the colour bar alone
SQUARE = 2.7  # inches, of a map of rounds and rounds
WIDE = 5.0  # times, by which values differ before their colours become logarithmic
FEW = 12  # rows and columns whose numbers are written into their cells


def layer_density(
    runs: Runs, run: str | None = None, group: str | None = None, ax: Axes | None = None, width: str | float = "column"
) -> Axes:
    """Kept share of each layer's weights in each round: of one run, or the mean of a group, by default of the first."""
    return heat(measures.layer_density(runs, run, group), ax, width)


def mask_overlap(
    runs: Runs,
    against: Literal["first", "previous", "last", "rounds", "runs"] = "first",
    run: str | None = None,
    ax: Axes | None = None,
    width: str | float = "column",
) -> Axes:
    """Weights that two masks share over those that either keeps (Jaccard index).

    against: "first", "previous", "last": a curve for each group, of the masks after each round with another of the same run, for
    "previous" without the rounds in which no mask changed; "rounds": all rounds of one run (`run`, by default the first with
    masks) with each other; "runs": the last masks of all runs.
    """
    if against == "rounds":
        return heat(measures.overlap_of_rounds(runs, run), ax, width)
    if against == "runs":
        return heat(measures.overlap_of_runs(runs), ax, width)
    found = measures.overlap(runs, against)
    if against == "previous":
        found = [part(one, one.mean < 1) for one in found if (one.mean < 1).any()]
    if not found:
        raise measures.Lacking("no mask has changed in any round")
    return draw(found, ax, width)


def partition(runs: Runs, run: str | None = None, ax: Axes | None = None, width: str | float = "column") -> Axes:
    """Training images that each client holds of each class, in one run, by default the first."""
    return heat(measures.partition(runs, run), ax, width)


def heat(shown: Heat, ax: Axes | None = None, width: str | float = "column") -> Axes:
    """A heat map in the one style, its colour bar beside it."""
    with page.style():
        upright = _is_upright(shown, page.inches(width))
        ax = page.axes(ax, width, _height(shown, upright))
        scale = measures.scale_of(shown.values, shown.units, shown.share)
        values = shown.values * scale.factor
        norm = _norm(shown, values)
        image = ax.imshow(values, aspect="auto", interpolation="nearest", cmap=colours.HEAT if shown.share else colours.COUNTS, norm=norm)
        _frame(ax)
        _names(ax, shown, upright)
        _write(ax, shown, values, norm)
        _bar(ax, image, scale.axis(shown.title), isinstance(norm, LogNorm))
    return ax


def _is_upright(shown: Heat, width: float) -> bool:
    """Whether the names of the columns stand upright, since they are too long to lie."""
    if shown.column_label == "Round":
        return False
    longest = max((width_of(name, page.SMALL) for name in shortened(shown.columns, LONGEST)), default=0.0)
    return longest > 0.3 and (longest + 0.08) * len(shown.columns) > width - 0.6 - _taken(shown)


def _height(shown: Heat, upright: bool) -> float:
    """Inches of the figure: room for the names of the rows, but for rounds, whose numbers may be left out."""
    below = min(max((width_of(name, page.SMALL) for name in shortened(shown.columns, LONGEST)), default=0.0), 1.6) if upright else 0.15
    most = TALLEST if shown.row_label in ("Layer", "Run") else SQUARE  # clients are many, and their names are numbers
    return SQUARE if shown.row_label == "Round" else min(max(1.4, ROW * len(shown.rows)), most) + 0.5 + below


def _norm(shown: Heat, values: Numbers) -> Normalize:
    known = values[np.isfinite(values)]
    if not shown.share:
        return Normalize(0, max(float(known.max(initial=0)), 1))
    least = float(known.min(initial=100))
    if shown.row_label == "Layer" and 0 < least * WIDE <= 100:
        return LogNorm(10.0 ** np.floor(np.log10(least)), 100)
    return Normalize(0, 100)


def _frame(ax: Axes) -> None:
    ax.grid(False)
    for spine in ax.spines.values():
        spine.set(visible=True, edgecolor=page.INK, linewidth=0.6)


def _bar(ax: Axes, image: ScalarMappable, title: str, logarithmic: bool) -> None:
    size = float(mpl.rcParams["axes.labelsize"])
    bar = ax.figure.colorbar(image, ax=ax, pad=0.02, aspect=page.size_of(ax)[1] / WIDTH)
    bar.set_label(wrapped(plain(title), size, page.size_of(ax)[1]), fontsize=size, color=page.INK)
    bar.ax.tick_params(which="both", labelsize=page.SMALL, color=page.INK, labelcolor=page.INK)
    cast("Spine", bar.outline).set_linewidth(0.6)
    if logarithmic:
        bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        bar.ax.yaxis.set_minor_locator(NullLocator())


def _names(ax: Axes, shown: Heat, upright: bool) -> None:
    width, height = page.size_of(ax)
    longest = max((width_of(name, page.SMALL) for name in shortened(shown.columns, LONGEST)), default=0.1)
    _thinned(ax, "y", shown.rows, int(height / ROW))
    _thinned(ax, "x", shown.columns, int((width - _taken(shown)) / (ROW if upright else longest + 0.08)))
    if upright:
        ax.tick_params(axis="x", labelrotation=90)
    page.name(ax, shown.column_label, shown.row_label, _taken(shown))


def _taken(shown: Heat) -> float:
    """Inches of the width that the names of the rows and the colour bar have."""
    return max((width_of(name, page.SMALL) for name in shortened(shown.rows, LONGEST)), default=0.0) + BAR - 0.2


def _thinned(ax: Axes, axis: str, names: Sequence[str], room: int) -> None:
    """A tick for every k-th name, k being 1, 2, 5, 10 …, so that they have room."""
    steps = (step * 10**power for power in range(9) for step in (1, 2, 5))
    step = next(step for step in steps if len(names) <= max(room, 1) * step)
    places = list(range(0, len(names), step))
    (ax.set_xticks if axis == "x" else ax.set_yticks)(places, shortened([names[i] for i in places], LONGEST))


def _write(ax: Axes, shown: Heat, values: Numbers, norm: Normalize) -> None:
    """What the map is of; and numbers in its cells where they are few, or in the first and the last round of each layer."""
    rows, columns = values.shape
    note = [brief(shown.label, TITLE) + (f", mean of {shown.n} seeds" if shown.n > 1 else "")]
    if rows <= FEW and columns <= FEW:
        for i, j in np.ndindex(rows, columns):
            _number(ax, shown, values, norm, (i, j), f"{values[i, j]:.0f}", "center")
    elif shown.row_label == "Layer" and rows * ROW <= TALLEST:
        note.append("numbers: first and last round")
        for i in range(rows):
            _number(ax, shown, values, norm, (i, 0), f" {values[i, 0]:.3g}", "left")
            _number(ax, shown, values, norm, (i, columns - 1), f"{values[i, -1]:.3g} ", "right")
    title = wrapped(plain("; ".join(filter(None, note))), page.SMALL, max(page.size_of(ax)[0] - _taken(shown), 1.2))
    ax.set_title(title, loc="left", fontsize=page.SMALL, color=page.GREY)


def _number(ax: Axes, shown: Heat, values: Numbers, norm: Normalize, place: tuple[int, int], text: str, side: str) -> None:
    value = values[place]
    if np.isfinite(value):
        dark = norm(value) < 0.55 if shown.share else norm(value) > 0.5
        at = place[1] + {"left": -0.5, "center": 0.0, "right": 0.5}[side]
        more: dict[str, Any] = {"ha": side, "va": "center", "fontsize": page.SMALL - 1, "color": "white" if dark else page.INK}
        ax.text(at, place[0], text, **more)
