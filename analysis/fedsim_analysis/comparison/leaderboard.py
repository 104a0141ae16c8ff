"""A leaderboard of methods: a line for each method through its jobs, with what they gave and what they cost, of the overview's numbers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from fedsim_analysis import job_fields
from fedsim_analysis.comparison import jobs
from fedsim_analysis.comparison.grouping import Comparison, Group, collect
from fedsim_analysis.comparison.metrics import METRICS, Metric
from fedsim_analysis.comparison.overview import MEASURES, PERSONAL_TITLES, overview

COSTS = ("density", "max_client_flops_share", "bytes", "max_client_model_memory")
SCORES = tuple(name for name in MEASURES if "accuracy" in name)
DENSE, MATCH, MATCHED, SMALL_DENSE = "fedavg", "model.match", "model.match_density", "small dense"
ALONG = (  # fields that a line follows, where several differ
    *("method.density", MATCHED, "method.target", "method.client_flops_share", "method.flops_share", "model.gate_keep"),
)
PERSONAL = ("finetune", "lotteryfl", "dwfnp", "heterofl")  # methods that give clients networks of their own


@dataclass(frozen=True)
class Point:
    """One job: means over its seeds."""

    label: str
    score: float
    half: float  # of the 95 % interval of the score; NaN of one seed
    costs: tuple[float, ...]  # in the order of Leaderboard.costs; NaN where not measured
    seeds: int
    finished: bool


@dataclass(frozen=True)
class Line:
    """A method, or one of its variants, through its jobs in the order of the field that differs."""

    label: str
    method: str  # as in a job, or SMALL_DENSE
    points: tuple[Point, ...]
    is_reference: bool  # dense averaging

    @property
    def score(self) -> float:
        """The best of its jobs."""
        return max(point.score for point in self.points)


@dataclass(frozen=True)
class Leaderboard:
    """Methods by falling score of their best jobs."""

    lines: tuple[Line, ...]
    metric: Metric
    costs: tuple[Metric, ...]
    data: str
    not_measured: tuple[str, ...]  # jobs that have no score
    first_is_dearer: bool  # whether the selection before round 1 takes a client more FLOPs than the share in `costs` says
    has_small: bool  # whether a line is of small dense networks, whose shares are of the large one here
    differ: tuple[str, ...]  # fields beside those of methods that differ between the methods

    @property
    def points(self) -> list[Point]:
        return [point for line in self.lines for point in line.points]

    @property
    def personal(self) -> list[str]:
        """Lines whose clients have networks of their own."""
        return [line.label for line in self.lines if line.method in PERSONAL]


def leaderboard(runs: Iterable[str | Path], metric: str = "accuracy", costs: Sequence[str] = COSTS) -> Leaderboard:
    """The leaderboard of run files that have one data set. metric: one of SCORES, or "clients" or "lowest" as in the overview's headings.

    costs: names of MEASURES. Raises FileNotFoundError, and ValueError with a message for the user.
    """
    score, found = score_of(metric), collect(runs)
    if wrong := [name for name in costs if name not in MEASURES]:
        raise ValueError(f"a leaderboard has no cost {wrong[0]}; there are: {', '.join(MEASURES)}")
    if len(found.blocks) > 1:
        raise ValueError(f"the runs have different data: {'; '.join(found.blocks)}; a leaderboard is of one data set")
    if len(found.groups) < 2:
        raise ValueError("a leaderboard compares jobs, and there are no two: all runs are of one job")
    table = overview(found)
    points = _points(found, of_small(found, table).to_dict("records"), score, costs)
    measured = [at for at, point in enumerate(points) if np.isfinite(point.score)]
    if not measured:
        raise ValueError(f"no run has measured the {score.about}")
    lines = _lines([found.groups[at] for at in measured], [points[at] for at in measured])
    dearer = bool((table["max_client_flops_share_with_round_0"] > table["max_client_flops_share"]).any())
    return Leaderboard(
        tuple(sorted(lines, key=lambda line: -line.score)),
        score,
        tuple(METRICS[name] for name in costs),
        next(iter(found.blocks)),
        tuple(point.label for point in points if not np.isfinite(point.score)),
        dearer and "max_client_flops_share" in costs,
        any(line.method == SMALL_DENSE for line in lines),
        tuple(name for name in found.shown if not name.startswith("method.") and name not in (*ALONG, MATCH)),
    )


def of_small(found: Comparison, table: pd.DataFrame) -> pd.DataFrame:
    """The overview with small dense networks as shares of the large one: they have its density by `match_density`, and FLOPs over those
    of dense averaging, NaN where this was not run. The overview has them as shares of themselves, which are 1 for each of them."""
    names = [method_of(group.job) for group in found.groups]
    small = np.array([name == SMALL_DENSE for name in names])
    dense = table.loc[[name == DENSE for name in names], "max_client_flops"]
    changed = table.copy()
    share = [group.job.get(MATCHED) if group.job.get(MATCH) == "params" else np.nan for group in found.groups]
    changed.loc[small, "density"] = np.array(share, float)[small]
    for name in (name for name in table if str(name).startswith("max_client_flops_share")):
        changed.loc[small, name] = (table["max_client_flops"] / (dense.iloc[0] if len(dense) == 1 else np.nan))[small]
    return changed


def score_of(name: str) -> Metric:
    """What a leaderboard shows as accuracy; ValueError lists what there is."""
    known = PERSONAL_TITLES | {name: name for name in SCORES}
    if known.get(name) not in SCORES:
        raise ValueError(f"--metric {name}: a leaderboard shows {', '.join(SCORES)}; clients is {PERSONAL_TITLES['clients']}")
    return METRICS[known[name]]


def _points(found: Comparison, rows: Sequence[Mapping[Any, Any]], score: Metric, costs: Sequence[str]) -> list[Point]:
    """A row of the overview each."""
    return [
        Point(
            group.label,
            float(row[score.name]),
            float(row[f"{score.name}_95"]),
            tuple(float(row[name]) for name in costs),
            len(group.runs),
            not group.unfinished,
        )
        for group, row in zip(found.groups, rows, strict=True)
    ]


def _lines(groups: Sequence[Group], points: Sequence[Point]) -> list[Line]:
    methods: dict[str, list[int]] = {}
    for at, group in enumerate(groups):
        methods.setdefault(method_of(group.job), []).append(at)
    return [line for method, places in methods.items() for line in _of_method(method, [groups[at].job for at in places], places, points)]


def _of_method(method: str, held: Sequence[jobs.Job], places: Sequence[int], points: Sequence[Point]) -> list[Line]:
    """A line for each combination of the fields that differ between the jobs of a method, but for the one that a line follows."""
    fields = [name for name in job_fields.differing(held) if name != jobs.METHOD]
    along = None if method == DENSE else _along(fields, held)
    others = [name for name in fields if name != along]
    called = jobs.titles(others)
    found: dict[str, list[int]] = {}
    for k, job in enumerate(held):  # in which groups stand by rising values of their fields
        found.setdefault(repr([job.get(name) for name in others]), []).append(k)
    labels = jobs.unique([_label(method, {called[name]: held[own[0]].get(name) for name in others}) for own in found.values()])
    return [
        Line(label, method, tuple(points[places[k]] for k in own), method == DENSE)
        for label, own in zip(labels, found.values(), strict=True)
    ]


def _label(method: str, variant: Mapping[str, Any]) -> str:
    return ", ".join([jobs.plain(method), *(f"{name} {jobs.plain(value)}" for name, value in variant.items())])


def _along(fields: Sequence[str], held: Sequence[jobs.Job]) -> str | None:
    """The field that a line follows: the first of ALONG that differs, or any field of numbers."""
    numbers = [name for name in fields if all(isinstance(job.get(name), int | float) and job[name] is not True for job in held)]
    return next((name for name in (*ALONG, *numbers) if name in numbers), None)


def method_of(job: jobs.Job) -> str:
    """The method; a dense network that is small from the start is one of its own."""
    name = str(job.get(jobs.METHOD))
    return SMALL_DENSE if name == DENSE and job.get(MATCH) is not None else name
