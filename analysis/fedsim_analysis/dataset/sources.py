"""What `open` knows of each run before it reads a single column."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import h5py

from fedsim_analysis import checked, checksums, job_fields, masks, run_file

KINDS = "devices/kind"
Columns = Mapping[str, tuple[str, str]]  # by name: unit and description


@dataclass(frozen=True)
class Source:
    """A run file as it stood when it was opened. `rows`: its complete rounds, round 0 among them."""

    path: Path
    label: str
    attributes: Mapping[str, Any]
    rows: int
    columns: Mapping[str, Columns]  # by group
    sums: Sequence[str]  # the columns that have checksums
    layers: Sequence[str]
    clients: int
    counts: tuple[int, int] | None  # (clients, classes) of /partition/counts
    names: Mapping[str, Sequence[str]]  # "client", "class" -> their names, where the data set has some
    kinds: Sequence[str]  # the kind of each client's device; empty where they have none
    masks: Mapping[str, Sequence[int]]  # weight -> shape, of all masks that were ever in force
    changed: frozenset[str]  # weights whose mask had several shapes
    mask_rounds: Sequence[int]

    @property
    def job(self) -> dict[str, Any]:
        """The fields of its job, by dotted names."""
        return job_fields.flat(run_file.job(self.attributes))

    def read(self, what: Any) -> Any:
        """`what` of its open file."""
        return run_file.read(self.path, what, time.sleep)


def files(runs: str | Path | Iterable[str | Path]) -> list[Path]:
    """The run files that are meant: of a folder all that end in .h5. FileNotFoundError where there is none."""
    each = [runs] if isinstance(runs, str | Path) else list(runs)
    found: list[Path] = []
    for path in map(Path, each):
        inside = sorted(path.glob("*.h5")) if path.is_dir() else [path]
        if not inside:
            raise FileNotFoundError(f"there is no run file (*.h5) in the folder {path}")
        found += inside
    if not found:
        raise FileNotFoundError("there are no run files to open; name run files, or folders of run files")
    return list(dict.fromkeys(found))


def sources(paths: Sequence[Path]) -> list[Source]:
    """Each run, labelled by its file's name."""
    return [run_file.read(path, partial(_source, path=path, label=label), time.sleep) for path, label in labelled(paths).items()]


def labelled(paths: Sequence[Path]) -> dict[Path, str]:
    """The stem of each file's name; with as many folders before it as tell the files apart."""
    found = {path: path.stem for path in paths}
    for depth in range(1, 16):
        taken = Counter(found.values())
        if len(taken) == len(found):
            break
        for path, label in found.items():
            if taken[label] > 1:
                found[path] = "/".join([*path.absolute().parts[-1 - depth : -1], path.stem])
    return found


def _source(file: h5py.File, path: Path, label: str) -> Source:
    known = run_file.attributes(file)
    sums = checksums.columns(file)
    shapes, changed, stored = mask_shapes(file, int(known["rounds"]))
    counts = checked.dataset(file, "partition/counts", "iu", (None, None)).shape if checksums.has(file, "partition/counts") else None
    return Source(
        path=path,
        label=label,
        attributes=known,
        rows=int(known["rounds"]) + 1,
        columns={group: run_file.abouts(file, group, sums) for group in run_file.DIMENSIONS},
        sums=sums,
        layers=[str(name) for name in checksums.labels(file, "layer")],
        clients=checked.dataset(file, "client", "iu", (None,)).shape[0],
        counts=counts,
        names={
            dimension: checksums.labels(file, at)
            for dimension in ("client", "class")
            if checksums.has(file, at := f"partition/{dimension}_name")
        },
        kinds=_kinds(file, known),
        masks=shapes,
        changed=changed,
        mask_rounds=stored,
    )


def _kinds(file: h5py.File, known: Mapping[str, Any]) -> list[str]:
    """(clients,) names of the kinds of their devices, or none."""
    if not checksums.has(file, KINDS):
        return []
    numbers = checked.numbers(file, KINDS, "iu", checked.dataset(file, "client", "iu", (None,)).shape)
    checksums.check_once(file, KINDS, checksums.of_array(numbers))
    try:
        names = [str(kind["name"]) for kind in json.loads(known["devices"])["kinds"]]
        return [names[number] for number in numbers]
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise checked.Damaged("the attribute 'devices' does not describe the kinds in /devices/kind") from error


def mask_shapes(file: h5py.File, last: int) -> tuple[dict[str, list[int]], frozenset[str], list[int]]:
    """The shapes of the masks up to the round `last`, the weights whose mask changed its shape, and the rounds with new masks."""
    stored = [r for r in masks.stored_rounds(file) if r <= last]
    shapes: dict[str, list[int]] = {}
    changed: set[str] = set()
    for layout in dict.fromkeys(checked.attribute(checked.dataset(file, f"masks/{r}", "u", (None,)), "tensors") for r in stored):
        for key, shape in masks.shapes(layout).items():
            name = key.removeprefix(masks.PREFIX)
            if shapes.setdefault(name, shape) != shape:
                changed.add(name)
    return shapes, frozenset(changed), stored
