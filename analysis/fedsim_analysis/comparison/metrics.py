"""What a run comes to in one number: its last accuracy, the bytes it sent, the memory it needs, or any column of /rounds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedsim_analysis.comparison.outcomes import Outcome

Values = NDArray[np.float64]

LAST = 10  # evaluations
HOWS: dict[str, tuple[str, Callable[[Values], float]]] = {  # of the rounds in which it was measured, of which there is one at least
    "last": ("last measured value", lambda values: float(values[-1])),
    "max": ("largest of all rounds", lambda values: float(values.max())),
    "min": ("smallest of all rounds", lambda values: float(values.min())),
    "mean": ("mean of the rounds", lambda values: float(values.mean())),
    "sum": ("sum of all rounds", lambda values: float(values.sum())),
}


@dataclass(frozen=True)
class Metric:
    """One number of a run, from a column of /rounds, or from several, which are added."""

    name: str
    title: str
    unit: str  # "%" of a share between 0 and 1; "" a plain number
    columns: tuple[str, ...]
    how: str = "last"  # of HOWS
    first: int = 0  # round
    latest: int = 0  # measured values at most, the last ones; 0: all

    def of(self, run: Outcome) -> float:
        """NaN where the file lacks a column or nothing was measured."""
        measured = total(run, self.columns)[self.first :]
        measured = measured[~np.isnan(measured)][-self.latest :]
        with np.errstate(all="ignore"):  # a value that was recorded may be any
            return HOWS[self.how][1](measured) if len(measured) else np.nan


def total(run: Outcome, columns: Sequence[str]) -> Values:
    """(rounds + 1,) the sum of some columns; NaN where none of them was measured, or where the file lacks one."""
    rows = np.array([run.column(name) for name in columns])
    nothing = np.isnan(rows)
    missing = not run.columns.keys() >= set(columns)
    return np.where(nothing.all(0) | missing, np.nan, np.where(nothing, 0, rows).sum(0))


BYTES, FLOPS = ("bytes_up", "bytes_down"), ("train_flops",)
METRICS = {
    metric.name: metric
    for metric in (
        Metric("accuracy", "accuracy", "%", ("accuracy",)),
        Metric("accuracy_last_10", "accuracy, mean of the last 10 evaluations", "%", ("accuracy",), "mean", 1, LAST),
        Metric("loss", "loss", "nat", ("loss",)),
        Metric("client_accuracy_macro", "accuracy of clients, their mean", "%", ("client_accuracy_macro",)),
        Metric("client_accuracy_min", "accuracy of the worst client", "%", ("client_accuracy_min",)),
        Metric("client_inference_share", "FLOPs of a client's sub-network", "%", ("client_inference_share",)),
        Metric("density", "density", "", ("density",)),
        Metric("bytes", "sent", "B", BYTES, "sum"),
        Metric("train_flops", "FLOPs of training", "FLOP", FLOPS, "sum"),
        Metric("max_client_flops", "FLOPs of the busiest client in a round", "FLOP", ("max_client_flops",), "max"),
        Metric("max_client_flops_share", "its share of dense training", "%", ("max_client_flops_share",), "max", 1),
        Metric("max_client_flops_share_with_round_0", "the same with round 0", "%", ("max_client_flops_share",), "max"),
        Metric("max_client_memory", "memory", "B", ("max_client_memory",), "max"),
        Metric("max_client_model_memory", "model memory", "B", ("max_client_model_memory",), "max"),
        Metric("seconds", "time", "s", ("seconds",), "sum"),
    )
}
NEEDED = frozenset(name for metric in METRICS.values() for name in metric.columns)


def named(text: str) -> Metric:
    """The metric of this name, or that of a column: "train_loss" its last measured value, "train_loss:min" its smallest one …

    ValueError for an unknown HOW; whether there is such a column only the files know.
    """
    if text in METRICS:
        return METRICS[text]
    column, _, how = text.partition(":")
    if (how or "last") not in HOWS:
        raise ValueError(f"--metric {text}: a column is taken as {', '.join(f'{column}:{name}' for name in HOWS)}")
    return Metric(text, f"{column}, {HOWS[how or 'last'][0]}", "", (column,), how or "last")
