"""Where the time of a round goes: seconds of each phase."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fedsim_analysis.measures.groups import groups
from fedsim_analysis.measures.intervals import mean_and_half
from fedsim_analysis.measures.nodes import Lacking, Numbers, column, node, round_numbers

if TYPE_CHECKING:
    from fedsim_analysis.measures.nodes import Runs

ORDER = ("broadcast", "compute", "reduce", "server", "evaluate", "record")


@dataclass(frozen=True)
class Phases:
    """Seconds of each phase, mean over the runs of a group."""

    label: str
    method: str
    phases: tuple[str, ...]  # in the order in which a round has them
    rounds: NDArray[np.int64]  # (rounds,)
    seconds: Numbers  # (phases, rounds); NaN where not measured
    total: Numbers  # (phases,) of all rounds of a run
    n: int  # runs that have measured phases


def phases(runs: Runs) -> list[Phases]:
    """For each group. On several ranks `record` runs beside the next round, so the sum of the phases may be more than the wall time.

    Lacking where no run has measured a phase.
    """
    there = [str(name) for name in node(runs, "timing").data_vars]
    names = tuple([name for name in ORDER if name in there] + sorted(set(there) - set(ORDER)))
    if not names:
        raise Lacking("no run has measured the phases of its rounds")
    held = np.stack([column(runs, "timing", name) for name in names], axis=1)  # (run, phase, round)
    numbers = round_numbers(runs, "timing")
    found = []
    for group in groups(runs, "timing"):
        own = held[list(group.places)]
        there_too = np.isfinite(own).any(axis=(0, 1))
        if there_too.any():
            mean = mean_and_half(own)[0][:, there_too]
            timed = np.isfinite(own).any(axis=(1, 2))
            total = np.nansum(own[timed], axis=2).mean(axis=0)
            found.append(Phases(group.label, group.method, names, numbers[there_too], mean, total, int(timed.sum())))
    if not found:
        raise Lacking("no run has measured the phases of its rounds")
    return found
