"""Paired differences: of runs that share their random numbers, so that what both share takes no part in the interval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fedsim_analysis.comparison import grouping, jobs, outcomes, pairs
from fedsim_analysis.measures.colours import Style
from fedsim_analysis.measures.groups import Group, group_of, groups
from fedsim_analysis.measures.intervals import mean_and_half
from fedsim_analysis.measures.metrics import final, metric_of
from fedsim_analysis.measures.nodes import Lacking, Numbers, along_runs

if TYPE_CHECKING:
    from fedsim_analysis.measures.nodes import Runs


@dataclass(frozen=True)
class Difference:
    """`label` minus `against`, of the last measured values of pairs of runs."""

    label: str
    method: str
    against: str
    seeds: tuple[Any, ...]
    values: Numbers  # (pairs,)
    mean: float
    low: float  # of the 95 % interval of the mean; NaN where there are fewer than two pairs
    high: float
    title: str
    units: str
    style: Style
    share: bool  # a difference of shares is shown in percentage points
    unpaired: str  # why runs of the group have no pair; "" where each has one


def differences(runs: Runs, metric: str = "accuracy", against: str | None = None) -> list[Difference]:
    """Of each group, its difference from the group labelled `against`; by default from the dense method, else from the first group.

    Groups on other data are not held against each other: each data set has its own baseline, and `against` is that of its own data.
    Which runs are pairs: `comparison.pairs`, which looks into the files. A group without a pair is left out. Lacking where no group has
    one, and why.
    """
    shown = metric_of(runs, metric)
    values, paths, every = final(runs, shown), along_runs(runs, "rounds", "path"), groups(runs)
    if paths is None or len(every) < 2:
        raise Lacking("the runs do not say from which files they are" if paths is None else "there is one group alone, and no pair")
    held = outcomes.read(paths, ())
    places = {run.path: i for i, run in enumerate(held)}
    compared = [_as_compared(group, held) for group in every]
    meant = () if against is None else (compared[every.index(group_of(runs, "rounds", against))],)
    found, why = [], dict[str, None]()
    for group, own, other in zip(every, compared, _baselines(compared, meant), strict=True):
        matched, unpaired = ([], "") if own is other else pairs.matched(own, other)
        of = [(one.seed, places[one.path], places[rival.path]) for one, rival in matched]
        differ = [(seed, values[i] - values[j]) for seed, i, j in of if np.isfinite(values[i] - values[j])]
        why[f"{group.label}: {unpaired}"] = None
        if differ:
            each = np.array([value for _, value in differ])
            mean, half = (float(one) for one in mean_and_half(each)[:2])
            interval = (mean, mean - half, mean + half, shown.title, shown.units, group.style, shown.share, unpaired)
            found.append(Difference(group.label, group.method, other.label, tuple(seed for seed, _ in differ), each, *interval))
    if not found:
        raise Lacking(f"no two runs of different groups are a pair ({'; '.join(text for text in why if not text.endswith(': '))})")
    return found


def _as_compared(group: Group, held: list[outcomes.Outcome]) -> grouping.Group:
    """The group as `comparison` has it."""
    own = tuple(sorted((held[i] for i in group.places), key=lambda run: run.seed))
    return grouping.Group(jobs.computed(own[0].job), own, group.label, repr(sorted(jobs.data(own[0].job).items())))


def _baselines(compared: Sequence[grouping.Group], meant: Sequence[grouping.Group]) -> list[grouping.Group]:
    """What each group is held against, in their order: one of its own data."""
    found: dict[grouping.Group, grouping.Group] = {}
    for data in dict.fromkeys(group.data for group in compared):
        block = [group for group in compared if group.data == data]
        found |= dict(zip(block, pairs.baselines(block, [group for group in meant if group in block]), strict=True))
    return [found[group] for group in compared]
