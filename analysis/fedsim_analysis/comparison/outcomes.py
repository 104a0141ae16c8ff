"""What a comparison needs of each run: its job, some columns of /rounds, and cohorts of two rounds. No more of a file is read."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from fedsim_analysis import checksums, run_file
from fedsim_analysis.comparison import jobs

Columns = Mapping[str, NDArray[np.float64]]
COHORT = "in_cohort"


@dataclass(frozen=True, eq=False)
class Outcome:
    """One run, rows 0 … `rounds`, which are complete."""

    path: Path
    seed: int
    job: jobs.Job  # all fields by dotted names
    attributes: Mapping[str, Any]
    columns: Columns  # of /rounds, (rounds + 1,) each, NaN where not measured; those that the file lacks are not here
    cohorts: Mapping[int, frozenset[int]]  # of round 1 and the last one; empty where the file has none
    names: tuple[str, ...]  # of all columns of /rounds that the file has
    units: Mapping[str, str]  # of columns that METRICS does not have

    @property
    def rounds(self) -> int:
        """The last complete round; -1 before there is one."""
        return int(self.attributes["rounds"])

    @property
    def finished(self) -> bool:
        return bool(self.attributes["finished"])

    def column(self, name: str) -> NDArray[np.float64]:
        """(rounds + 1,); NaN where the file has no such column."""
        return self.columns.get(name, np.full(self.rounds + 1, np.nan))


def read(paths: Iterable[str | Path], columns: Collection[str], others: Collection[str] = ()) -> list[Outcome]:
    """The runs, in this order, with these columns of /rounds, and with others, whose units are read too.

    Raises FileNotFoundError, and ValueError for what cannot be read and for one file given twice.
    """
    seen: dict[Path, str | Path] = {}
    for path in paths:
        if (place := Path(path).resolve()) in seen:
            same = f" (as {seen[place]})" if str(seen[place]) != str(path) else ""
            raise ValueError(f"{path} is given twice{same}: leave one out")
        seen[place] = path
    return [_outcome(Path(path), columns, others) for path in seen.values()]


def _outcome(path: Path, columns: Collection[str], others: Collection[str]) -> Outcome:
    def outcome(file: h5py.File) -> Outcome:
        known = run_file.attributes(file)
        job, seed = jobs.fields(run_file.job(known)), int(run_file.one(known, "seed"))
        sums, there = checksums.columns(file), run_file.all_names(file, "rounds")
        wanted = [name for name in there if name in columns or name in others]
        found = {name: run_file.values(file, "rounds", name, known=sums) for name in wanted}
        units = {name: run_file.about(file, "rounds", name)[0] for name in wanted if name in others}
        return Outcome(path, seed, job, known, found, _cohorts(file, known["rounds"], sums), tuple(there), units)

    return run_file.read(path, outcome, time.sleep)


def _cohorts(file: h5py.File, last: int, sums: list[str]) -> dict[int, frozenset[int]]:
    if last < 1 or COHORT not in run_file.names(file, "clients"):
        return {}
    rows = {r: run_file.values(file, "clients", COHORT, r, known=sums) for r in sorted({1, last})}
    return {r: frozenset(np.flatnonzero(row == 1).tolist()) for r, row in rows.items()}
