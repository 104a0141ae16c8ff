"""Runs side by side: `compare`, and the tables behind `fedsim compare` as DataFrames.

    from fedsim_analysis import comparison

    found = comparison.collect(["runs/a.h5", "runs/b.h5"])   # reads each file once; a list of files
    comparison.overview(found)         # a row per group: seeds, and mean and half the 95 % interval of what it gave and cost
    comparison.groups(found, ["accuracy", "bytes"])  # a row per metric and group: mean, mean_95, least, most
    comparison.paired(found, ["accuracy"])  # a row per metric and group: pairs, difference, difference_95, p, p_holm
    comparison.at_equal(found)         # a row per resource (bytes, flops, memory) and group: accuracy at the same cost
    comparison.to_target(found)        # a row per group: how many seeds reached the target, in which rounds, bytes and FLOPs

Each row begins with the fields that tell the groups apart under their dotted names (`found.shown`), then `group` (its label), `data`
(groups with other data are never held against each other), `runs` and `unfinished`. A group is all runs that differ in the
seed, and at most in how they were computed ([execution] and the like).
Shares are between 0 and 1, bytes in B, FLOPs in FLOP, NaN where nothing was measured; a name with _95 is half a 95 % interval by
Student's t over seeds, NaN for one seed. Metrics are those of `metrics.METRICS`, or any column of /rounds, as in "train_loss:min"; give
columns that are not in METRICS to `collect(…, metrics=[…])` too. Their headings and units: `metrics.named(name).title`, `.unit`.

Which runs are pairs, and the baseline: `pairs`. Budgets and targets, and what they are by default: `budgets`.
"""

from fedsim_analysis.comparison.budgets import at_equal, to_target
from fedsim_analysis.comparison.grouping import Comparison, Group, collect
from fedsim_analysis.comparison.overview import LEGEND, compare, overview, readable, tell
from fedsim_analysis.comparison.statistics import half_interval
from fedsim_analysis.comparison.tables import groups, paired

__all__ = [
    "LEGEND",
    "Comparison",
    "Group",
    "at_equal",
    "collect",
    "compare",
    "groups",
    "half_interval",
    "overview",
    "paired",
    "readable",
    "tell",
    "to_target",
]
