"""The first section: which job is best, what each costs, and what has not ended; and a table of all jobs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from fedsim_analysis import comparison
from fedsim_analysis.comparison.overview import FIRST, LEGEND, PERSONAL
from fedsim_analysis.measures import readable
from fedsim_analysis.report import states
from fedsim_analysis.report.contents import Card, Cards, Section, Table

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr
    from numpy.typing import NDArray

COSTS = {  # metric of the comparison -> unit, heading where it is the least of several jobs, heading where there is one job
    "bytes": ("B", "Fewest bytes", "Sent"),
    "train_flops": ("FLOP", "Fewest training FLOPs", "Training FLOPs"),
    "max_client_memory": ("B", "Least memory", "Memory of the largest client"),
}
REMARKS = (("first", "with round 0", FIRST), ("personal", "their FLOPs", PERSONAL))
MOST_FIELDS = 4  # of the jobs, in the table of all jobs
MOST_NAMED = 5  # runs that are named in a line


def section(tree: xr.DataTree, found: comparison.Comparison, names: Mapping[str, str]) -> Section:
    """names: label of a group of the comparison -> label of its curves."""
    table = comparison.groups(found, ["accuracy", *COSTS])
    table["group"] = [names.get(label, label) for label in table["group"]]
    ended = table["unfinished"] == 0
    table = table[ended] if ended.any() else table  # a run that has just begun is cheap
    of_metric = {str(name): rows.reset_index(drop=True) for name, rows in table.groupby("metric", sort=False)}
    cards = [_best(of_metric["accuracy"]), *(_least(of_metric[cost], of_metric["accuracy"], cost) for cost in COSTS), _state(tree)]
    return Section("summary", "Summary", [Cards([card for card in cards if card is not None]), _overview(found, names)])


def _best(accuracy: pd.DataFrame) -> Card:
    means = accuracy["mean"].to_numpy(float)
    if not np.isfinite(means).any():
        return Card("Accuracy", "not measured")
    row = accuracy.loc[int(np.nanargmax(means))]
    half = f" ±\u00a0{100 * row['mean_95']:.1f}" if np.isfinite(row["mean_95"]) else ""
    seeds = f"mean and 95 % interval of {row['seeds']} seeds" if row["seeds"] > 1 else "one seed"
    title = "Highest accuracy" if len(accuracy) > 1 else "Accuracy"
    return Card(title, f"{100 * row['mean']:.1f}{half}\u00a0%", f"{row['group']}; {seeds}")


def _least(costs: pd.DataFrame, accuracy: pd.DataFrame, cost: str) -> Card | None:
    """The job that costs least, beside the one of the highest accuracy."""
    unit, title, alone = COSTS[cost]
    values, scores = costs["mean"].to_numpy(float), accuracy["mean"].to_numpy(float)
    if not np.isfinite(values).any():
        return None
    if len(costs) == 1:
        return Card(
            alone, readable(float(values[0]), unit), {"max_client_memory": "as fedsim counts it"}.get(cost, "all clients, all rounds")
        )
    equal = np.flatnonzero(values == np.nanmin(values))
    least = int(equal[np.argmax(np.nan_to_num(scores[equal], nan=-1.0))])
    return Card(title, readable(float(values[least]), unit), f"{costs['group'][least]}{_beside(values, scores, costs['group'], least)}")


def _beside(values: NDArray[np.float64], scores: NDArray[np.float64], names: pd.Series[str], least: int) -> str:
    if not np.isfinite(scores).any() or (best := int(np.nanargmax(scores))) == least or not values[best] > 0:
        return ""
    points = 100 * (scores[best] - scores[least])
    less = f", for {points:.1f} points less accuracy" if np.isfinite(points) else ""
    return f": {100 * values[least] / values[best]:.3g} % of {names[best]}{less}"


def _state(tree: xr.DataTree) -> Card:
    count, late, lost = tree.sizes["run"], unfinished(tree), states.missing(tree)
    if not late and not lost:
        return Card("Finished", f"{count} of {count} runs" if count > 1 else "yes")
    if count == 1 and not lost:
        return Card("Not finished", late[0].name, f"round {late[0].rounds}", warns=True)
    kinds = Counter([*(state.name for state in late), *[states.FAILED] * len(lost)])
    text = ", ".join(f"{number} {name}" for name, number in kinds.items())
    return Card("Not finished", f"{len(late) + len(lost)} of {count + len(lost)} runs", text, warns=True)


def unfinished(tree: xr.DataTree) -> list[states.State]:
    return [state for state in states.states(tree) if state.name != states.FINISHED]


def warning(tree: xr.DataTree) -> str:
    """One line about runs that have not ended; empty where all have."""
    late, lost, count = unfinished(tree), states.missing(tree), tree.sizes["run"]
    number, named = len(late) + len(lost), [*map(str, late), *lost]
    if not number:
        return ""
    have = (
        "The run has not ended"
        if count + len(lost) == 1
        else f"{number} of {count + len(lost)} runs {'has' if number == 1 else 'have'} not ended"
    )
    more = f" and {number - MOST_NAMED} more" if number > MOST_NAMED else ""
    return f"{have}: {', '.join(named[:MOST_NAMED])}{more}. What follows is of the rounds that were done."


def _overview(found: comparison.Comparison, names: Mapping[str, str]) -> Table:
    """With the fields of the jobs where they are few; else the labels of the curves stand for them."""
    shown = comparison.readable(comparison.overview(found))
    columns = [str(name) for name in shown.columns]
    first = columns.index("seeds")
    rows = [[str(value) for value in row] for row in shown.itertuples(index=False)]
    numeric, note = columns[first:], LEGEND.format(**{name: text if title in columns else "" for name, title, text in REMARKS})
    if first > MOST_FIELDS:
        columns = ["job", *numeric]
        rows = [[names.get(group.label, group.label), *row[first:]] for group, row in zip(found.groups, rows, strict=True)]
    caption = "A row for each job: means over its seeds, ± half the 95 % interval of the mean."
    return Table("overview", caption, columns, rows, numeric, [f"{note[0].upper()}{' '.join(note[1:].split())}"])
