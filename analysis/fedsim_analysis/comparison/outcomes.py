"""What a comparison needs of each run: its job, some columns of /rounds, and cohorts of two rounds. No more of a file is read."""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from fedsim_analysis import checked, checksums, job_fields, run_file
from fedsim_analysis.checked import Damaged, need
from fedsim_analysis.comparison import jobs

Columns = Mapping[str, NDArray[np.float64]]
COHORT = "in_cohort"
MANY = 20_000  # clients, whose cohorts are not read: [cohort] says enough of a population that is as large


@dataclass(frozen=True, eq=False)
class Outcome:
    """One run, rows 0 … `rounds`, which are complete."""

    path: Path
    seed: int
    job: jobs.Job  # all fields by dotted names
    attributes: Mapping[str, Any]
    columns: Columns  # of /rounds, (rounds + 1,) each, NaN where not measured; those that the file lacks are not here
    cohorts: Mapping[int, frozenset[int]]  # of round 1 and the last one; empty where the file has none, and of very many clients
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
        if (place := Path(os.path.realpath(path))) in seen:
            same = f" (as {seen[place]})" if str(seen[place]) != str(path) else ""
            raise ValueError(f"{path} is given twice{same}: leave one out")
        seen[place] = path
    return [_outcome(Path(path), columns, others) for path in seen.values()]


def _outcome(path: Path, columns: Collection[str], others: Collection[str]) -> Outcome:
    def outcome(file: h5py.File) -> Outcome:
        known = run_file.attributes(file)
        job, seed = job_fields.flat(run_file.job(known)), int(run_file.one(known, "seed"))
        table = Checksums(file, int(known["rounds"]) + 1)
        there = run_file.names(file, "rounds")
        for missing in checksums.missing("rounds", there, table.paths):
            raise Damaged(f"{missing} is missing")
        wanted = [name for name in there if name in columns or name in others]
        group = checked.needed(file, "rounds")
        found = {name: _column(file, group, name, table) for name in wanted}
        units = {name: run_file.about(file, "rounds", name)[0] for name in wanted if name in others}
        return Outcome(path, seed, job, known, found, _cohorts(file, table), tuple(there), units)

    return run_file.read(path, outcome, time.sleep)


class Checksums:
    """The checksums of all columns, read once; `run_file.values` reads them for each column, which is slow for hundreds of files."""

    def __init__(self, file: h5py.File, rounds: int) -> None:
        self.rounds = rounds  # complete ones
        self.former = run_file.is_former(file)
        self.paths = checksums.columns(file)
        place, shape = f"{checksums.GROUP}/{checksums.ROWS}", (None, len(self.paths))
        self._rows = checked.dataset(file, place, "u", shape, filled=True)[:rounds] if self.paths else None

    def check(self, path: str, values: NDArray[np.float64], first: int = 0) -> NDArray[np.float64]:
        """The values of the column at `path` from round `first` on, if they are what was written."""
        if self._rows is None or path not in self.paths:
            return values
        stored = self._rows[first : first + len(values), self.paths.index(path)]
        need(len(stored) == len(values), f"{path} has more rows than {checksums.GROUP}/{checksums.ROWS}")
        wrong = np.flatnonzero(stored != checksums.of_rows(path, values))
        need(not len(wrong), f"{path} is damaged in round {checksums.rounds(wrong + first)}: its checksum is another")
        return values


def _column(file: h5py.File, group: h5py.Group, name: str, table: Checksums) -> NDArray[np.float64]:
    if table.former:
        return run_file.values(file, "rounds", name, known=table.paths)
    path = f"rounds/{name}"
    found = checked.dataset(group, name, checked.NUMBERS, (None,), filled=True)
    need(len(found) >= table.rounds, f"{path} has {len(found)} rows, and round {table.rounds - 1} is done")
    return table.check(path, _read(found, slice(0, table.rounds), path))


def _cohorts(file: h5py.File, table: Checksums) -> dict[int, frozenset[int]]:
    path, last = f"clients/{COHORT}", table.rounds - 1
    if last < 1 or table.former or checked.item(file, path) is None:
        return {}
    found = checked.dataset(file, path, checked.NUMBERS, (None, None), filled=True)
    if found.shape[1] > MANY:
        return {}
    need(len(found) > last, f"{path} has {len(found)} rows, and round {last} is done")
    rows = {r: table.check(path, _read(found, slice(r, r + 1), path), r)[0] for r in sorted({1, last})}
    return {r: frozenset(np.flatnonzero(row == 1).tolist()) for r, row in rows.items()}


def _read(found: h5py.Dataset, rows: slice, path: str) -> NDArray[np.float64]:
    try:
        return np.asarray(found[rows], np.float64)
    except OSError as error:
        raise Damaged(f"{path} is damaged") from error
