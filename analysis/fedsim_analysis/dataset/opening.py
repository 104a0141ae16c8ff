"""`open`: run files as one tree of labelled arrays."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np
import xarray as xr
from xarray.core import indexing

from fedsim_analysis import checked, job_fields, run_file
from fedsim_analysis.dataset import lazy
from fedsim_analysis.dataset.sources import Source, files, sources

Runs = str | Path | Iterable[str | Path]
Group = Literal["rounds", "clients", "layers", "timing", "speed", "partition", "devices", "masks"]
GROUPS = (*run_file.DIMENSIONS, "partition", "devices", "masks")
RESERVED = {"run", "round", "client", "layer", "class"}
FACTS = {  # of the attributes of a file: one value a run
    "job": "the resolved job, as TOML",
    "plan": "how the run is computed, as JSON",
    "fedsim_version": "fedsim that wrote the file",
    "git_commit": "commit of that fedsim",
    "torch_version": "torch that computed the run",
    "started_at": "when the run was started",
    "hosts": "machines that the run was on",
    "ranks": "MPI ranks",
    "partition_sha256": "SHA-256 of who holds which image",
    "weights_sha256": "SHA-256 of the final weights; empty before the end",
}
LABELS = {  # coordinates along `run`
    "method": "method of pruning",
    "seed": "seed of the job",
    "path": "run file",
    "rounds_done": "last complete round",
    "rounds_planned": "last round of the job",
    "finished": "whether the run has ended",
}


@overload
def open(runs: Runs, group: None = None) -> xr.DataTree: ...
@overload
def open(runs: Runs, group: Group) -> xr.Dataset: ...
def open(runs: Runs, group: str | None = None) -> xr.DataTree | xr.Dataset:
    """The complete rounds of one run file or of several, as labelled arrays that are read when they are used.

    runs: a run file, a folder of run files, or a list of these. group: "rounds", "clients", "layers", "timing", "speed", "partition",
    "devices" or "masks", for the Dataset of that node alone.

    The nodes of the tree have the variables of the groups of a run file, as float64 with `units` and `long_name` among their attrs:

    - `rounds`, `timing`, `speed`: (run, round); `clients`: (run, round, client); `layers`: (run, round, layer)
    - `partition`: `counts` (run, client, class), training images
    - `devices`: `kind` (run, client), the name of the kind of each client's device, empty where it has none
    - `masks`: for each weight with a mask, (run, round, …) booleans, True where it is kept after that round

    NaN stands where nothing was measured, and where a run is shorter or has fewer clients than others. Along `run` stand the label of each
    run (its file's name), `method`, `seed`, `path`, `rounds_done`, `rounds_planned`, `finished`, and under their dotted names the fields in
    which the jobs differ, such as `method.density`. The root has facts of each run: `job`, `torch_version`, `hosts` and others.

    No file stays open. The arrays show the rounds that were complete when `open` was called; call it again to see more of a run that
    goes on.

    Raises FileNotFoundError; ValueError for what is damaged, of a newer format or no run file, and for a wrong `group`.

        >>> import fedsim_analysis
        >>> tree = fedsim_analysis.open("runs")                            # doctest: +SKIP
        >>> tree["rounds"].accuracy.sel(run="quickstart").dropna("round")  # doctest: +SKIP
    """
    if group is not None and group not in GROUPS:
        raise ValueError(f"group={group!r}: a run file has {', '.join(GROUPS)}")
    found = sources(files(runs))
    labels = _run_labels(found)
    along = {name: value for name, value in labels.items() if name != "run"}  # which a node does not inherit
    nodes = {name: _node(found, name).assign_coords(along) for name in GROUPS}
    tree = xr.DataTree.from_dict({"/": _root(found, labels)} | nodes, name="runs")
    return tree if group is None else tree[group].to_dataset()


def _node(found: Sequence[Source], group: str) -> xr.Dataset:
    if group == "partition":
        return _partition(found)
    if group == "devices":
        return _devices(found)
    return _masks(found) if group == "masks" else _columns(found, group)


# --- coordinates


def _root(found: Sequence[Source], labels: Mapping[str, Any]) -> xr.Dataset:
    facts = {name: ("run", [_fact(source, name) for source in found], {"long_name": text}) for name, text in FACTS.items()}
    return xr.Dataset(facts, coords={**labels, **_number("round", _rounds(found))})


def _fact(source: Source, name: str) -> Any:
    return source.attributes.get(name, -1 if name == "ranks" else "")


def _run_labels(found: Sequence[Source]) -> dict[str, Any]:
    known: dict[str, list[Any]] = {
        "method": [_fact(source, "method") for source in found],
        "seed": [source.attributes.get("seed", -1) for source in found],
        "path": [str(source.path) for source in found],
        "rounds_done": [source.rows - 1 for source in found],
        "rounds_planned": [source.attributes.get("rounds_planned", -1) for source in found],
        "finished": [bool(source.attributes["finished"]) for source in found],
    }
    labels: dict[str, Any] = {"run": ("run", [source.label for source in found], {"long_name": "run"})}
    labels |= {name: ("run", values, {"long_name": LABELS[name]}) for name, values in known.items()}
    return labels | _job_fields(found)


def _job_fields(found: Sequence[Source]) -> dict[str, Any]:
    """The fields in which the jobs differ: numbers or truth values where all are, else text, empty where a job has no such field."""
    jobs = [_job(source) for source in found]
    known = ("method.name", "rounds")  # which are `method` and `rounds_planned`; a node has the name `rounds` too
    fields = [name for name in job_fields.differing([job_fields.fields(job) for job in jobs]) if name not in known]
    flat = [job_fields.flat(job) for job in jobs]
    return {name: ("run", _alike([job.get(name) for job in flat]), {"long_name": f"field {name} of the job"}) for name in fields}


def _job(source: Source) -> dict[str, Any]:
    try:
        return run_file.job(source.attributes)
    except checked.Damaged as error:
        raise run_file.Unreadable(f"{source.path} is damaged: {error}") from error


def _alike(values: list[Any]) -> list[Any]:
    if all(isinstance(value, bool) for value in values):
        return values
    if all(value is None or (isinstance(value, int | float) and not isinstance(value, bool)) for value in values):
        return [np.nan if value is None else value for value in values]
    return ["" if value is None else value if isinstance(value, str) else repr(value) for value in values]


def _number(dimension: str, size: int) -> dict[str, Any]:
    return {dimension: (dimension, np.arange(size), {"long_name": dimension})}


def _rounds(found: Sequence[Source]) -> int:
    return max(source.rows for source in found)


def _names(found: Sequence[Source], dimension: str) -> dict[str, Any]:
    """The names of clients or classes, where the data set has some and all runs have the same."""
    named = [source.names.get(dimension) for source in found]
    if not named[0] or any(names != named[0] for names in named):
        return {}
    return {f"{dimension}_name": (dimension, list(named[0]), {"long_name": f"name of the {dimension}"})}


# --- nodes


def _columns(found: Sequence[Source], group: str) -> xr.Dataset:
    coords, shape, labels = _axis(found, group)
    dimensions = ("run", *run_file.DIMENSIONS[group])
    known: dict[str, Mapping[str, str]] = {}
    for source in found:
        for name, (units, text) in source.columns[group].items():
            known.setdefault(name, {"units": units, "long_name": text})
    arrays = {name: lazy.Column(found, group, name, shape, labels) for name in sorted(known)}
    return xr.Dataset({name: _variable(dimensions, array, known[name]) for name, array in arrays.items()}, coords=coords)


def _axis(found: Sequence[Source], group: str) -> tuple[dict[str, Any], tuple[int, ...], list[str]]:
    """The coordinates beside run and round, the shape of a column, and the names of the layers."""
    shape: tuple[int, ...] = (len(found), _rounds(found))
    if group == "clients":
        clients = max(source.clients for source in found)
        return _number("client", clients) | _names(found, "client"), (*shape, clients), []
    if group == "layers":
        layers = list(dict.fromkeys(name for source in found for name in source.layers))
        return {"layer": ("layer", layers, {"long_name": "layer"})}, (*shape, len(layers)), layers
    return {}, shape, []


def _partition(found: Sequence[Source]) -> xr.Dataset:
    sizes = [source.counts for source in found if source.counts]
    if not sizes:
        return xr.Dataset()
    clients, classes = (max(each) for each in zip(*sizes, strict=True))
    about = {"units": "1", "long_name": "training images"}
    counts = _variable(("run", "client", "class"), lazy.Counts(found, (len(found), clients, classes)), about)
    coords = _number("client", clients) | _number("class", classes)
    same = clients == max(source.clients for source in found)
    return xr.Dataset({"counts": counts}, coords=coords | (_names(found, "client") if same else {}) | _names(found, "class"))


def _devices(found: Sequence[Source]) -> xr.Dataset:
    clients = max(len(source.kinds) for source in found)
    if not clients:
        return xr.Dataset()
    kinds = np.array([[*source.kinds, *[""] * (clients - len(source.kinds))] for source in found])
    kind = xr.Variable(("run", "client"), kinds, {"long_name": "kind of the client's device"})
    return xr.Dataset({"kind": kind}, coords=_number("client", clients))


def _masks(found: Sequence[Source]) -> xr.Dataset:
    """Masks whose weight has one shape in all runs and rounds. A run without masks keeps all weights."""
    shapes: dict[str, set[tuple[int, ...]]] = {}
    for source in found:
        for name, shape in source.masks.items():
            shapes.setdefault(name, set()).add(tuple(shape))
    apart = {name for name, each in shapes.items() if len(each) > 1}
    apart |= {name for source in found for name in source.changed}
    apart |= {name for source in found for name in shapes if name.removesuffix(".weight") not in source.layers}
    size = (len(found), _rounds(found))
    arrays = {name: lazy.Masks(found, name, (*size, *shapes[name].copy().pop())) for name in shapes if name not in apart}
    called = {name: name.replace("/", "|") for name in arrays}  # torch allows / in names, and a tree of xarray does not
    variables = {
        called[name]: _variable(("run", "round", *_axes(called[name], array)), array, {"long_name": f"kept weights of {name}"})
        for name, array in arrays.items()
    }
    left_out = {"left_out": f"of several shapes, or of layers that a run has not: {', '.join(sorted(apart))}"} if apart else {}
    return xr.Dataset(variables, attrs=left_out)


def _axes(name: str, array: lazy.OverRuns) -> list[str]:
    """The axes of a weight."""
    return [f"{name}_{axis}" for axis in range(len(array.shape) - 2)]


def _variable(dimensions: Sequence[str], array: lazy.OverRuns, about: Mapping[str, str]) -> xr.Variable:
    return xr.Variable(dimensions, indexing.MemoryCachedArray(indexing.LazilyIndexedArray(array)), dict(about))
