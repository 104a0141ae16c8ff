"""Runs side by side: those that differ in nothing but the seed become one row, as mean and 95 % interval over seeds."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import stdtrit

from fedsim_analysis.run_file import Unreadable
from fedsim_analysis.tables import Run, load


def _column(run: Run, name: str) -> pd.Series[float]:
    """A column; empty in files that have none."""
    return run.rounds[name] if name in run.rounds else pd.Series(dtype=float)


def _last(run: Run, name: str) -> float:
    """The last measured value of a column; NaN in files that have none."""
    measured = _column(run, name).dropna()
    return float(measured.iloc[-1]) if len(measured) else np.nan


def _most(run: Run, name: str, first: int) -> float:
    """The largest value of a column from round `first` on; NaN in files that have none."""
    return float(run.rounds[name].loc[first:].max()) if name in run.rounds else np.nan


MEASURES: dict[str, Callable[[Run], float]] = {
    "accuracy": lambda run: _last(run, "accuracy"),
    "accuracy_last_10": lambda run: float(_column(run, "accuracy").iloc[1:].dropna().tail(10).mean()),
    "client_accuracy_macro": lambda run: _last(run, "client_accuracy_macro"),
    "client_accuracy_min": lambda run: _last(run, "client_accuracy_min"),
    "client_inference_share": lambda run: _last(run, "client_inference_share"),
    "density": lambda run: _last(run, "density"),
    "max_client_flops": lambda run: _most(run, "max_client_flops", 0),
    "max_client_flops_share": lambda run: _most(run, "max_client_flops_share", 1),
    "max_client_flops_share_with_round_0": lambda run: _most(run, "max_client_flops_share", 0),
    "bytes": lambda run: float(_column(run, "bytes_up").sum() + _column(run, "bytes_down").sum()),
    "max_client_memory": lambda run: _most(run, "max_client_memory", 0),
    "max_client_model_memory": lambda run: _most(run, "max_client_model_memory", 0),
    "seconds": lambda run: float(_column(run, "seconds").sum()),
}


PERSONAL_TITLES = {"clients": "client_accuracy_macro", "lowest": "client_accuracy_min", "their FLOPs": "client_inference_share"}


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
    shown = [name for name in by or _differing(list(jobs.values())) if name != "rounds"]  # which every row has
    settings = pd.DataFrame([{name: job.get(name) for name in shown} for job in jobs.values()], dtype=object)  # 10 stays 10 beside None
    return settings.join(pd.DataFrame([_row(runs) for runs in groups.values()]))


LEGEND = """accuracy: of the last model, mean ± 95 % interval over seeds. density: kept share of the weights. training FLOPs: of a client
in a round, as a share of those that training the dense network would take it; the largest of all clients and rounds{first}.
sent: bytes up and down, of all clients in all rounds. memory: of the client that needs most, by the ledger; model memory: the same
without the activations of a batch.{personal}"""
PERSONAL = """ clients, lowest: mean and least accuracy of the clients on their own test
images. their FLOPs: of one forward pass of a client's sub-network, as a share of one of the original network; mean over clients."""
FIRST = "; with round 0: the same, the selection before round 1 included"


def tell(table: pd.DataFrame) -> str:
    """`compare`'s table as text, and what its columns mean."""
    shown = readable(table)
    legend = LEGEND.format(
        first=FIRST if "with round 0" in shown else "",
        personal=PERSONAL if "their FLOPs" in shown else "",
    )
    return f"{shown.to_string(index=False)}\n\n{legend}"


