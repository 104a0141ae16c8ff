"""A run file as tables: attributes, rounds as a DataFrame, clients and layers when they are asked for."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd

from fedsim_analysis import checked, checksums, run_file


@dataclass(frozen=True)
class Run:
    """One run, rows 0 … `attributes["rounds"]`, which are complete. A part of a further row, of a run that goes on, is left out."""

    path: Path
    attributes: dict[str, Any]  # as the file has them; `job` reads the job in them under the present names
    rounds: pd.DataFrame  # a row per round, a column per measure; NaN where not measured

    @property
    def job(self) -> dict[str, Any]:
        """The resolved job."""
        try:
            return run_file.job(self.attributes)
        except checked.Damaged as error:
            raise run_file.Unreadable(f"{self.path} is damaged: {error}") from error

    def clients(self, name: str) -> pd.DataFrame:
        """(rounds, clients) of a column, read now; clients never measured are left out."""
        return self._table("clients", name, "client").dropna(axis="columns", how="all")

    def layers(self, name: str) -> pd.DataFrame:
        """(rounds, layers) of a column, read now."""
        return self._table("layers", name, "layer")

    def timing(self) -> pd.DataFrame:
        """(rounds, phases) in seconds, read now."""
        return run_file.read(self.path, lambda file: _columns(file, "timing")[: len(self.rounds)], time.sleep)

    def units(self, group: str = "rounds") -> dict[str, str]:
        """The unit of every column of "rounds", "clients", "layers" or "timing"."""

        def units(file: h5py.File) -> dict[str, str]:
            return {name: run_file.about(file, group, name)[0] for name in run_file.names(file, group)}

        return run_file.read(self.path, units, time.sleep)

    def _table(self, group: str, name: str, axis: str) -> pd.DataFrame:
        def table(file: h5py.File) -> pd.DataFrame:
            rows = run_file.values(file, group, name)[: len(self.rounds)]
            return pd.DataFrame(rows, index=self.rounds.index, columns=pd.Index(checksums.labels(file, axis), name=axis))

        return run_file.read(self.path, table, time.sleep)


def load(path: str | Path) -> Run:
    """The run at `path`. Raises FileNotFoundError, and ValueError for what is damaged, of a newer format or no run file."""
    return run_file.read(path, lambda file: Run(Path(path), run_file.attributes(file), _columns(file, "rounds")), time.sleep)


def _columns(file: h5py.File, group: str) -> pd.DataFrame:
    index = pd.Index(np.arange(checked.attribute(file, "rounds") + 1), name="round")
    known, there = checksums.columns(file), run_file.all_names(file, group)
    return pd.DataFrame({name: run_file.values(file, group, name, known=known) for name in there}, index=index)
