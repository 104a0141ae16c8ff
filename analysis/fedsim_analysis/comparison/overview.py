"""The overview: a row per group of runs with what it gave and what it cost, as a DataFrame and as text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from fedsim_analysis.comparison import jobs
from fedsim_analysis.comparison.grouping import GIVEN, PLANNED, Comparison, Group, collect
from fedsim_analysis.comparison.metrics import METRICS
from fedsim_analysis.comparison.statistics import half_interval, mean
from fedsim_analysis.comparison.tables import frame

MEASURES = (
    "accuracy",
    "accuracy_last_10",
    "client_accuracy_macro",
    "client_accuracy_min",
    "client_inference_share",
    "density",
    "max_client_flops",
    "max_client_flops_share",
    "max_client_flops_share_with_round_0",
    "bytes",
    "max_client_memory",
    "max_client_model_memory",
    "seconds",
)
PERSONAL_TITLES = {"clients": "client_accuracy_macro", "lowest": "client_accuracy_min", "their FLOPs": "client_inference_share"}
TITLES = ("training FLOPs", "sent", "memory", "model memory", "time")


def compare(paths: Iterable[str | Path], by: Sequence[str] | None = None) -> pd.DataFrame:
    """A row per group of runs: `seeds`, `rounds`, and for each of MEASURES its mean and, as NAME_95, half its 95 % interval.

    Runs are grouped by their job without seed, name, [execution] and the place of the data, and shown by the fields in which the groups
    differ; or grouped by the fields in `by`, such as ["method.name", "method.density"]. A single run has no interval:
    NaN. `unfinished` counts runs that have not ended; two runs with one seed in a group are a ValueError.
    """
    return overview(collect(paths, by, sort=GIVEN))


def overview(comparison: Comparison) -> pd.DataFrame:
    """The table of `compare`."""
    settings = [comparison.settings(group) for group in comparison.groups]
    shown = [name for name in settings[0] if name not in PLANNED.values()]  # every row has rounds
    fields = pd.DataFrame([{name: row[name] for name in shown} for row in settings], dtype=object)  # 10 stays 10 beside None
    return fields.join(frame([_row(group) for group in comparison.groups]))


def _row(group: Group) -> dict[str, Any]:
    row: dict[str, Any] = {"seeds": len(group.runs), "rounds": min(run.rounds for run in group.runs), "unfinished": group.unfinished}
    for name in MEASURES:
        values = [METRICS[name].of(run) for run in group.runs]
        row[name], row[f"{name}_95"] = mean(values), half_interval(values)
    return row


LEGEND = """accuracy: of the last model, mean ± 95 % interval over seeds. density: kept share of the weights. training FLOPs: of a client
in a round, as a share of those that training the dense network would take it; the largest of all clients and rounds{first}.
sent: bytes up and down, of all clients in all rounds. memory: of the client that needs most, as fedsim counts it; model memory: the same
without the activations of a batch.{personal}"""
PERSONAL = """ clients, lowest: mean and least accuracy of the clients on their own test
images. their FLOPs: of one forward pass of a client's sub-network, as a share of one of the original network; mean over clients."""
FIRST = "; with round 0: the same, what clients compute before round 1 included"


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
    called = jobs.titles(fields, {*MEASURES, *PERSONAL_TITLES, *TITLES})
    shown = pd.DataFrame({title: [jobs.plain(value) for value in table[name]] for name, title in called.items()})
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
    shown["training FLOPs"] = [_share(value) for value in trained]
    if (first > trained).any():
        shown["with round 0"] = [_share(value) for value in first]
    shown["sent"] = [_bytes(value) for value in table["bytes"]]
    shown["memory"] = [_bytes(value) for value in table["max_client_memory"]]
    shown["model memory"] = [_bytes(value) for value in table["max_client_model_memory"]]
    shown["time"] = [_formatted("{:,.1f} s", value) for value in table["seconds"]]
    return shown


def _formatted(how: str, value: float) -> str:
    return "-" if np.isnan(value) else how.format(value)


def _share(value: float) -> str:
    """A share of three digits, and whole numbers above a thousand percent."""
    return _formatted("{:,.0f} %" if value >= 10 else "{:.3g} %", 100 * value)


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
