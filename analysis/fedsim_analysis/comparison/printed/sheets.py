"""The DataFrames of a comparison as sheets for people: one per metric, per resource and per data set, units in the headings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pandas as pd

from fedsim_analysis.comparison import jobs
from fedsim_analysis.comparison.metrics import METRICS, Metric, named
from fedsim_analysis.comparison.printed.cells import NONE, ROW, Cell, Column, Sheet, amount, chance, counts, numbers, scale, scaled, texts
from fedsim_analysis.comparison.printed.naming import Naming, Row

POINTS = {"%": "points"}  # what differences of a unit are counted in
BASELINE, NEVER = "baseline", "not reached"
COSTS = {
    "bytes": ("sent", "B"),
    "flops": ("FLOPs", "FLOP"),
    "clock": ("clock", "s"),
    "energy": ("energy", "J"),
    "memory": ("memory", "B"),
}
EQUAL = {
    "bytes": "{} at equal bytes: the last evaluation up to which all clients together had sent and received {} at most",
    "flops": "{} at equal FLOPs: the last evaluation up to which all clients together had trained for {} at most",
    "clock": "{} at equal time of the devices: the last evaluation up to which no more than {} had passed",
    "energy": "{} at equal energy: the last evaluation up to which the devices of all clients together had used {} at most",
    "memory": "{} at equal memory: the last evaluation, where no client needs more than {}",
}
TARGET = "{} until {} was {} or more for the first time"


def of(naming: Naming, frames: Mapping[str, pd.DataFrame]) -> list[Sheet]:
    """The sheets of "overview", "metrics", "equal" and "target", of those that are there."""
    makers = {"overview": _overview, "metrics": _metrics, "equal": _equal, "target": _target}
    return [sheet for name, frame in frames.items() for sheet in makers[name](naming, frame)]


def readable_sheet(shown: pd.DataFrame) -> Sheet:
    """`readable`, whose numbers have their units beside them, as a sheet."""
    keys = list(shown)[: list(shown).index("seeds")]
    columns = (Column(str(name), tuple(Cell(str(value), number=True) for value in shown[name]), key=name in keys) for name in shown)
    return Sheet("", tuple(columns))


def _overview(naming: Naming, frame: pd.DataFrame) -> Iterator[Sheet]:
    rows = list[Row](frame.to_dict("records"))
    numbers_of_rows = [counts(ROW, range(1, len(rows) + 1), key=True)] if naming.numbered else []
    columns = [*numbers_of_rows, *naming.fields(rows), counts("seeds", [row["seeds"] for row in rows])]
    if len({row["rounds"] for row in rows}) > 1:
        columns.append(counts("rounds", [row["rounds"] for row in rows]))
    columns += _unfinished(rows)
    personal = ("client_accuracy_macro", "client_accuracy_min", "client_inference_share")
    shown = ["accuracy", *(personal if frame["client_inference_share"].notna().any() else ()), "density", "max_client_flops_share"]
    for name in [*shown, "bytes", "max_client_memory", "max_client_model_memory", "seconds"]:
        halves = [row[f"{name}_95"] for row in rows] if "accuracy" in name else [np.nan] * len(rows)
        columns.append(_column(METRICS[name], [row[name] for row in rows], halves))
    yield Sheet("Overview", tuple(columns))


def _metrics(naming: Naming, frame: pd.DataFrame) -> Iterator[Sheet]:
    for name in dict.fromkeys(frame["metric"]):
        metric = named(name, naming.comparison.units)
        for where, rows in _blocks(naming, frame[frame["metric"] == name]):
            column = _column(metric, [row["mean"] for row in rows], [row["mean_95"] for row in rows])
            columns = [*naming.keys(rows), _seeds(rows), *_unfinished(rows), column, *_differences(naming, metric.unit, rows)]
            about = metric.about if name not in METRICS else f"{metric.about[0].upper()}{metric.about[1:]}"
            yield Sheet(f"{about}{where}", tuple(columns))


def _equal(naming: Naming, frame: pd.DataFrame) -> Iterator[Sheet]:
    for resource in dict.fromkeys(frame["resource"]):
        title, unit = COSTS[resource]
        for where, rows in _blocks(naming, frame[(frame["resource"] == resource) & frame["budget"].notna()]):
            columns = [*naming.keys(rows), _seeds(rows), *_unfinished(rows)]
            if resource != "memory":
                columns.append(numbers("round", "", [row["round"] for row in rows]))
            columns.append(numbers(title, unit, [row["spent"] for row in rows]))
            columns.append(numbers(rows[0]["score"], "%", [row["mean"] for row in rows], [row["mean_95"] for row in rows]))
            if len({repr(row[jobs.METHOD]) for row in rows if jobs.METHOD in row}) < len(rows):
                columns.append(texts("best of its method", ["best" if row["best"] else "" for row in rows]))
            columns += _differences(naming, "%", rows)
            yield Sheet(EQUAL[resource].format(_title(rows), amount(rows[0]["budget"], unit)) + where, tuple(columns))


def _target(naming: Naming, frame: pd.DataFrame) -> Iterator[Sheet]:
    for where, rows in _blocks(naming, frame[frame["target"].notna()]):
        columns = [*naming.keys(rows), *_unfinished(rows)]
        columns.append(counts("reached by", [f"{row['reached']} of {row['seeds']}" for row in rows]))
        for name, title, unit in (("rounds", "rounds", ""), *((name, *COSTS[name]) for name in COSTS if name in frame)):
            column = numbers(title, unit, [row[name] for row in rows], [row[f"{name}_95"] for row in rows])
            columns.append(_never(column, rows) if name == "rounds" else column)
        yield Sheet(TARGET.format(costs_named(frame), _score(rows), amount(rows[0]["target"], "%")) + where, tuple(columns))


def costs_named(frame: pd.DataFrame) -> str:
    """What a target is said to cost, at the beginning of a sentence."""
    return "Rounds, bytes, FLOPs, time and energy" if "clock" in frame else "Rounds, bytes and FLOPs"


def _score(rows: Sequence[Row]) -> str:
    """What counts as accuracy, in a sentence."""
    return "the accuracy" if rows[0]["score"] == "accuracy" else str(rows[0]["score"])


def _title(rows: Sequence[Row]) -> str:
    """The same at the beginning of a title."""
    return "Accuracy" if rows[0]["score"] == "accuracy" else str(rows[0]["score"])


def _never(column: Column, rows: Sequence[Row]) -> Column:
    cells = tuple(cell if row["reached"] else Cell(NEVER, number=True) for cell, row in zip(column.cells, rows, strict=True))
    return Column(column.title, cells, column.unit)


def _blocks(naming: Naming, frame: pd.DataFrame) -> Iterator[tuple[str, list[Row]]]:
    """The rows of each data set, and how it is named where there are several."""
    for name, part in frame.groupby("data", sort=False):
        yield (f", on {name}" if len(naming.comparison.blocks) > 1 else ""), list[Row](part.to_dict("records"))


def _seeds(rows: Sequence[Row]) -> Column:
    return counts("seeds", [row["seeds"] if row["seeds"] == row["runs"] else f"{row['seeds']} of {row['runs']}" for row in rows])


def _unfinished(rows: Sequence[Row]) -> list[Column]:
    return [counts("unfinished", [row["unfinished"] for row in rows])] if any(row["unfinished"] for row in rows) else []


def _column(metric: Metric, means: Sequence[float], halves: Sequence[float]) -> Column:
    return numbers(metric.title, metric.unit, means, halves)


def _differences(naming: Naming, unit: str, rows: Sequence[Row]) -> list[Column]:
    """The differences from the baseline, of more than one row."""
    if len(rows) < 2:
        return []
    factor, shown = scale(unit, [row["mean"] for row in rows])
    means, halves = [row["difference"] for row in rows], [row["difference_95"] for row in rows]
    column = scaled("difference", POINTS.get(shown, shown), factor, means, halves, signed=True)
    own = [row["group"] == row["baseline"] for row in rows]
    cells = tuple(Cell(BASELINE, number=True) if is_it else cell for cell, is_it in zip(column.cells, own, strict=True))
    columns = [Column(column.title, cells, column.unit)]
    if len(held := {row["baseline"] for row in rows}) > 1:
        columns.insert(0, texts("from", [NONE if is_it else naming.of(row["baseline"]) for row, is_it in zip(rows, own, strict=True)]))
    columns.append(counts("pairs", [NONE if is_it else row["pairs"] for row, is_it in zip(rows, own, strict=True)]))
    columns.append(counts("p", [chance(row["p"]) for row in rows]))
    if len(rows) - len(held) > 1:
        columns.append(counts("p by Holm", [chance(row["p_holm"]) for row in rows]))
    return columns
