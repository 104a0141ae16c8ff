"""The first section: which job is best, what each costs, and what has not ended; and a table of all jobs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from fedsim_analysis import comparison
from fedsim_analysis.comparison.overview import LEGEND
from fedsim_analysis.measures import readable
from fedsim_analysis.report.contents import Card, Cards, Section, Table
from fedsim_analysis.report.origins import rounds

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr
    from numpy.typing import NDArray

COSTS = {  # metric of the comparison -> unit, heading where it is the least of several jobs, heading where there is one job
    "bytes": ("B", "Fewest bytes", "Sent"),
    "train_flops": ("FLOP", "Fewest training FLOPs", "Training FLOPs"),
    "max_client_memory": ("B", "Least memory", "Memory of the largest client"),
}
MOST_NAMED = 5  # runs that are named in a line


def section(tree: xr.DataTree, found: comparison.Comparison) -> Section:
    table = comparison.groups(found, ["accuracy", *COSTS])
    ended = table["unfinished"] == 0
    table = table[ended] if ended.any() else table  # a run that has just begun is cheap
    of_metric = {str(name): rows.reset_index(drop=True) for name, rows in table.groupby("metric", sort=False)}
    cards = [_best(of_metric["accuracy"]), *(_least(of_metric[cost], of_metric["accuracy"], cost) for cost in COSTS), _state(tree)]
    return Section("summary", "Summary", [Cards([card for card in cards if card is not None]), _overview(found)])


def _best(accuracy: pd.DataFrame) -> Card:
    means = accuracy["mean"].to_numpy(float)
    if not np.isfinite(means).any():
        return Card("Accuracy", "not measured")
    row = accuracy.loc[int(np.nanargmax(means))]
    half = f" ± {100 * row['mean_95']:.1f}" if np.isfinite(row["mean_95"]) else ""
    seeds = f"mean and 95 % interval of {row['seeds']} seeds" if row["seeds"] > 1 else "one seed"
    title = "Highest accuracy" if len(accuracy) > 1 else "Accuracy"
    return Card(title, f"{100 * row['mean']:.1f}{half} %", f"{row['group']}; {seeds}")


def _least(costs: pd.DataFrame, accuracy: pd.DataFrame, cost: str) -> Card | None:
    """The job that costs least, beside the one of the highest accuracy."""
    unit, title, alone = COSTS[cost]
    values, scores = costs["mean"].to_numpy(float), accuracy["mean"].to_numpy(float)
    if not np.isfinite(values).any():
        return None
    if len(costs) == 1:
        return Card(alone, readable(float(values[0]), unit), {"max_client_memory": "by the ledger"}.get(cost, "all clients, all rounds"))
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
    late, count = unfinished(tree), tree.sizes["run"]
    if not late:
        return Card("Finished", f"{count} of {count} runs" if count > 1 else "yes")
    return Card("Not finished", f"{len(late)} of {count} runs" if count > 1 else "not yet", _named(late), warns=True)


def unfinished(tree: xr.DataTree) -> list[str]:
    """The runs that have not ended, and how far they are."""
    root = tree.to_dataset()
    rows = zip(*(root[name].values.tolist() for name in ("run", "finished", "rounds_done", "rounds_planned")), strict=True)
    return [f"{run} (round {rounds(done, planned)})" for run, finished, done, planned in rows if not finished]


def warning(tree: xr.DataTree) -> str:
    """One line about runs that have not ended; empty where all have."""
    late, count = unfinished(tree), tree.sizes["run"]
    if not late:
        return ""
    have = "The run has not ended" if count == 1 else f"{len(late)} of {count} runs {'has' if len(late) == 1 else 'have'} not ended"
    return f"{have}: {_named(late)}. What follows is of the rounds that were done."


def _named(late: Sequence[str]) -> str:
    return ", ".join(late[:MOST_NAMED]) + (f" and {len(late) - MOST_NAMED} more" if len(late) > MOST_NAMED else "")


def _overview(found: comparison.Comparison) -> Table:
    shown = comparison.readable(comparison.overview(found))
    columns = [str(name) for name in shown.columns]
    rows = [[str(value) for value in row] for row in shown.itertuples(index=False)]
    note = " ".join(LEGEND.format(first="", personal="").split())
    caption = "A row for each job: means over its seeds, ± half the 95 % interval of the mean."
    return Table("overview", caption, columns, rows, columns[columns.index("seeds") :], [f"{note[0].upper()}{note[1:]}"])
