"""Runs that differ in nothing but the seed are one group. Groups on other data are not held against each other."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedsim_analysis import job_fields
from fedsim_analysis.comparison import jobs, outcomes
from fedsim_analysis.comparison.metrics import METRICS, NEEDED, named
from fedsim_analysis.comparison.outcomes import Outcome
from fedsim_analysis.foreign_text import printable

GIVEN = "given"  # the order of the files
PLANNED = {"rounds": "rounds_planned"}  # a field whose name a column of results has


@dataclass(frozen=True, eq=False)
class Group:
    """Runs of one job under different seeds."""

    job: jobs.Job  # what the runs have in common, by dotted names
    runs: tuple[Outcome, ...]  # by rising seed
    label: str
    data: str  # what the data are called; the same text, the same data

    @property
    def unfinished(self) -> int:
        return sum(not run.finished for run in self.runs)


@dataclass(frozen=True, eq=False)
class Comparison:
    """Groups of runs, sorted."""

    groups: tuple[Group, ...]
    shown: tuple[str, ...]  # the fields that tell the groups apart, by dotted names

    def settings(self, group: Group) -> dict[str, Any]:
        """What stands at the beginning of each row: the fields that tell the groups apart."""
        return {PLANNED.get(name, name): group.job.get(name) for name in self.shown}

    @property
    def units(self) -> dict[str, str]:
        """Of columns of /rounds that METRICS does not have."""
        return {name: unit for group in self.groups for run in group.runs for name, unit in run.units.items()}

    @property
    def blocks(self) -> dict[str, tuple[Group, ...]]:
        """Groups by the name of their data, in order; each block has its own baseline, budgets and target."""
        return {name: tuple(group for group in self.groups if group.data == name) for name in dict.fromkeys(g.data for g in self.groups)}


def collect(
    runs: Iterable[str | Path], by: Sequence[str] | None = None, metrics: Iterable[str] = (), sort: str | None = None
) -> Comparison:
    """Reads the runs and groups them by their jobs, without the seed and what says how they are computed; or by the fields in `by`.

    metrics: names that `groups` and its siblings will be asked for, beside those of METRICS. sort: the field by which the groups are
    sorted first; "-FIELD" from the largest on; "given": in the order of the files. Raises FileNotFoundError, and ValueError for files
    that cannot be read, one file given twice, one seed twice in a group, groups that mix data, and an unknown field.
    """
    others = {column for name in metrics if name not in METRICS for column in named(name).columns}
    found: dict[str, list[Outcome]] = {}
    common: dict[str, jobs.Job] = {}
    for run in outcomes.read(runs, NEEDED, others):
        computed = jobs.computed(run.job)
        job = {name: computed.get(name) for name in by} if by else computed
        key = json.dumps(job, sort_keys=True, default=str)
        found.setdefault(key, []).append(run)
        common[key] = job
    shown = list(by or job_fields.differing(list(common.values())))
    names = _data_names([run for held in found.values() for run in held])
    labels = jobs.unique([jobs.label(job, shown) for job in common.values()])
    made = [_group(common[key], found[key], label, names) for key, label in zip(common, labels, strict=True)]
    return Comparison(tuple(sorted_by(made, shown, sort)), tuple(shown))


def _group(job: jobs.Job, runs: list[Outcome], label: str, names: dict[str, str]) -> Group:
    first: dict[int, Outcome] = {}
    for run in runs:
        if (same := first.setdefault(run.seed, run)) is not run:
            raise ValueError(f"{same.path} and {run.path} are one job with one seed, {run.seed}: leave one out")
        if names[_key(run)] != names[_key(runs[0])]:
            raise ValueError(f"{runs[0].path} and {run.path} have other data, and would be one row: add data.name to `by`")
    return Group(job, tuple(sorted(runs, key=lambda run: run.seed)), label, names[_key(runs[0])])


def _key(run: Outcome) -> str:
    return json.dumps(jobs.data(run.job), sort_keys=True, default=str)


def _data_names(runs: Sequence[Outcome]) -> dict[str, str]:
    """What the data of each run are called: by name, and by the fields that tell them apart."""
    kinds = {_key(run): jobs.data(run.job) for run in runs}
    fields = list(dict.fromkeys(name for data in kinds.values() for name in data))
    differ = [name for name in fields if name != "data.name" and len({repr(data.get(name)) for data in kinds.values()}) > 1]
    titles = jobs.titles(differ)
    names = []
    for data in kinds.values():
        parts = [f"{titles[name]} {jobs.plain(data[name])}" for name in differ if data.get(name) is not None]
        names.append(", ".join([jobs.plain(data.get("data.name")), *parts]))
    return dict(zip(kinds, jobs.unique(names), strict=True))


def sorted_by(groups: Sequence[Group], shown: Sequence[str], sort: str | None) -> list[Group]:
    """By the fields in their order, or first by `sort`, a field or its heading. Numbers are sorted as numbers."""
    if sort == GIVEN:
        return list(groups)
    fields = list(shown)
    made = sorted(groups, key=lambda group: [jobs.order(group.job.get(name)) for name in fields])
    if sort is None:
        return made
    field = field_named(sort.removeprefix("-"), shown)
    return sorted(made, key=lambda group: jobs.order(group.job.get(field)), reverse=sort.startswith("-"))


def field_named(text: str, shown: Sequence[str]) -> str:
    """The field of this dotted name or heading; ValueError lists the fields that there are."""
    called = {title: name for name, title in jobs.titles(shown).items()} | {name: name for name in shown}
    if text not in called:
        raise ValueError(f"--sort {text}: no such field tells these runs apart; there are: {', '.join(map(printable, shown))}")
    return called[text]
