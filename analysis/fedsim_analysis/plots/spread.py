"""How a round is spread: accuracy over clients, seconds over phases."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from fedsim_analysis import measures
from fedsim_analysis.measures import Distribution, Phases, colours
from fedsim_analysis.plots import page
from fedsim_analysis.plots.legends import SHORT, legend
from fedsim_analysis.plots.lines import DASHES, MARKERS, opacity, spaced, within
from fedsim_analysis.plots.text import brief, shortened, width_of

if TYPE_CHECKING:
    from fedsim_analysis.measures.nodes import Runs

WORST, LOW, MIDDLE, HIGH = (measures.clients.LEVELS.index(level) for level in (0.0, 0.1, 0.5, 0.9))
BAR, LONGEST = 0.3, 26  # inches of a bar; signs of a label


def clients(runs: Runs, name: str = "accuracy", ax: Axes | None = None, width: str | float = "column") -> Axes:
    """The accuracy of clients on their own test images: median (line), 10th to 90th percentile (band), worst client (small marks)."""
    with page.style():
        found = measures.distribution(runs, name)
        ax = page.axes(ax, width)
        scale = measures.scale_of(np.concatenate([one.quantiles[-1] for one in found]), found[0].units, found[0].share)
        handles = [_spread(ax, one, scale.factor, opacity(found)) for one in found]
        page.name(ax, "Round", scale.axis(found[0].title))
        ax.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10], integer=True))
        within(ax, max(float(one.quantiles.max()) for one in found) if found[0].share else np.inf, positive=False)
        seeds = measures.seeds_of(count for one in found for count in one.n)
        note = "median (line), 10th to 90th percentile (band), worst client (dotted)"
        legend(ax, handles, [one.label for one in found], f"{note}; mean of {seeds}" if seeds else note)
    return ax


def _spread(ax: Axes, one: Distribution, factor: float, band: float) -> Line2D:
    values, colour = one.quantiles * factor, one.style.colour
    marked: dict[str, Any] = {"color": colour, "marker": MARKERS[one.style.marker], "markevery": spaced(len(one.rounds))}
    (line,) = ax.plot(one.rounds, values[MIDDLE], linestyle=DASHES[one.style.dash], markeredgecolor="white", markeredgewidth=0.4, **marked)
    ax.fill_between(one.rounds, values[LOW], values[HIGH], color=colour, alpha=band, linewidth=0)
    ax.plot(one.rounds, values[WORST], linestyle=(0, (1, 1.5)), linewidth=0.8, markersize=2, **marked)
    return line


def phases(
    runs: Runs, over: Literal["run", "round"] = "run", group: str | None = None, ax: Axes | None = None, width: str | float = "column"
) -> Axes:
    """Seconds of each phase, mean over seeds.

    over: "run", all rounds together: a bar for each group; "round": of each round, of one group, by default the first.
    """
    if over not in ("run", "round"):
        raise ValueError(f"over={over!r}; phases are over 'run' or 'round'")
    with page.style():
        found = measures.phases(runs)
        if over == "round":
            return _areas(ax, _of_group(found, group), width)
        ax = page.axes(ax, width, 0.75 + BAR * len(found))
        scale = measures.scale_of([one.total.sum() for one in found], "s")
        _bars(ax, found, scale.factor)
        names = shortened([one.label for one in found], SHORT)
        ax.set_yticks(range(len(found)), names)
        beside = max(width_of(name, page.SMALL) for name in names)
        page.name(ax, scale.axis("Time of all rounds"), "", beside)
        ax.set_ylim(len(found) - 0.45, -0.55)
        ax.grid(False, axis="y")
        ax.spines["left"].set_visible(False)
        ax.tick_params(axis="y", length=0)
        _legend(
            ax,
            [name for i, name in enumerate(found[0].phases) if any(one.total[i] > 0 for one in found)],
            measures.seeds_of(one.n for one in found),
            taken=beside,
        )
    return ax


def _of_group(found: list[Phases], group: str | None) -> Phases:
    for one in found:
        if group in (None, one.label):
            return one
    raise measures.Lacking(f"there is no group {group!r}; the groups are {'; '.join(one.label for one in found)}")


def _areas(ax: Axes | None, one: Phases, width: str | float) -> Axes:
    ax = page.axes(ax, width)
    seconds = np.nan_to_num(one.seconds)
    scale = measures.scale_of(seconds.sum(axis=0), "s")
    shown = [i for i in range(len(one.phases)) if seconds[i].any()]
    names = [one.phases[i] for i in shown]
    ax.stackplot(one.rounds, seconds[shown] * scale.factor, colors=[colours.of_phase(name) for name in names], linewidth=0, step="mid")
    ax.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10], integer=True))
    ax.set_xlim(one.rounds[0] - 0.5, one.rounds[-1] + 0.5)
    ax.set_ylim(bottom=0)
    page.name(ax, "Round", scale.axis("Time of a round"))
    _legend(ax, names, measures.seeds_of([one.n]), one.label)
    return ax


def _legend(ax: Axes, names: list[str], seeds: str, label: str = "", taken: float = 0.0) -> None:
    note = [brief(label, LONGEST), f"mean of {seeds}" if seeds else ""]
    legend(ax, [Patch(facecolor=colours.of_phase(name)) for name in names], names, ", ".join(filter(None, note)), taken)


def _bars(ax: Axes, found: list[Phases], factor: float) -> None:
    for row, one in enumerate(found):
        left = 0.0
        for name, seconds in zip(one.phases, one.total * factor, strict=True):
            ax.barh(row, seconds, left=left, height=0.62, color=colours.of_phase(name), edgecolor="white", linewidth=0.4)
            left += float(seconds)
