"""Runs side by side: those that differ in nothing but the seed become one row, as mean and 95 % interval over seeds."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from fedsim_analysis.load import Run, load

# Student's t, 97.5 %, for 1 to 30 degrees of freedom; a table, since scipy is large for one number. Beyond 30, 1.96 + 2.4 / f
# is within 0.003.
T = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131),
    *(2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)


def _last(run: Run, name: str) -> float:
    """The last measured value of a column."""
    measured = run.rounds[name].dropna()
    return float(measured.iloc[-1]) if len(measured) else np.nan


MEASURES: dict[str, Callable[[Run], float]] = {
    "accuracy": lambda run: _last(run, "accuracy"),
    "accuracy_last_10": lambda run: float(run.rounds["accuracy"].iloc[1:].dropna().tail(10).mean()),
    "density": lambda run: _last(run, "density"),
    "max_client_flops": lambda run: float(run.rounds["max_client_flops"].max()),
    "bytes": lambda run: float(run.rounds["bytes_up"].sum() + run.rounds["bytes_down"].sum()),
    "max_client_memory": lambda run: float(run.rounds["max_client_memory"].max()),
    "seconds": lambda run: float(run.rounds["seconds"].sum()),
}


def compare(paths: Iterable[str | Path], by: Sequence[str] | None = None) -> pd.DataFrame:
    """A row per group of runs: `seeds`, `rounds`, and for each of MEASURES its mean and, as NAME_95, half its 95 % interval.

    Runs are grouped by their job without seed, name and [execution], and shown by the fields in which the groups differ; or
    grouped by the fields in `by`, such as ["method.name", "method.density"]. A single run has no interval: NaN. `unfinished`
    counts runs that have not ended; two runs with one seed in a group are a ValueError.
    """
    groups: dict[str, list[Run]] = {}
    jobs: dict[str, dict[str, Any]] = {}
    for run in map(load, paths):
        fields = _fields(run.job)
        job = {name: fields.get(name) for name in by} if by else fields
        key = json.dumps(job, sort_keys=True, default=str)
        groups.setdefault(key, []).append(run)
        jobs[key] = job
    shown = list(by) if by else _differing(list(jobs.values()))
    return pd.DataFrame([{**{name: jobs[key].get(name) for name in shown}, **_row(runs)} for key, runs in groups.items()])


SHOWN = {  # how a measure is read: factor, digits, unit
    "accuracy": (100, 1, "%"),
    "accuracy_last_10": (100, 1, "%"),
    "density": (1, 4, ""),
    "max_client_flops": (1e-9, 2, "GFLOP"),
    "bytes": (1e-6, 1, "MB"),
    "max_client_memory": (1e-6, 2, "MB"),
    "seconds": (1, 1, "s"),
}


def readable(table: pd.DataFrame) -> pd.DataFrame:
    """`compare`'s table for people: a measure and its interval in one column, "97.7 ± 2.4 %"."""
    shown = table[[name for name in table.columns if name not in SHOWN and not name.endswith("_95")]].copy()
    for name, (factor, digits, unit) in SHOWN.items():
        means, halves = table[name] * factor, table[f"{name}_95"] * factor
        shown[name] = [
            "-" if np.isnan(mean) else f"{mean:,.{digits}f}{'' if np.isnan(half) else f' ± {half:,.{digits}f}'} {unit}".rstrip()
            for mean, half in zip(means, halves, strict=True)
        ]
    return shown


def half_interval(values: Sequence[float]) -> float:
    """Half the 95 % confidence interval of the mean, by Student's t; NaN of fewer than two values."""
    n = len(values)
    if n < 2:
        return np.nan
    t = T[n - 2] if n - 1 <= len(T) else 1.96 + 2.4 / (n - 1)
    return float(t * np.std(values, ddof=1) / np.sqrt(n))


def _fields(job: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The job's fields as "section.key", without those that change how and not what is computed."""
    fields: dict[str, Any] = {}
    for name, value in job.items():
        if isinstance(value, dict):
            fields |= _fields(value, f"{prefix}{name}.")
        else:
            fields[prefix + name] = value
    return {name: value for name, value in fields.items() if name not in ("seed", "name") and not name.startswith(("execution.", "sweep."))}


def _differing(jobs: list[dict[str, Any]]) -> list[str]:
    """The fields that tell the jobs apart, the method's name always first."""
    names = dict.fromkeys(name for job in jobs for name in job)
    return list(dict.fromkeys(["method.name", *(name for name in names if any(job.get(name) != jobs[0].get(name) for job in jobs))]))


def _row(runs: list[Run]) -> dict[str, Any]:
    _distinct(runs)
    row: dict[str, Any] = {"seeds": len(runs), "rounds": min(run.attributes["rounds"] for run in runs)}
    row["unfinished"] = sum(not run.attributes["finished"] for run in runs)
    for name, measure in MEASURES.items():
        values = [measure(run) for run in runs]
        row[name], row[f"{name}_95"] = float(np.mean(values)), half_interval(values)
    return row


def _distinct(runs: list[Run]) -> None:
    seen: dict[Any, Path] = {}
    for run in runs:
        seed = run.attributes["seed"]
        if seed in seen:
            raise ValueError(f"{seen[seed]} and {run.path} are one job with one seed, {seed}: leave one out")
        seen[seed] = run.path
