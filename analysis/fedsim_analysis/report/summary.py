"""The first section: which job is best, what each costs, and what has not ended; and a table of all jobs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from fedsim_analysis import comparison as overview
from fedsim_analysis.report.contents import Block, Card, Cards, Section, Table

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr

COSTS = {  # column of the overview -> the card's heading, the column in which it is readable
    "bytes": ("Fewest bytes", "sent"),
    "max_client_flops": ("Fewest training FLOPs", "training FLOPs"),
    "max_client_memory": ("Least memory", "memory"),
}
MOST_NAMED = 5  # runs that are named in a line


def section(tree: xr.DataTree, table: pd.DataFrame) -> Section:
    """`table`: what `compare` gives."""
    shown = overview.readable(table)
    names = labels(table, shown)
    cards = [
        _best(table, shown, names),
        *(card for cost in COSTS if (card := _cheapest(cost, table, shown, names)) is not None),
        _state(tree),
    ]
    blocks: list[Block] = [Cards(cards), _overview(shown, names)]
    return Section("summary", "Summary", blocks)


def labels(table: pd.DataFrame, shown: pd.DataFrame) -> list[str]:
    """What each row is called: "fedtiny, density 0.1"."""
    fields = list(shown.columns[: list(shown.columns).index("seeds")])
    found = []
    for _, row in shown.iterrows():
        found.append(", ".join(str(row[name]) if name == "method" else f"{name} {row[name]}" for name in fields if row[name] != "-"))
    return found


def _best(table: pd.DataFrame, shown: pd.DataFrame, names: Sequence[str]) -> Card:
    accuracy = table["accuracy"].to_numpy(float)
    if not np.isfinite(accuracy).any():
        return Card("Accuracy", "not measured yet")
    best = int(np.nanargmax(accuracy))
    title = "Highest accuracy" if len(table) > 1 else "Accuracy"
    return Card(title, shown["accuracy"].iloc[best], f"{names[best]}{_of_seeds(int(table['seeds'].iloc[best]))}")


def _of_seeds(seeds: int) -> str:
    return f"; mean and 95 % interval of {seeds} seeds" if seeds > 1 else "; one seed"


def _cheapest(cost: str, table: pd.DataFrame, shown: pd.DataFrame, names: Sequence[str]) -> Card | None:
    """The job that costs least, as a share of the job with the highest accuracy, and how much less accurate it is."""
    values, accuracy = table[cost].to_numpy(float), table["accuracy"].to_numpy(float)
    if not np.isfinite(values).any():
        return None
    title, column = COSTS[cost]
    least = int(np.nanargmin(values))
    if len(table) == 1:
        return Card(
            {"bytes": "Sent", "max_client_flops": "Training FLOPs"}.get(cost, "Memory of the largest client"), shown[column].iloc[0], ""
        )
    text = names[least]
    if np.isfinite(accuracy).any() and (best := int(np.nanargmax(accuracy))) != least and values[best] > 0:
        points = 100 * (accuracy[best] - accuracy[least])
        less = f", {points:.1f} points less accurate" if np.isfinite(points) else ""
        text += f": {100 * values[least] / values[best]:.3g} % of {names[best]}{less}"
    return Card(title, shown[column].iloc[least], text)


def _state(tree: xr.DataTree) -> Card:
    late, count = unfinished(tree), tree.sizes["run"]
    if not late:
        return Card("Finished", f"{count} of {count} runs" if count > 1 else "yes")
    return Card("Not finished", f"{len(late)} of {count} runs" if count > 1 else "not yet", _named(late), warns=True)


def unfinished(tree: xr.DataTree) -> list[str]:
    """The runs that have not ended, and how far they are."""
    from fedsim_analysis.report.origins import rounds

    root = tree.to_dataset()
    rows = zip(*(root[name].values.tolist() for name in ("run", "finished", "rounds_done", "rounds_planned")), strict=True)
    return [f"{run} (round {rounds(done, planned)})" for run, finished, done, planned in rows if not finished]


def warning(tree: xr.DataTree) -> str:
    """One line about runs that have not ended; empty where all have."""
    late, count = unfinished(tree), tree.sizes["run"]
    if not late:
        return ""
    have = "The run has not ended" if count == 1 else f"{len(late)} of {count} runs {'has' if len(late) == 1 else 'have'} not ended"
    return f"{have}: {_named(late)}."


def _named(late: Sequence[str]) -> str:
    return ", ".join(late[:MOST_NAMED]) + (f" and {len(late) - MOST_NAMED} more" if len(late) > MOST_NAMED else "")


def _overview(shown: pd.DataFrame, names: Sequence[str]) -> Table:
    columns = [str(name) for name in shown.columns]
    rows = [[str(value) for value in row] for row in shown.itertuples(index=False)]
    caption = " ".join(overview.LEGEND.format(first="", personal="").split())
    return Table("overview", f"A row for each job. {caption[0].upper()}{caption[1:]}", columns, rows, columns[columns.index("seeds") :])
