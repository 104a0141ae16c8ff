"""Curves: a metric over rounds, or over what had been sent, computed, held or waited until then."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from fedsim_analysis import measures
from fedsim_analysis.measures import Curve, colours
from fedsim_analysis.measures.nodes import Lacking
from fedsim_analysis.plots import page
from fedsim_analysis.plots.legends import legend

if TYPE_CHECKING:
    from fedsim_analysis.measures.nodes import Runs

DASHES: dict[str, Any] = {"solid": "-", "dash": (0, (4, 1.5)), "dot": (0, (1, 1.1)), "dashdot": (0, (4, 1.2, 1, 1.2))}
MARKERS = dict(zip(colours.MARKERS, ("o", "s", "^", "D", "v", "p", "P", "<", "X", "h", "*", ">", "d"), strict=True))
BAND, FAINT, CROWD = 0.16, 0.07, 5  # opacity of intervals, where there are many groups, and how many are many
FEW, MANY = 25, 200  # points that all have a marker; that have a thinner line
WIDE = 5.0  # times, by which ends of curves may differ before the axis becomes logarithmic


def accuracy(runs: Runs, over: str = "round", ax: Axes | None = None, width: str | float = "column") -> Axes:
    """Accuracy of the server's model on the global test set, over rounds, or one of `measures.OVER`."""
    return curve(runs, "accuracy", over, ax, width)


def loss(runs: Runs, over: str = "round", ax: Axes | None = None, width: str | float = "column") -> Axes:
    """Loss of the server's model on the global test set."""
    return curve(runs, "loss", over, ax, width)


def train_loss(runs: Runs, over: str = "round", ax: Axes | None = None, width: str | float = "column") -> Axes:
    """Mean loss over the local steps of the cohort."""
    return curve(runs, "train_loss", over, ax, width)


def density(runs: Runs, over: str = "round", ax: Axes | None = None, width: str | float = "column") -> Axes:
    """Kept weights over those of the original network."""
    return curve(runs, "density", over, ax, width)


def bytes(runs: Runs, over: str = "round", ax: Axes | None = None, width: str | float = "column", per_round: bool = False) -> Axes:
    """Bytes up and down of all clients, of all rounds until then or of each round alone."""
    return curve(runs, "bytes", over, ax, width, per_round)


def flops(runs: Runs, over: str = "round", ax: Axes | None = None, width: str | float = "column", per_round: bool = False) -> Axes:
    """FLOPs of training of all clients, of all rounds until then or of each round alone."""
    return curve(runs, "flops", over, ax, width, per_round)


def memory(runs: Runs, over: str = "round", ax: Axes | None = None, width: str | float = "column", per_round: bool = True) -> Axes:
    """Training memory of the client that needs most, of each round alone or the largest until then."""
    return curve(runs, "memory", over, ax, width, per_round)


def seconds(runs: Runs, over: str = "round", ax: Axes | None = None, width: str | float = "column", per_round: bool = False) -> Axes:
    """Wall time, of all rounds until then or of each round alone."""
    return curve(runs, "seconds", over, ax, width, per_round)


def worst_client(runs: Runs, over: str = "round", ax: Axes | None = None, width: str | float = "column") -> Axes:
    """Accuracy of the client that is worst in each round, on its own test images."""
    return curve(runs, "worst_client", over, ax, width)


def mask_churn(runs: Runs, ax: Axes | None = None, width: str | float = "column") -> Axes:
    """Weights that came to the masks or left them in a round, over the weights kept; rounds in which no mask changed are left out."""
    found = [part(one, one.mean > 0) for one in measures.churn(runs)]
    if not any(len(one.x) for one in found):
        raise Lacking("no mask has changed in any round")
    return draw([one for one in found if len(one.x)], ax, width, zero=True)


def curve(
    runs: Runs, metric: str, over: str = "round", ax: Axes | None = None, width: str | float = "column", per_round: bool = False
) -> Axes:
    """Any metric of `measures.METRICS`, or a column of the node `rounds`: a line for each group of runs that differ in the seed alone.

    The band is the 95 % interval of the mean over seeds. `over` and `per_round`: as in `measures.curves`. The x-axis is
    logarithmic where one group has spent five times as much as another.
    """
    found = measures.curves(runs, metric, over, per_round)
    return draw(found, ax, width, zero=found[0].units in ("B", "FLOP", "s") and not per_round)


