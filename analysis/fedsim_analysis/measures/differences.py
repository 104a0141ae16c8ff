"""Paired differences: of runs with one seed in two groups, so that what both share takes no part in the interval."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fedsim_analysis.measures.colours import Style
from fedsim_analysis.measures.groups import Group, groups
from fedsim_analysis.measures.intervals import mean_and_half
from fedsim_analysis.measures.metrics import final, metric_of
from fedsim_analysis.measures.nodes import Lacking, Numbers

if TYPE_CHECKING:
    from fedsim_analysis.measures.nodes import Runs


@dataclass(frozen=True)
class Difference:
    """`label` minus `against`, of the last measured values of pairs of runs with one seed."""

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


def differences(runs: Runs, metric: str = "accuracy", against: str | None = None) -> list[Difference]:
    """Of each group, its difference from the group labelled `against`: by default fedavg's, else the first.

    Lacking where there is one group alone, or no seed that two groups share.
    """
    shown, values = metric_of(runs, metric), final(runs, metric_of(runs, metric))
    every = groups(runs)
    other = _against(every, against)
    found = []
    for group in every:
        if group is other:
            continue
        pairs = [(seed, i, j) for seed, i in zip(group.seeds, group.places, strict=True) if (j := _with_seed(other, seed)) is not None]
        held = [(seed, values[i] - values[j]) for seed, i, j in pairs if np.isfinite(values[i] - values[j])]
        if held:
            each = np.array([value for _, value in held])
            mean, half, _ = mean_and_half(each)
            about = (float(mean), float(mean - half), float(mean + half), shown.title, shown.units, group.style, shown.share)
            found.append(Difference(group.label, group.method, other.label, tuple(seed for seed, _ in held), each, *about))
    if not found:
        raise Lacking(f"no group has a seed in common with {other.label}" if len(every) > 1 else "there is one group alone, and no pair")
    return found


def _against(every: list[Group], label: str | None) -> Group:
    if label is None:
        return next((group for group in every if group.method == "fedavg"), every[0])
    for group in every:
        if group.label == label:
            return group
    raise Lacking(f"there is no group {label!r}; the groups are {'; '.join(group.label for group in every)}")


def _with_seed(group: Group, seed: Any) -> int | None:
    return next((i for own, i in zip(group.seeds, group.places, strict=True) if own == seed), None)
