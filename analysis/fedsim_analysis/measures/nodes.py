"""Nodes of what `fedsim_analysis.open` gives, their columns as arrays, and one clear error for what the runs lack."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import xarray

    Runs = xarray.DataTree | xarray.Dataset

Numbers = NDArray[np.float64]

DIMENSIONS = {
    "rounds": ("run", "round"),
    "clients": ("run", "round", "client"),
    "layers": ("run", "round", "layer"),
    "timing": ("run", "round"),
    "speed": ("run", "round"),
    "partition": ("run", "client", "class"),
}


class Lacking(ValueError):
    """The runs have not what a measure needs; the message says what, and what they have."""


def node(runs: Runs, name: str) -> xarray.Dataset:
    """The node `name` of a DataTree, or the Dataset or node itself; `run` is a dimension of it, also where one run was selected."""
    found: Any = runs
    if is_tree(runs):
        if name not in runs.children:
            raise Lacking(f"the runs have no node {name!r}; they have {_listed(list(runs.children))}")
        found = runs[name]
    if hasattr(found, "to_dataset"):
        found = found.to_dataset()
    return found if "run" in found.dims else found.expand_dims("run")


def is_tree(runs: Runs) -> bool:
    """Whether it is the whole tree, not one of its nodes. TypeError for what is neither, such as a path."""
    if not hasattr(runs, "data_vars"):
        raise TypeError(f"a figure needs the runs that fedsim_analysis.open(…) gives, not a {type(runs).__name__}")
    return bool(getattr(runs, "children", ()))


def has(runs: Runs, place: str, name: str) -> bool:
    """Whether a run has measured the column at least once."""
    try:
        return bool(np.isfinite(column(runs, place, name)).any())
    except Lacking:
        return False


def column(runs: Runs, place: str, name: str) -> Numbers:
    """A column as float64, its dimensions in the order of DIMENSIONS; NaN where not measured."""
    found = node(runs, place)
    wanted = DIMENSIONS[place]
    if name not in found.data_vars or set(found[name].dims) - {"run"} != set(wanted) - {"run"}:
        there = sorted(str(key) for key, value in found.data_vars.items() if set(value.dims) - {"run"} == set(wanted) - {"run"})
        hint = "" if is_tree(runs) or there else f"; give the DataTree of fedsim_analysis.open(RUNS), or its node {place!r}"
        raise Lacking(f"the runs have no column {place}/{name}{hint or f'; they have {_listed(there)}'}")
    values = found[name]
    if "run" not in values.dims:
        values = values.expand_dims(run=found.sizes["run"])
    return np.asarray(values.transpose(*wanted).values, dtype=np.float64)


def of_run(runs: Runs, place: str, name: str, at: int, rounds: slice | NDArray[np.int64] = slice(None)) -> Numbers:
    """The rows of one run alone, (rounds, …), read now and no others with them."""
    one = node(runs, place).isel(run=[at], round=rounds)
    return column(one, place, name)[0]


def needed(runs: Runs, place: str, name: str) -> Numbers:
    """The column; Lacking where no run has measured it."""
    values = column(runs, place, name)
    if not np.isfinite(values).any():
        raise Lacking(f"no run has measured {place}/{name}")
    return values


def labels(runs: Runs, place: str, dimension: str) -> list[str]:
    """What the entries of a dimension are called: runs, layers, clients, classes."""
    found = node(runs, place)
    return [str(label) for label in found[dimension].values.tolist()]


def round_numbers(runs: Runs, place: str) -> NDArray[np.int64]:
    """The numbers of the rounds, the first being 0."""
    return np.asarray(node(runs, place)["round"].values, dtype=np.int64)


def along_runs(runs: Runs, place: str, name: str) -> list[Any] | None:
    """A coordinate along `run`, such as `seed` or `method.density`, as plain values; None where there is none."""
    found = node(runs, place)
    if name not in found.coords or found[name].dims not in ((), ("run",)):
        return None
    return list(np.broadcast_to(found[name].values, found.sizes["run"]).tolist())


def place_of(runs: Runs, place: str, label: str) -> int:
    """Where the run of this label stands; Lacking that lists the labels."""
    known = labels(runs, place, "run")
    if label not in known:
        raise Lacking(f"there is no run {label!r}; the runs are {_listed(known)}")
    return known.index(label)


def _listed(names: list[str]) -> str:
    return ", ".join(names) or "none"
