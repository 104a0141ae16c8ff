"""A leaderboard of many methods: accuracy over what it costs, in panels with one axis of accuracy and one legend."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.legend_handler import HandlerTuple
from matplotlib.lines import Line2D
from matplotlib.transforms import ScaledTranslation

from fedsim_analysis import measures
from fedsim_analysis.comparison.leaderboard import COSTS, PERSONAL, Leaderboard, Line, Point
from fedsim_analysis.comparison.leaderboard import leaderboard as numbers
from fedsim_analysis.comparison.metrics import Metric
from fedsim_analysis.measures import colours
from fedsim_analysis.measures.colours import Style
from fedsim_analysis.measures.nodes import along_runs
from fedsim_analysis.plots import page
from fedsim_analysis.plots.lines import DASHES, MARKERS, is_wide, logarithmic, within
from fedsim_analysis.plots.text import plain, shortened, wrapped

if TYPE_CHECKING:
    from fedsim_analysis.measures.nodes import Runs

AXES = {  # of a cost
    "density": "Density of the last model",
    "max_client_flops_share": "Training FLOPs of a client, of dense",
    "bytes": "Sent by all clients, up and down",
    "max_client_model_memory": "Model memory of the largest client",
    "max_client_memory": "Memory of the largest client",
}
SCORES = {
    "accuracy": "Test accuracy",
    "accuracy_last_10": "Test accuracy",
    "client_accuracy_macro": "Clients' accuracy",
    "client_accuracy_min": "Worst client's accuracy",
}
COLUMNS, TALL, LEAST = 2, 1.85, 0.6  # panels side by side; inches of a panel; of the figure beside the panels
ENTRY, LONGEST = 1.36, 26  # height of an entry of the legend, in sizes of its text; signs of its label
SIZE = 4.4  # points of a marker
LARGER = dict.fromkeys(("star", "diamond-tall"), 1.4) | dict.fromkeys(("x", "cross", "pentagon", "hexagon"), 1.2)
LARGER |= dict.fromkeys(("triangle-up", "triangle-down", "triangle-left", "triangle-right"), 1.2)  # for as much ink
ASIDE, APART = 13.0, 3.0  # points over which lines of one density are spread at most, and between two of them
FILLS = ("full", "full", "left", "bottom")
ENDINGS = (".pdf", ".svg", ".png")
OWN = "†"  # marks methods whose clients have networks of their own


def leaderboard(
    runs: Runs | Iterable[str | Path], metric: str = "accuracy", width: str | float = "page", costs: Sequence[str] = COSTS
) -> Figure:
    """Accuracy of all methods over each of `costs`, the mean over seeds with its 95 % interval; a line joins the jobs of a method.

    runs: run files, or the DataTree of `fedsim_analysis.open`. metric: "accuracy" of the last model, "accuracy_last_10", "clients" or
    "lowest". costs: as in the overview of `fedsim compare`. Dense averaging is a horizontal line with its interval. Colours are those of
    families of methods; the legend has the best method first. Raises ValueError for runs that have different data, or are of one job.
    """
    return draw(numbers(_files(runs), metric, costs), width)


def check_place(path: Path) -> None:
    """ValueError where no figure can be written: by the ending, or because there is no such folder."""
    if path.suffix.lower() not in ENDINGS:
        raise ValueError(f"--figure {path}: a figure ends with {', '.join(ENDINGS[:-1])} or {ENDINGS[-1]}")
    if not path.parent.is_dir():
        raise ValueError(f"--figure {path}: there is no folder {path.parent}")
    if path.is_dir():
        raise ValueError(f"--figure {path} is a folder; give the name of a file")


def write(runs: Iterable[str | Path], path: Path, metric: str = "accuracy") -> list[str]:
    """Writes the leaderboard of run files; what a user should know about it, in lines."""
    found = numbers(runs, metric)
    page.save(draw(found), path)
    lines = [f"{path}: {found.metric.about}; {len(found.lines)} lines of {len(found.points)} jobs on {found.data}"]
    if found.differ:
        lines.append(f"jobs of different methods differ in more than the method: {', '.join(found.differ)}")
    if found.not_measured:
        lines.append(f"left out, for the accuracy was not measured: {', '.join(found.not_measured)}")
    if found.personal and found.metric.name.startswith("accuracy"):
        lines.append(f"clients have networks of their own in {', '.join(found.personal)}: --metric clients shows how accurate these are")
    return lines


def draw(found: Leaderboard, width: str | float = "page") -> Figure:
    """The figure of a leaderboard."""
    with page.style():
        marks = _marks(found.lines)
        families = _families(found)
        rows, entries = ceil(len(found.costs) / COLUMNS), len(found.lines) + len(families) + 3
        height = max(rows * TALL + LEAST, entries * ENTRY * page.SMALL / 72 + LEAST)
        figure = page.new(page.inches(width), height)
        grid = figure.subplots(rows, min(COLUMNS, len(found.costs)), sharey=True, squeeze=False)
        for at, (ax, cost) in enumerate(zip(grid.flat, found.costs, strict=False)):
            page.axes(ax, width)
            _panel(ax, found, marks, at, cost)
            if not at % COLUMNS:
                ax.set_ylabel(f"{SCORES[found.metric.name]} (%)")
        for ax in list(grid.flat)[len(found.costs) :]:
            ax.remove()
        _limits(grid[0, 0], found)
        _legend(figure, found, marks, families)
        if text := _note(found):
            room = figure.get_figwidth() - 0.2
            figure.supxlabel(wrapped(plain(text), page.SMALL, room), x=0.01, ha="left", fontsize=page.SMALL, color=page.GREY)
    return figure


def _files(runs: Any) -> Iterable[str | Path]:
    """The paths of the runs, whose numbers a comparison reads itself."""
    if hasattr(runs, "coords"):
        paths = along_runs(runs, "rounds", "path")
        return [] if paths is None else paths
    return runs if isinstance(runs, list | tuple) else list(runs)


def _panel(ax: Axes, found: Leaderboard, marks: Sequence[Mark], at: int, cost: Metric) -> None:
    share = cost.unit == "%"
    values = [point.costs[at] for point in found.points if np.isfinite(point.costs[at])]
    x = measures.scale_of(values, cost.unit, share)
    aside = _aside(found, at)
    for line, mark in zip(found.lines, marks, strict=True):
        if line.is_reference:
            _reference(ax, line.points, mark.style)
        drawn = _line(ax, line, mark, at, x.factor)
        if shift := aside.get(line.label):
            for one in drawn:
                one.set_transform(one.get_transform() + ScaledTranslation(shift / 72, 0, ax.figure.dpi_scale_trans))
    if values and (cost.name == "density" or is_wide(values)) and min(values) > 0 and len(set(values)) > 1:
        logarithmic(ax, [value * x.factor for value in values])
    ax.margins(x=0.09 if aside else 0.05)
    if not values:
        ax.text(0.5, 0.5, "not measured", transform=ax.transAxes, ha="center", fontsize=page.SMALL, color=page.GREY)
    title = AXES.get(cost.name, cost.about.partition(":")[0])
    ax.set_xlabel(x.axis(title[0].upper() + title[1:]))


def _reference(ax: Axes, points: Sequence[Point], style: Style) -> None:
    for point in points:
        ax.axhline(100 * point.score, color=style.colour, linestyle=DASHES[style.dash], linewidth=1.0, zorder=1.4)
        if np.isfinite(point.half):
            low, high = 100 * (point.score - point.half), 100 * (point.score + point.half)
            ax.axhspan(low, high, color=style.colour, alpha=0.13, linewidth=0, zorder=1.1)


def _line(ax: Axes, line: Line, mark: Mark, at: int, factor: float) -> list[Artist]:
    """What it has drawn."""
    points = [point for point in line.points if np.isfinite(point.costs[at])]
    x, y = np.array([point.costs[at] * factor for point in points]), np.array([100 * point.score for point in points])
    half = np.array([100 * point.half for point in points])
    dash: Any = "none" if line.is_reference else DASHES[mark.style.dash]
    drawn: list[Artist] = [*ax.plot(x, y, linestyle=dash, linewidth=0.9, zorder=2, **mark.drawn())]
    there = np.isfinite(half)
    if there.any() and not line.is_reference:
        bars: dict[str, Any] = {"fmt": "none", "elinewidth": 0.6, "alpha": 0.55, "zorder": 1.8}
        drawn += ax.errorbar(x[there], y[there], yerr=half[there], ecolor=mark.style.colour, **bars).lines[2]
    return drawn


def _aside(found: Leaderboard, at: int) -> dict[str, float]:
    """Points by which lines are moved to the side, where several have one largest density; neighbours in the legend are moved far apart."""
    if found.costs[at].name != "density":
        return {}
    largest: dict[str, list[str]] = {}
    for line in found.lines:
        values = [point.costs[at] for point in line.points if np.isfinite(point.costs[at])]
        if values and not line.is_reference:
            largest.setdefault(f"{max(values):.2g}", []).append(line.label)
    moved = {}
    for labels in largest.values():
        spread = min(ASIDE, APART * (len(labels) - 1))
        for k, label in enumerate([*labels[::2], *labels[1::2]]):
            moved[label] = spread * (k / max(len(labels) - 1, 1) - 0.5)
    return {label: shift for label, shift in moved.items() if shift}


@dataclass(frozen=True)
class Mark:
    """How a line is drawn."""

    style: Style
    variant: int  # of its method: 0 has filled markers, 1 open ones, others half of them

    def drawn(self) -> dict[str, Any]:
        """For matplotlib, without the dash."""
        colour, is_open = self.style.colour, self.variant == 1
        return {
            "color": colour,
            "marker": MARKERS[self.style.marker],
            "markersize": SIZE * LARGER.get(self.style.marker, 1.0),
            "fillstyle": FILLS[self.variant % len(FILLS)],
            "markerfacecolor": "white" if is_open else colour,
            "markerfacecoloralt": "white",
            "markeredgecolor": colour if self.variant else "white",
            "markeredgewidth": 0.8 if self.variant else 0.4,
        }


def _marks(lines: Sequence[Line]) -> list[Mark]:
    """Variants of a method have its colour and marker too, so that they are seen to be of its family."""
    methods = [line.method for line in lines]
    variants = [methods[:at].count(method) for at, method in enumerate(methods)]
    styles = zip(colours.styles(methods), methods, variants, strict=True)
    return [Mark(Style(colours.of_method(method), style.dash, colours.marker_of(method)), k) for style, method, k in styles]


def _limits(ax: Axes, found: Leaderboard) -> None:
    """Of the means and a usual interval: a very wide one, as of two seeds, runs out of the panel instead of flattening all others."""
    scores = [100 * point.score for point in found.points]
    halves = [100 * point.half for point in found.points if np.isfinite(point.half)]
    spread = max(scores) - min(scores)
    room = max(0.06 * spread, min(float(np.median(halves)) if halves else 0.0, 0.25 * spread), 0.5)
    ax.set_ylim(min(scores) - room, max(scores) + room)
    within(ax, max(scores) / 100, positive=True)


def _families(found: Leaderboard) -> dict[str, tuple[str, ...]]:
    """The colours of each family that is in the figure."""
    families: dict[str, dict[str, None]] = {}
    for line in found.lines:
        families.setdefault(colours.family_of(line.method), {})[colours.of_method(line.method)] = None
    named = {name: tuple(families[name]) for name in colours.FAMILIES if name in families}
    return named | ({"other methods": tuple(families[""])} if "" in families else {})


def _legend(figure: Figure, found: Leaderboard, marks: Sequence[Mark], families: dict[str, tuple[str, ...]]) -> None:
    nothing = Line2D([], [], linestyle="none")
    handles: list[Any] = []
    for line, mark in zip(found.lines, marks, strict=True):
        dash: Any = DASHES[mark.style.dash] if len(line.points) > 1 or line.is_reference else "none"
        handles.append(Line2D([], [], linestyle=dash, linewidth=0.9, **mark.drawn()))
    names = shortened([_named(line) for line in found.lines], LONGEST)
    handles += [nothing, *(tuple(_square(colour) for colour in held) for held in families.values())]
    names += ["", *families]
    spaces: dict[str, Any] = {"handlelength": 3.0, "handletextpad": 0.6, "labelspacing": 0.28, "borderpad": 0}
    figure.legend(
        handles,
        names,
        loc="outside right upper",
        title="By best accuracy",
        alignment="left",
        title_fontsize=page.SMALL,
        fontsize=page.SMALL,
        frameon=False,
        labelcolor=page.INK,
        handler_map={tuple: HandlerTuple(ndivide=None, pad=0.3)},
        **spaces,
    )


def _square(colour: str) -> Line2D:
    return Line2D([], [], linestyle="none", marker="s", markersize=4.8, color=colour)


def _named(line: Line) -> str:
    ended = "" if all(point.finished for point in line.points) else " (unfinished)"
    dense = " (dense)" if line.is_reference else ""
    return f"{line.label}{dense}{f' {OWN}' if line.method in PERSONAL else ''}{ended}"


def _note(found: Leaderboard) -> str:
    parts = [f"{found.metric.about[0].upper()}{found.metric.about[1:]}", measures.note(point.seeds for point in found.points)]
    if found.personal:
        whose = (
            "this is the accuracy of the server's model"
            if found.metric.name.startswith("accuracy")
            else "in the other methods all have the server's"
        )
        parts.append(f"{OWN} clients have networks of their own; {whose}")
    if found.has_small and {"density", "max_client_flops_share"} & {cost.name for cost in found.costs}:
        parts.append("small dense: density and FLOPs as shares of the large network's")
    if any(_aside(found, at) for at in range(len(found.costs))):
        parts.append("points of one density stand side by side")
    if found.first_is_dearer:
        parts.append("FLOPs without round 0, the selection before training")
    return "; ".join(part for part in parts if part)
