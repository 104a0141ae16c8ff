"""What the figures show: its columns, its name on an axis, its unit, and how it adds up over rounds."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np

from fedsim_analysis.measures.nodes import Lacking, Numbers, along_runs, column, needed, node, round_numbers

if TYPE_CHECKING:
    from fedsim_analysis.measures.nodes import Runs

Adding = Literal["level", "sum", "largest"]  # of a row alone; of all rows until then; the largest of the rows until then
SHARES = ("accuracy", "share", "density", "overlap", "accuracy_macro", "accuracy_min", "accuracy_p10", "accuracy_std")


@dataclass(frozen=True)
class Metric:
    """A measure of a round. Its values are in `units`; a share has the unit "1" and is shown in percent."""

    name: str
    columns: tuple[str, ...]  # of the node `rounds`, added
    title: str
    units: str
    adding: Adding = "level"
    share: bool = False
    lower_is_better: bool = False


METRICS = {
    metric.name: metric
    for metric in (
        Metric("accuracy", ("accuracy",), "Test accuracy", "1", share=True),
        Metric("loss", ("loss",), "Test loss", "nat", lower_is_better=True),
        Metric("train_loss", ("train_loss",), "Training loss", "nat", lower_is_better=True),
        Metric("density", ("density",), "Density", "1", share=True, lower_is_better=True),
        Metric("bytes", ("bytes_up", "bytes_down"), "Sent, up and down", "B", "sum", lower_is_better=True),
        Metric("flops", ("train_flops",), "Training of all clients", "FLOP", "sum", lower_is_better=True),
        Metric("memory", ("max_client_memory",), "Memory of the largest client", "B", "largest", lower_is_better=True),
        Metric("seconds", ("seconds",), "Wall time", "s", "sum", lower_is_better=True),
        Metric("clock", ("round_time",), "Time of the clients' devices", "s", "sum", lower_is_better=True),
        Metric("energy", ("energy",), "Energy of the clients' devices", "J", "sum", lower_is_better=True),
        Metric("client_accuracy", ("client_accuracy_macro",), "Accuracy, mean over clients", "1", share=True),
        Metric("worst_client", ("client_accuracy_min",), "Worst client's accuracy", "1", share=True),
    )
}
"""`bytes`: sent by and to all clients of the cohorts. `flops`: training of all clients of the cohorts by the ledger; what the server
itself computes is in the column `server_flops` alone. `memory`: training memory, by the ledger, of the client that needs most."""


def metric_of(runs: Runs, name: str) -> Metric:
    """One of METRICS, or a column of the node `rounds` under its own name; Lacking that lists both."""
    if name in METRICS:
        return METRICS[name]
    found = node(runs, "rounds")
    if name not in found.data_vars:
        there = ", ".join(sorted(map(str, found.data_vars)))
        raise Lacking(f"there is no metric {name!r}; there are {', '.join(METRICS)}; and the columns {there or 'none'}")
    units = str(found[name].attrs.get("units", "1"))
    share = units == "1" and name.endswith(SHARES)
    return Metric(name, (name,), name.replace("_", " ").capitalize(), units, share=share, lower_is_better="loss" in name)


def each_round(metric: Metric) -> Metric:
    """The same of a round alone, not of all rounds until then."""
    title = f"{metric.title}, per round" if metric.adding == "sum" else metric.title
    return replace(metric, title=title, adding="level")


def measured(runs: Runs, metric: Metric) -> Numbers:
    """(runs, rounds) of a metric, as its `adding` says. A row that lacks a cost adds nothing; after a run's last row all is NaN,
    and so is all of a run that has never measured it.

    A round in which no client computes has no memory: NaN, not 0. Lacking where no run has measured it.
    """
    parts = [needed(runs, "rounds", metric.columns[0]), *(column(runs, "rounds", name) for name in metric.columns[1:])]
    if metric.name == "memory":
        parts = [np.where(parts[0] > 0, parts[0], np.nan)]
    if metric.adding == "level":
        return _sum(parts)
    rows = _sum(parts)
    inside = _is_done(runs) & np.isfinite(rows).any(axis=1, keepdims=True)
    if metric.adding == "sum":
        return np.where(inside, np.cumsum(np.nan_to_num(rows), axis=1), np.nan)
    largest = np.maximum.accumulate(np.where(np.isnan(rows), -np.inf, rows), axis=1)
    return np.where(inside & np.isfinite(largest), largest, np.nan)


def final(runs: Runs, metric: Metric) -> Numbers:
    """(runs,) the last measured value of each run: of what adds up, the sum or the largest of the whole run."""
    values = measured(runs, metric)
    return np.array([row[np.flatnonzero(np.isfinite(row))[-1]] if np.isfinite(row).any() else np.nan for row in values])


def _sum(parts: list[Numbers]) -> Numbers:
    """NaN where all are."""
    stacked = np.stack(parts)
    return np.where(np.isnan(stacked).all(axis=0), np.nan, np.nan_to_num(stacked).sum(axis=0))


def _is_done(runs: Runs) -> np.ndarray:
    """(runs, rounds) whether a run has this row."""
    rounds = round_numbers(runs, "rounds")
    last = along_runs(runs, "rounds", "rounds_done")
    if last is None:
        return np.ones((node(runs, "rounds").sizes["run"], len(rounds)), bool)
    return rounds[None, :] <= np.array(last)[:, None]