def readable(table: pd.DataFrame) -> pd.DataFrame:
    """`compare`'s table for people: the fields that tell the jobs apart, the seeds, and measures in units of their size.

    Of the clients' own accuracy where a run gave its clients sub-networks.
    """
    known = {"seeds", "rounds", "unfinished", *MEASURES}
    fields = [name for name in table.columns if name not in known and not name.endswith("_95")]
    shown = pd.DataFrame({title: [_plain(value) for value in table[name]] for name, title in _titles(fields).items()})
    shown["seeds"] = table["seeds"]
    for name, wanted in {"rounds": table["rounds"].nunique() > 1, "unfinished": table["unfinished"].any()}.items():
        if wanted:
            shown[name] = table[name]
    shown["accuracy"] = [_percent(mean, half) for mean, half in zip(table["accuracy"], table["accuracy_95"], strict=True)]
    if table["client_inference_share"].notna().any():
        for title, name in PERSONAL_TITLES.items():
            shown[title] = [_percent(mean, half) for mean, half in zip(table[name], table[f"{name}_95"], strict=True)]
    shown["density"] = [_formatted("{:.3g}", value) for value in table["density"]]
    trained, first = table["max_client_flops_share"], table["max_client_flops_share_with_round_0"]
    shown["training FLOPs"] = [_formatted("{:.3g} %", 100 * value) for value in trained]
    if (first > trained).any():
        shown["with round 0"] = [_formatted("{:.3g} %", 100 * value) for value in first]
    shown["sent"] = [_bytes(value) for value in table["bytes"]]
    shown["memory"] = [_bytes(value) for value in table["max_client_memory"]]
    shown["model memory"] = [_bytes(value) for value in table["max_client_model_memory"]]
    shown["time"] = [_formatted("{:,.1f} s", value) for value in table["seconds"]]
    return shown


def _titles(fields: Sequence[str]) -> dict[str, str]:
    """A field's heading: without its section, where that leaves no doubt; "method.name" is the method."""
    ends = [name.removesuffix(".name").rpartition(".")[2] for name in fields]
    taken = {*MEASURES, *PERSONAL_TITLES, "training FLOPs", "sent", "memory", "model memory", "time"}
    return {name: name if ends.count(end) > 1 or end in taken else end for name, end in zip(fields, ends, strict=True)}


def _plain(value: Any) -> str:
    return "-" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _formatted(how: str, value: float) -> str:
    return "-" if np.isnan(value) else how.format(value)


def _percent(mean: float, half: float) -> str:
    return _formatted("{:.1f}", 100 * mean) + ("" if np.isnan(half) else f" ± {100 * half:.1f}") + ("" if np.isnan(mean) else " %")


def _bytes(value: float) -> str:
    """Three digits and a prefix: 44,734,248 is "44.7 MB"."""
    if not np.isfinite(value):
        return "-"
    rounded = float(f"{value:.3g}")
    power = max((power for power in range(1, 5) if rounded >= 1000**power), default=0)
    scaled = rounded / 1000**power
    return f"{scaled:.{max(0, 2 - int(np.log10(scaled)))}f} {'kMGT'[power - 1]}B" if power else f"{rounded:.0f} B"


def half_interval(values: Sequence[float]) -> float:
    """Half the 95 % confidence interval of the mean, by Student's t; NaN of fewer than two values."""
    n = len(values)
    if n < 2:
        return np.nan
    return float(stdtrit(n - 1, 0.975) * np.std(values, ddof=1) / np.sqrt(n))


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
    """The fields that tell the jobs apart, the method's name always first. A method's own field is held against jobs of that method
    alone: that another method has none says nothing that its name does not say."""
    names = dict.fromkeys(name for job in jobs for name in job)
    return list(dict.fromkeys(["method.name", *(name for name in names if _differs(name, jobs))]))


def _differs(name: str, jobs: list[dict[str, Any]]) -> bool:
    alone = name.startswith("method.") and name != "method.name"
    first: dict[str, dict[str, Any]] = {}
    return any(job.get(name) != first.setdefault(repr(job.get("method.name")) if alone else "", job).get(name) for job in jobs)


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
        seed = run.attributes.get("seed")
        if seed is None:
            raise Unreadable(f"{run.path} is damaged: the attribute 'seed' is missing")
        if seed in seen:
            raise ValueError(f"{seen[seed]} and {run.path} are one job with one seed, {seed}: leave one out")
        seen[seed] = run.path
