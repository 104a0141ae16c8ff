"""A metric over rounds, or over what had been sent, computed, held or waited until then: mean and 95 % interval of each group."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fedsim_analysis.measures.colours import Style
from fedsim_analysis.measures.groups import groups
from fedsim_analysis.measures.intervals import mean_and_half
from fedsim_analysis.measures.metrics import METRICS, Metric, each_round, measured, metric_of
from fedsim_analysis.measures.nodes import Lacking, Numbers, node, round_numbers

if TYPE_CHECKING:
    from fedsim_analysis.measures.nodes import Runs

ROUND = Metric("round", (), "Round", "1")
OVER = ("round", "bytes", "flops", "memory", "seconds", "clock", "energy")


@dataclass(frozen=True)
class Curve:
    """A line of a figure, a point for each round that a run of the group has measured: arrays of (points,)."""

    label: str  # plain text of a file: escape it where markup could be read
    method: str
    rounds: NDArray[np.int64]
    x: Numbers  # in x_units, mean over the runs that have this point
    mean: Numbers  # in units
    low: Numbers  # of the 95 % interval of the mean; NaN where fewer than two runs have this point
    high: Numbers
    n: NDArray[np.int64]  # runs that have this point
    runs: tuple[str, ...]
    x_label: str
    x_units: str
    y_label: str
    units: str
    share: bool  # whether the values are shares, to be shown in percent
    finished: bool  # whether all runs have ended
    style: Style


def curves(runs: Runs, metric: str, over: str = "round", per_round: bool = False) -> list[Curve]:
    """A curve for each group that has measured the metric, in the order of the groups.

    metric: one of METRICS, or a column of the node `rounds`. Bytes, FLOPs and seconds are added over the rounds until then and
    over all clients, and memory is the largest until then; with `per_round` they are of each round alone.
    over: one of OVER, added in the same way; clock and energy are those of emulated devices. Runs of a group have sent different numbers of
    bytes after a round; each point stands at the mean of x over the runs that have measured the metric in this round.
    Lacking (a ValueError) where the runs have not what is needed.
    """
    shown = metric_of(runs, metric)
    shown = each_round(shown) if per_round else shown
    y = measured(runs, shown)
    x, axis = x_of(runs, over)
    found = []
    for group in groups(runs):
        held = list(group.places)
        there = np.isfinite(x[held]) & np.isfinite(y[held])
        mean, half, count = mean_and_half(np.where(there, y[held], np.nan))
        at = mean_and_half(np.where(there, x[held], np.nan))[0]
        points = count > 0
        if points.any():
            mean, half = mean[points], half[points]
            numbers = round_numbers(runs, "rounds")[points]
            line = (numbers, at[points], mean, mean - half, mean + half, count[points])
            titles = (axis.title, axis.units, shown.title, shown.units)
            found.append(Curve(group.label, group.method, *line, group.runs, *titles, shown.share, group.finished, group.style))
    if not found:
        raise Lacking(f"no run has measured {metric}" + (f" in a round in which {over} is known" if over != "round" else ""))
    return found


def x_of(runs: Runs, over: str) -> tuple[Numbers, Metric]:
    """(runs, rounds) where the points of each run stand, and what the axis shows."""
    if over not in OVER:
        raise Lacking(f"there is no axis {over!r}; there are {', '.join(OVER)}")
    if over == "round":
        numbers = round_numbers(runs, "rounds").astype(np.float64)
        return np.broadcast_to(numbers, (node(runs, "rounds").sizes["run"], len(numbers))), ROUND
    return measured(runs, METRICS[over]), METRICS[over]


def note(counts: Iterable[int]) -> str:
    """What mean and interval are of, for a legend or a caption; empty where every point is of one run."""
    seeds = seeds_of(counts)
    return f"mean and 95 % interval of {seeds}" if seeds else ""


def seeds_of(counts: Iterable[int]) -> str:
    """Of how many runs means are: "3 seeds", "1 to 3 seeds"; empty where each is of one run."""
    held = [int(count) for count in counts]
    least, most = min(held, default=0), max(held, default=0)
    return "" if most < 2 else f"{most if least == most else f'{least} to {most}'} seeds"


def note_of(found: Iterable[Curve]) -> str:
    return note(count for curve in found for count in curve.n)
