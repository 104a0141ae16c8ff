"""A run file as tables: attributes, rounds as a DataFrame, clients and layers when they are asked for."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd

from fedsim_analysis import former_names

FORMAT = 2  # of the run files read here; format 1 is read under the names of format 2


@dataclass(frozen=True)
class Run:
    """One run, rows 0 … `attributes["rounds"]`, which are complete. A part of a further row, of a run that goes on, is left out."""

    path: Path
    attributes: dict[str, Any]  # as the file has them; `job` reads the job in them under the present names
    rounds: pd.DataFrame  # a row per round, a column per measure; NaN where not measured

    @property
    def job(self) -> dict[str, Any]:
        """The resolved job."""
        table = tomllib.loads(self.attributes.get("job", ""))
        return former_names.job(table) if self.attributes["format_version"] < FORMAT else table

    def clients(self, name: str) -> pd.DataFrame:
        """(rounds, clients) of a column, read now; clients never measured are left out."""
        return self._table("clients", name, "client").dropna(axis="columns", how="all")

    def layers(self, name: str) -> pd.DataFrame:
        """(rounds, layers) of a column, read now."""
        return self._table("layers", name, "layer")

    def timing(self) -> pd.DataFrame:
        """(rounds, phases) in seconds, read now."""
        with h5py.File(self.path, "r", locking=False) as file:
            return _columns(file, "timing", len(self.rounds))

    def units(self, group: str = "rounds") -> dict[str, str]:
        """The unit of every column of "rounds", "clients", "layers" or "timing"."""
        with h5py.File(self.path, "r", locking=False) as file:
            return {name: column.attrs["units"] for name, column in _found(file, group).items()}

    def _table(self, group: str, name: str, axis: str) -> pd.DataFrame:
        with h5py.File(self.path, "r", locking=False) as file:
            columns = _found(file, group)
            if name not in columns:
                raise KeyError(f"{self.path} has no {group}/{name}; it has {', '.join(columns)}")
            labels = pd.Index([_plain(label) for label in file[axis][()].tolist()], name=axis)
            return pd.DataFrame(columns[name][: len(self.rounds)], index=self.rounds.index, columns=labels)


def load(path: str | Path) -> Run:
    """The run at `path`. Raises FileNotFoundError, OSError for what is no HDF5 file, ValueError for another kind or a newer format."""
    with h5py.File(path, "r", locking=False) as file:
        attributes = {name: _plain(value) for name, value in file.attrs.items()}
        if "format_version" not in attributes:
            raise ValueError(f"{path} is no run file of fedsim")
        if attributes["format_version"] > FORMAT:
            raise ValueError(f"{path} was written by fedsim {attributes.get('fedsim_version')} in a newer format; upgrade fedsim_analysis")
        return Run(Path(path), attributes, _columns(file, "rounds", attributes["rounds"] + 1))


def _columns(file: h5py.File, group: str, rows: int) -> pd.DataFrame:
    index = pd.Index(file["round"][:rows], name="round")
    return pd.DataFrame({name: column[:rows] for name, column in _found(file, group).items()}, index=index)


def _found(file: h5py.File, group: str) -> dict[str, h5py.Dataset]:
    """The columns of a group under their present names."""
    former = former_names.COLUMNS if file.attrs["format_version"] < FORMAT else {}
    return {former.get(f"{group}/{name}", name): column for name, column in file[group].items() if name not in ("round", "client", "layer")}


def _plain(value: Any) -> Any:
    value = value.item() if isinstance(value, np.generic) else value
    return value.decode().strip() if isinstance(value, bytes) else value
