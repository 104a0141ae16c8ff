"""The tables of a comparison as DataFrames: groups, paired differences, accuracy at equal cost, and the cost of a target."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from fedsim_analysis.comparison import pairs, statistics
from fedsim_analysis.comparison.grouping import Comparison, Group
from fedsim_analysis.comparison.metrics import named
from fedsim_analysis.comparison.outcomes import Outcome

DEFAULT = ("accuracy", "client_accuracy_min", "bytes", "train_flops", "max_client_memory")
UNMEASURED = "a run has no such number"
Numbers = Mapping[int, float]  # seed -> number


def groups(comparison: Comparison, metrics: Sequence[str] = DEFAULT) -> pd.DataFrame:
    """A row per metric and group.

    The fields that tell the groups apart, by dotted names; `group` its label, `data`; `metric`; `runs` and `unfinished`, `seeds` that
    have the number, and over them `mean`, `mean_95` half its 95 % interval (NaN for one seed), `least`, `most`.
    """
    rows = []
    for name in metrics:
        metric = named(name)
        for group in comparison.groups:
            rows.append(about(comparison, group) | {"metric": name} | spread({run.seed: metric.of(run) for run in group.runs}))
    return frame(rows)


def paired(comparison: Comparison, metrics: Sequence[str] = DEFAULT, baseline: str | None = None) -> pd.DataFrame:
    """A row per metric and group: the differences from the baseline over pairs of runs with common random numbers (`pairs`).

    The fields, `group`, `data`, `metric` as in `groups`; `baseline` the label of the group it is held against, itself for a baseline;
    `pairs`; `difference` their mean, `difference_95` half its 95 % interval; `p` of Wilcoxon's signed-rank test, and `p_holm`, corrected
    over all groups with the same baseline; `why_not` what keeps runs from being pairs.
    """
    rows, held = [], families(comparison, baseline)
    for name in metrics:
        metric = named(name)
        numbers = {group: {run.seed: metric.of(run) for run in group.runs} for group in comparison.groups}
        found = differences(held, numbers)
        rows += [about(comparison, group) | {"metric": name} | found[group] for group in comparison.groups]
    return frame(rows)


def about(comparison: Comparison, group: Group) -> dict[str, Any]:
    return comparison.settings(group) | {"group": group.label, "data": group.data, "runs": len(group.runs), "unfinished": group.unfinished}


def frame(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """With objects where rows have other kinds of values, so that 10 stays 10 beside None."""
    return pd.DataFrame({name: _series([row[name] for row in rows]) for name in (rows[0] if rows else ())})


def _series(values: list[Any]) -> pd.Series[Any]:
    same = len({type(value) for value in values}) == 1
    return pd.Series(values, dtype=None if same and not isinstance(values[0], list) else object)


def spread(numbers: Numbers) -> dict[str, Any]:
    """Mean, interval, least and most over the seeds that have the number."""
    values = [value for value in numbers.values() if not np.isnan(value)]
    least, most = (min(values), max(values)) if values else (np.nan, np.nan)
    half = statistics.half_interval(values)
    return {"seeds": len(values), "mean": statistics.mean(values), "mean_95": half, "least": least, "most": most}


@dataclass(frozen=True)
class Held:
    """A group, and what it is held against."""

    group: Group
    baseline: Group
    pairs: list[tuple[Outcome, Outcome]]  # of runs; none of the baseline itself
    why: str  # there are no more


def families(comparison: Comparison, wanted: str | None) -> list[list[Held]]:
    """The groups that have the same baseline, itself among them; in each block, by the first of its groups."""
    found: dict[Group, list[Held]] = {}
    meant = pairs.wanted(comparison.groups, comparison.shown, wanted) if wanted else []
    for block in comparison.blocks.values():
        for group, baseline in zip(block, pairs.baselines(block, [group for group in meant if group in block]), strict=True):
            matched, why = ([], "") if group is baseline else pairs.matched(group, baseline)
            found.setdefault(baseline, []).append(Held(group, baseline, matched, why))
    return list(found.values())


def differences(held: Sequence[Sequence[Held]], numbers: Mapping[Group, Numbers]) -> dict[Group, dict[str, Any]]:
    """Of each group, by seed its number, from its baseline; NaN for the baseline itself."""
    found: dict[Group, dict[str, Any]] = {}
    for family in held:
        for one in family:
            mine, its = numbers[one.group], numbers[one.baseline]
            both = [(mine[run.seed], its[run.seed]) for run, _ in one.pairs if not np.isnan(mine[run.seed] + its[run.seed])]
            why = one.why or ("" if len(both) == len(one.pairs) else UNMEASURED)
            found[one.group] = _row(one.baseline.label, [a for a, _ in both], [b for _, b in both], why)
        rows = [found[one.group] for one in family]
        for row, p in zip(rows, statistics.holm([row["p"] for row in rows]), strict=True):
            row["p_holm"] = p
    return found


def _row(baseline: str, ones: list[float], others: list[float], why: str) -> dict[str, Any]:
    found = np.array(ones) - np.array(others)
    mean, half, p = statistics.mean(found), statistics.half_interval(found), statistics.signed_rank(ones, others)
    return {
        "baseline": baseline,
        "pairs": len(found),
        "difference": mean,
        "difference_95": half,
        "p": p,
        "p_holm": np.nan,
        "why_not": why,
    }
