"""Code that a job uses and that is not fedsim's: a run does not continue under other code than it began with."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from hashlib import sha256
from importlib import import_module
from importlib.metadata import EntryPoint
from pathlib import Path

from fedsim.config import imported_files, method_registry
from fedsim.config.job import Job
from fedsim.core import entry_points
from fedsim.data.partition import NAMES
from fedsim.data.settings import AUGMENTS
from fedsim.errors import BadInput
from fedsim.models import FAMILIES


def names(job: Job) -> list[str]:
    """How the job names what is not fedsim's: a method, a model, a data set and others."""
    offers = [f"{entry.name!r} ({entry_points.source(entry)})" for entry in _offers(job)]
    return [*_places(job), *offers]


def digest(job: Job) -> str:
    """SHA-256 of the files of that code and of what it imports; empty where all is fedsim's. Of an installed package every file of Python
    counts, but not the packages that it imports.
    """
    files = [file for place in _places(job) for file in (_file(place).resolve(), *imported_files.of(place.partition(":")[0]))]
    files = list(dict.fromkeys(files))
    files += [file for entry in _offers(job) for file in _files(entry)]
    return sha256(b"\n".join(file.read_bytes() for file in files)).hexdigest() if files else ""


def modules(job: Job) -> set[str]:
    """The modules of the job that are not fedsim's."""
    return {place.partition(":")[0] for place in _places(job)} | {entry.module for entry in _offers(job)}


def _places(job: Job) -> list[str]:
    """Each "package.module:name" of the job."""
    data, partition = job.data.factory, job.partition.name
    named = (job.method.name, job.model.factory, data, partition, job.train.aggregate, job.cohort.select)
    return [name for name in named if name and ":" in name]


def _file(place: str) -> Path:
    """The file of "package.module:name"; BadInput where there is none, as in a notebook."""
    module = import_module(place.partition(":")[0])
    try:
        return Path(inspect.getfile(module))
    except TypeError as error:
        fix = f"write it to a file, for example mine.py, and name it mine:{place.rpartition(':')[2]}"
        raise BadInput(f"{place} stands in no file, so that a run could not notice when it changes: {fix}") from error


def _offers(job: Job) -> Iterator[EntryPoint]:
    method, model, data, partition = job.method.name, job.model.name, job.data.name, job.partition.name
    used = [
        (entry_points.METHODS, method, ":" in method or method in method_registry.own_names()),
        (entry_points.MODELS, model, job.model.factory is not None or model in FAMILIES),
        (entry_points.PARTITIONS, partition, ":" in partition or partition in NAMES),
        (entry_points.DATASETS, data, job.data.factory is not None or data in AUGMENTS),
    ]
    for group, name, known in used:
        if not known and (entry := entry_points.find(group, name, name)) is not None:
            yield entry


def _files(entry: EntryPoint) -> list[Path]:
    """The files of the outermost package around the entry point's module that has a file; the module's own file where none has."""
    parts = entry.module.split(".")
    for count in range(1, len(parts) + 1):
        file = import_module(".".join(parts[:count])).__file__
        if file is not None:
            path = Path(file)
            return sorted(path.parent.rglob("*.py")) if path.name == "__init__.py" else [path]
    return []
