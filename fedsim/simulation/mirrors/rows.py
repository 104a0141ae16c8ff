"""What a mirror copies from a run file: its rows, what the columns mean, and its job."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from fedsim_analysis import checksums, run_file

Row = dict[str, float]  # column -> number; what was not measured in the round is not in it
PHASES = "timing/"  # before the name of a phase of the round, in seconds


@dataclass(frozen=True)
class Described:
    """What a tracker is told about a run."""

    name: str
    job: dict[str, Any]  # resolved, by section
    job_sha256: str
    facts: dict[str, str]  # other attributes of the run file
    columns: Mapping[str, tuple[str, str]]  # column -> (unit, what it is)
    weights_sha256: str = ""  # of the finished run

    @property
    def fields(self) -> dict[str, Any]:
        """The job by its dotted names; what is no text, number or truth value as text."""
        flat: dict[str, Any] = {}
        for name, value in self.job.items():
            flat |= {f"{name}.{field}": inner for field, inner in value.items()} if isinstance(value, dict) else {name: value}
        return {name: value if isinstance(value, str | int | float) else str(value) for name, value in flat.items()}


def described(path: Path) -> Described:
    """What the run file says of itself."""
    return run_file.read(path, _described, time.sleep)


def rows(path: Path, first: int, last: int) -> list[tuple[int, Row]]:
    """Rows `first` … `last`, of those that are complete."""
    return run_file.read(path, lambda file: list(_rows(file, first, min(last, int(run_file.attributes(file)["rounds"])))), time.sleep)


def _described(file: Any) -> Described:
    known, sums = run_file.attributes(file), checksums.columns(file)
    job = run_file.job(known)
    columns = {_called(group, name): about for group in ("rounds", "timing") for name, about in run_file.abouts(file, group, sums).items()}
    names = ("method", "seed", "fedsim_version", "git_commit", "torch_version", "started_at", "partition_sha256")
    facts = {name: str(known[name]) for name in names if name in known}
    finished = str(known.get("weights_sha256", "")) if known["finished"] else ""
    return Described(str(job.get("name", "run")), job, str(known.get("job_sha256", "")), facts, columns, finished)


def _rows(file: Any, first: int, last: int) -> Iterator[tuple[int, Row]]:
    known = checksums.columns(file)
    found = {
        _called(group, name): run_file.values(file, group, name, first if first == last else None, known=known)
        for group in ("rounds", "timing")
        for name in run_file.names(file, group)
    }
    for r in range(first, last + 1):
        row = {name: float(column if first == last else column[r]) for name, column in found.items()}
        yield r, {name: value for name, value in row.items() if not np.isnan(value)}


def _called(group: str, name: str) -> str:
    return PHASES + name if group == "timing" else name
