"""A run as a MAT file (version 5), which MATLAB and Octave open by `load` alone; names of layers, clients and classes are cells of text."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from itertools import chain, count
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.io import savemat

from fedsim_analysis import run_file
from fedsim_analysis.dataset.sources import Source
from fedsim_analysis.export import place, tables

BEGIN = b"MATLAB 5.0 MAT-file, "  # how MATLAB knows it
MARK = b"run file of fedsim "
HEAD = 116  # bytes of text at the beginning; scipy writes the time there, and we write what it is
LONGEST = 63  # signs of a name in MATLAB
MOST = 2**31  # bytes of a variable in such a file


def write(source: Source, out: Path) -> list[str]:
    """Writes the file `out`; a line for each variable. Raises place.Refused, also where a variable is larger than a MAT file can hold."""
    with place.aside(out, is_folder=False, is_ours=_is_ours) as path:
        made = {group: _columns(source, group, out) for group in run_file.DIMENSIONS if source.columns[group]}
        if source.counts:
            made["partition"] = _partition(source)
        abouts = {group: source.columns[group] for group in made if group in source.columns}
        made["units"] = {group: _named((name, _text(units)) for name, (units, _) in known.items()) for group, known in abouts.items()}
        made["long_name"] = {group: _named((name, _text(about)) for name, (_, about) in known.items()) for group, known in abouts.items()}
        made["attributes"] = _named((name, _plain(value)) for name, value in source.attributes.items() if name != "crc32")
        savemat(path, made, appendmat=False, long_field_names=True, do_compression=True, oned_as="column")
        with path.open("r+b") as file:
            file.write((BEGIN + MARK + str(source.attributes.get("fedsim_version", "")).encode()).ljust(HEAD)[:HEAD])
    return [f"{out}", *(f"  {group:<10} {len(found)} fields" for group, found in made.items())]


def _is_ours(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(HEAD).startswith(BEGIN + MARK)


def _columns(source: Source, group: str, out: Path) -> dict[str, Any]:
    """The labels of a group, and its columns: (rounds, …), NaN where not measured."""
    wide = {"clients": source.clients, "layers": len(source.layers)}.get(group)
    size = 8 * source.rows * (wide or 1) * len(source.columns[group])
    if size >= MOST:
        raise place.Refused(
            f"{out} cannot hold {group}: it has {size / 1e9:.1f} GB, and a MAT file at most 2 GB in a variable; --to parquet can"
        )
    labels: dict[str, Any] = {"round": np.arange(source.rows, dtype=np.float64)}
    if group == "layers":
        labels["layer"] = _cells(source.layers)
    if group == "clients":
        labels |= _called(source, "client", source.clients) | ({"device": _cells(source.kinds)} if source.kinds else {})
    values = tables.rows(source, group, np.arange(source.rows)) if source.rows else {name: np.empty(0) for name in source.columns[group]}
    return _named([*labels.items(), *((name, each.reshape(-1, wide) if wide else each) for name, each in values.items())])


def _partition(source: Source) -> dict[str, Any]:
    assert source.counts
    clients, classes = source.counts
    found = _called(source, "client", clients) | _called(source, "class", classes)
    return found | {"counts": np.asarray(source.read(tables.counts), np.float64)}


def _called(source: Source, dimension: str, size: int) -> dict[str, Any]:
    """The numbers of clients or classes, and what the data set called them."""
    names = {f"{dimension}_name": _cells(source.names[dimension])} if dimension in source.names else {}
    return {dimension: np.arange(size, dtype=np.float64), **names}


def _cells(texts: Iterable[str]) -> NDArray[np.object_]:
    return np.array([_text(str(text)) for text in texts], dtype=object)


def _text(text: str) -> str:
    """Text with as many blanks at its end as its UTF-8 has more bytes than it has signs: Octave takes so many bytes as there are signs."""
    return text + " " * (len(text.encode()) - len(text))


def _plain(value: Any) -> Any:
    """Numbers as doubles, with which MATLAB computes."""
    return _text(value) if isinstance(value, str) else float(value)


def _named(values: Iterable[tuple[str, Any]] | Mapping[str, Any]) -> dict[str, Any]:
    """By names that MATLAB takes: letters, digits and _, a letter first, at most 63 signs; each once."""
    found: dict[str, Any] = {}
    for text, value in dict(values).items():
        name = re.sub(r"\W", "_", text, flags=re.ASCII)
        name = (name if name[:1].isalpha() else f"x{name}")[:LONGEST]
        others = (f"{name[: LONGEST - 1 - len(str(number))]}_{number}" for number in count(2))
        found[next(each for each in chain([name], others) if each not in found)] = value
    return found
