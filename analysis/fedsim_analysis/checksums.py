"""CRC-32 of what a run file holds, so that a bit that flipped on a disk is seen.

/checksums/columns (C,)      the columns "group/name" of "rounds", "layers", "timing" and "speed"
/checksums/rows (rounds, C)  of the bytes of each of their rows

HDF5's own checksum (fletcher32) covers a chunk of a thousand rows, which every new row rewrites: a kill within that write would take the
rows before it too. Here a checksum covers the row alone. Columns of the clients are packed with zlib, which has a checksum of its own
(HDF5's index of their chunks has none: a bit that flips there can move or hide values of clients);
masks and gates have theirs in an attribute, and the model in `weights_sha256`. The file's attributes have theirs in its attribute `crc32`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any
from zlib import crc32

import h5py
import numpy as np
from numpy.typing import NDArray

from fedsim_analysis import checked
from fedsim_analysis.checked import need

GROUP, COLUMNS, ROWS = "checksums", "columns", "rows"
GROUPS = ("rounds", "layers", "timing", "speed")  # whose rows have checksums
CHUNK = 64  # rows in a chunk, which every row writes anew
NAME = "crc32"  # the attribute of what is written once; of the file: JSON of the name of each attribute and its checksum
COUNTER = "rounds"  # the one attribute that is written again and again, and has no checksum


def of_rows(values: NDArray[np.float64]) -> NDArray[np.uint32]:
    """(rows,) of values (rows, …)."""
    raw, width = values.astype("<f8").tobytes(), values[:1].nbytes
    return np.array([crc32(raw[begin : begin + width]) for begin in range(0, len(raw), max(width, 1))] or [0] * len(values), np.uint32)


def columns(file: h5py.File) -> list[str]:
    """The columns that have checksums, in the order of /checksums/rows; none in a file of a writer that made none."""
    return labels(file, f"{GROUP}/{COLUMNS}") if checked.group(file, GROUP) else []


def missing(group: str, found: Sequence[str], known: Sequence[str]) -> list[str]:
    """The columns of a group that have checksums and are not among those that were `found`. `known`: `columns` of this file."""
    return [path for path in known if path.partition("/")[0] == group and path.partition("/")[2] not in found]


def check_rows(file: h5py.File, path: str, values: NDArray[np.float64], first: int, known: Sequence[str]) -> None:
    """That the rows of the column at `path`, from row `first` on, are as they were written. `known`: `columns` of this file."""
    if path not in known:
        return
    stored = checked.dataset(file, f"{GROUP}/{ROWS}", "u", (None, len(known)), filled=True)  # its next chunk may not be there yet
    need(stored.shape[0] >= first + len(values), f"{GROUP}/{ROWS} has {stored.shape[0]} rows and {path} has more")
    wrong = np.flatnonzero(stored[first : first + len(values), known.index(path)] != of_rows(values))
    if len(wrong):
        raise checked.Damaged(f"{path} is damaged in round {rounds(wrong + first)}: its checksum is another; all other columns can be read")


def rounds(wrong: NDArray[np.integer]) -> str:
    return ", ".join(map(str, wrong[:5].tolist())) + (" …" if len(wrong) > 5 else "")


def of(*parts: bytes) -> int:
    """Of what is written once."""
    found = 0
    for part in parts:
        found = crc32(part, found)
    return found


def check(owner: h5py.Group | h5py.Dataset, *parts: bytes) -> None:
    """That these are the bytes that were written; nothing where the writer made no checksum."""
    expected = checked.attribute(owner, NAME)
    need(expected is None or expected == of(*parts), f"{str(owner.name).lstrip('/')} is damaged: its checksum is another")


def check_attributes(found: Mapping[str, Any]) -> None:
    """That the attributes of the file are those that were written; nothing where the writer made no checksums."""
    if found.get(NAME) is None:
        return
    for name, expected in checked.from_json(found[NAME], f"the attribute {NAME!r}").items():
        need(name in found, f"the attribute {name!r} is missing")
        need(expected == _of_value(found[name]), f"the attribute {name!r} is damaged: its checksum is another")


def put_attributes(file: h5py.File) -> None:
    """The checksums of the file's attributes as they are now. Only where the file is not the one that readers see."""
    named = [name for name in file.attrs if name not in (NAME, COUNTER)]
    file.attrs[NAME] = json.dumps({name: _of_value(checked.attribute(file, name)) for name in named})


def _of_value(value: Any) -> int:
    return crc32(repr(value).encode())


def labels(file: h5py.File, path: str) -> list[Any]:
    """What the rows of a dimension are called: numbers or texts."""
    found = checked.labels(file, path)
    check(file[path], *(str(label).encode() + b"\n" for label in found))
    return found


def put_labels(file: h5py.File, path: str, names: Sequence[str]) -> h5py.Dataset:
    """Stores names, with their checksum."""
    stored = file.create_dataset(path, data=np.array(list(names), dtype=h5py.string_dtype()))
    stored.attrs[NAME] = of(*(name.encode() + b"\n" for name in names))
    return stored


def lay_out(file: h5py.File, paths: Sequence[str]) -> None:
    """Checksums of these columns too, of the rows that there are. Only where the file is not the one that readers see."""
    known = columns(file)
    new = [path for path in paths if path.partition("/")[0] in GROUPS and path not in known]
    if not new and known:
        return
    rows = len(file["round"])
    table = np.column_stack([*(file[GROUP][ROWS][:].T if known else ()), *(of_rows(file[path][:rows]) for path in new)])
    if known:
        del file[GROUP]
    put_labels(file, f"{GROUP}/{COLUMNS}", [*known, *new])
    shape = (rows, len(known) + len(new))
    file[GROUP].create_dataset(ROWS, shape, np.uint32, table.reshape(shape), maxshape=(None, shape[1]), chunks=(CHUNK, max(shape[1], 1)))