def draw(found: Sequence[Curve], ax: Axes | None = None, width: str | float = "column", zero: bool = False) -> Axes:
    """Curves in the one style, with a legend above. zero: whether the y-axis begins at 0."""
    with page.style():
        ax = page.axes(ax, width)
        first = found[0]
        x = measures.scale_of(np.concatenate([one.x for one in found]), first.x_units)
        y = measures.scale_of(np.concatenate([one.mean for one in found]), first.units, first.share)
        ends = [float(one.x[-1]) for one in found]
        if first.x_units == "1":
            ax.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10], integer=True))
            if len({float(at) for one in found for at in one.x}) == 1:
                ax.set_xlim(ends[0] - 1, ends[0] + 1)
        elif is_wide(ends):
            logarithmic(ax, [value * x.factor for one in found for value in one.x])
            found = [part(one, one.x > 0) for one in found]
        handles = [_line(ax, one, x.factor, y.factor, opacity(found)) for one in found]
        page.name(ax, x.axis(first.x_label), y.axis(first.y_label))
        means = np.concatenate([one.mean for one in found])
        within(ax, float(means.max()) if first.share else np.inf, zero or float(means.min()) >= 0, zero)
        if len(found) > 1 or measures.note_of(found):
            legend(ax, handles, [labelled(one) for one in found], measures.note_of(found))
    return ax


def labelled(one: Any) -> str:
    """The label of a curve or a point, and whether its runs have not ended."""
    return one.label if one.finished else f"{one.label} (unfinished)"


def part(one: Curve, there: Any) -> Curve:
    """The points of a curve that are `there`."""
    return Curve(**(vars(one) | {name: getattr(one, name)[there] for name in ("rounds", "x", "mean", "low", "high", "n")}))


def spaced(points: int) -> int:
    """Every which of the points has a marker."""
    return max(1, -(-points // FEW))


def opacity(found: Sequence[Any]) -> float:
    """Of bands, so that lines are seen through as many as there are groups."""
    return BAND if len(found) < CROWD else FAINT


def _line(ax: Axes, one: Curve, x: float, y: float, band: float) -> Line2D:
    colour, marker = one.style.colour, MARKERS[one.style.marker]
    more: dict[str, Any] = {"linestyle": DASHES[one.style.dash], "linewidth": 1.2 if len(one.x) < MANY else 0.8}
    more |= {"marker": marker, "markevery": spaced(len(one.x)), "markeredgecolor": "white", "markeredgewidth": 0.4}
    (line,) = ax.plot(one.x * x, one.mean * y, color=colour, **more)
    there = np.isfinite(one.low)
    if there.sum() > 1:
        ax.fill_between(one.x * x, one.low * y, one.high * y, color=colour, alpha=band, linewidth=0)
    elif there.any():
        at, mean = one.x[there] * x, one.mean[there] * y
        ax.errorbar(at, mean, yerr=(one.high - one.mean)[there] * y, color=colour, capsize=1.5, linewidth=0.8, fmt="none")
    return line


def is_wide(values: Sequence[float]) -> bool:
    """Whether the values differ so much that an axis shows them better by their logarithms."""
    return min(values) > 0 and max(values) >= WIDE * min(values)


def logarithmic(ax: Axes, values: Sequence[float]) -> None:
    """A logarithmic x-axis with plain numbers, for values of which only those above 0 are shown."""
    above = [value for value in values if value > 0]
    subs = (1.0,) if max(above) / min(above) > 300 else (1.0, 2.0, 5.0)
    ax.set_xscale("log")
    ax.xaxis.set_major_locator(LogLocator(subs=subs))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.xaxis.set_minor_formatter(NullFormatter())


def within(ax: Axes, most: float, positive: bool, zero: bool = False) -> None:
    """The y-axis, where intervals may reach beyond what is possible: not above 100 %, if no mean is, not below 0.

    most: the largest mean of shares, which may be above 1, as weights that changed over weights kept; infinite where there are no shares.
    """
    if most <= 1 and ax.get_ylim()[1] > 100:
        ax.set_ylim(top=101.5)
    if zero or (positive and ax.get_ylim()[0] < 0):
        ax.set_ylim(bottom=0)
