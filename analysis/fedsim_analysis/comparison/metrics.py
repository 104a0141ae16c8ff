"""What a run comes to in one number: its last accuracy, the bytes it sent, the memory it needs, or any column of /rounds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedsim_analysis.comparison import jobs
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
    title: str  # heading of its column
    about: str  # heading of its table
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
CLIENTS, WORST, SUB = ("client_accuracy_macro",), ("client_accuracy_min",), ("client_inference_share",)
CLOCK, ENERGY = ("round_time",), ("energy",)  # of emulated devices
SHARE, MODEL = ("max_client_flops_share",), ("max_client_model_memory",)
METRICS = {
    metric.name: metric
    for metric in (
        Metric("accuracy", "accuracy", "accuracy of the last model on the global test set", "%", ("accuracy",)),
        Metric("accuracy_last_10", "accuracy", f"accuracy, mean of the last {LAST} evaluations", "%", ("accuracy",), "mean", 1, LAST),
        Metric("loss", "loss", "loss of the last model on the global test set", "nat", ("loss",)),
        Metric("client_accuracy_macro", "clients", "accuracy of clients on their own test images, their mean", "%", CLIENTS),
        Metric("client_accuracy_min", "worst client", "accuracy of the worst client on its own test images", "%", WORST),
        Metric("client_inference_share", "their FLOPs", "FLOPs of a client's sub-network, over the original's", "%", SUB),
        Metric("density", "density", "density: kept weights of the last model, over the original's", "", ("density",)),
        Metric("bytes", "sent", "bytes sent up and down, by all clients in all rounds", "B", BYTES, "sum"),
        Metric("train_flops", "FLOPs", "FLOPs of training, of all clients in all rounds", "FLOP", FLOPS, "sum"),
        Metric("max_client_flops", "FLOPs", "FLOPs of the busiest client in a round", "FLOP", ("max_client_flops",), "max"),
        Metric("max_client_flops_share", "share of dense FLOPs", "FLOPs of a client in a round, over dense ones", "%", SHARE, "max", 1),
        Metric("max_client_flops_share_with_round_0", "share of dense FLOPs", "the same, round 0 included", "%", SHARE, "max"),
        Metric("max_client_memory", "memory", "training memory of the client that needs most", "B", ("max_client_memory",), "max"),
        Metric("max_client_model_memory", "model memory", "the same without the activations of a batch", "B", MODEL, "max"),
        Metric("seconds", "time", "seconds of all rounds", "s", ("seconds",), "sum"),
        Metric("clock", "clock", "seconds of all rounds by the clients' devices", "s", CLOCK, "sum"),
        Metric("energy", "energy", "joules of the devices of all clients in all rounds", "J", ENERGY, "sum"),
    )
}
NEEDED = frozenset(name for metric in METRICS.values() for name in metric.columns)


def named(text: str, units: Mapping[str, str] | None = None) -> Metric:
    """The metric of this name, or that of a column: "train_loss" its last measured value, "train_loss:min" its smallest one …

    units: of columns that METRICS does not have. ValueError for what a column cannot be taken as; whether there is such a column only
    the files know.
    """
    if text in METRICS:
        return METRICS[text]
    column, _, how = text.partition(":")
    if (how or "last") not in HOWS:
        raise ValueError(f"--metric {text}: a column is taken as {', '.join(f'{column}:{name}' for name in HOWS)}")
    unit = jobs.plain((units or {}).get(column, ""))
    shown = "%" if "accuracy" in column else "" if unit == "1" else unit
    return Metric(text, column, f"{column}, {HOWS[how or 'last'][0]}", shown, (column,), how or "last")
