"""CRC-32 of what a run file holds, so that a bit that flipped on a disk is seen.

/checksums/columns (C,)      the columns "group/name", and "masks" and "client_gates"
/checksums/rows (rounds, C)  of each of their rows: of its bytes, and of a row of clients of the ids and the values that were measured;
                             of the masks and the gates that are in force after the round
/checksums/about (C,)        of the unit and the description of each

HDF5's own checksum (fletcher32) covers a chunk of a thousand rows, which every new row rewrites: a kill within that write would take the
rows before it too. Here a checksum covers the row alone. Masks and gates have theirs in an attribute, and the model in `weights_sha256`.
The attribute `crc32` of the file has those of its attributes, and of the arrays that are written once, by their paths from "/" on.
Files of earlier writers lack some of these or all, and are read without.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any
from zlib import crc32

import h5py
import numpy as np
from numpy.typing import NDArray

from fedsim_analysis import checked
from fedsim_analysis.checked import need

GROUP, COLUMNS, ROWS, ABOUT = "checksums", "columns", "rows", "about"
CLIENTS = "clients/"
IN_FORCE = ("masks", "client_gates")  # what may change in each round
CHUNK = 64  # rows in a chunk, which every row writes anew
NAME = "crc32"  # the attribute of what is written once; of the file: JSON of the name of each attribute and its checksum
COUNTER = "rounds"  # the one attribute that is written again and again, and has no checksum


def of_rows(path: str, values: NDArray[np.float64]) -> NDArray[np.uint32]:
    """(rows,) of values (rows, …) of the column at `path`."""
    if path.startswith(CLIENTS):
        measured = ((np.flatnonzero(~np.isnan(row)), row) for row in values)
        return np.array([of_clients(ids, row[ids]) for ids, row in measured], np.uint32)
    raw, width = values.astype("<f8").tobytes(), values[:1].nbytes
    return np.array([crc32(raw[begin : begin + width]) for begin in range(0, len(raw), max(width, 1))] or [0] * len(values), np.uint32)


def of_clients(ids: NDArray[np.integer], values: NDArray[np.float64]) -> int:
    """Of a row of a column of the clients: their numbers, rising, and their values."""
    return crc32(values.astype("<f8", copy=False).data, crc32(ids.astype("<i8", copy=False).data))


def scattered(column: h5py.Dataset) -> Iterator[tuple[int, NDArray[np.int64], NDArray[np.float64]]]:
    """What is stored of a column of the clients, row by row where there is something: (round, ids, values)."""
    places: list[tuple[int, int]] = []  # of the chunks: round, first client
    column.id.chunk_iter(lambda chunk: places.append(chunk.chunk_offset))
    for r, there in groupby(sorted(places), lambda place: place[0]):
        ids, values = [np.empty(0, np.int64)], [np.empty(0)]
        for _, start in there:
            chunk = column[r, start : start + column.chunks[1]].astype(np.float64, copy=False)
            real = np.flatnonzero(~np.isnan(chunk))
            ids.append(real + start)
            values.append(chunk[real])
        yield r, np.concatenate(ids), np.concatenate(values)


def columns(file: h5py.File) -> list[str]:
    """The columns that have checksums, in the order of /checksums/rows; none in a file of a writer that made none."""
    if not checked.group(file, GROUP):
        return []
    found = checked.labels(file, f"{GROUP}/{COLUMNS}")
    check(file[f"{GROUP}/{COLUMNS}"], *_parts(found))
    return found


def missing(group: str, found: Sequence[str], known: Sequence[str]) -> list[str]:
    """The columns of a group that have checksums and are not among those that were `found`. `known`: `columns` of this file."""
    return [path for path in known if path.partition("/")[0] == group and path.partition("/")[2] not in found]


def check_rows(file: h5py.File, path: str, values: NDArray[np.float64], first: int, known: Sequence[str]) -> None:
    """That the rows of the column at `path`, from row `first` on, are as they were written. `known`: `columns` of this file."""
    if path in known:
        _check(file, path, of_rows(path, values), first, known)


def check_in_force(file: h5py.File, path: str, r: int, found: int, known: Sequence[str] | None = None) -> None:
    """That the masks or the gates, of which `found` is the checksum, are those that were in force after round `r`."""
    known = columns(file) if known is None else known
    if r >= 0 and path in known:
        _check(file, path, np.array([found], np.uint32), r, known)


def client(file: h5py.File, path: str, number: int, rows: int, known: Sequence[str]) -> NDArray[np.float64]:
    """(rows,) of one client, from a column of the clients that has checksums: NaN where it was not measured."""
    found, sums = np.full(rows, np.nan), np.full(rows, of(), np.uint32)
    for r, ids, values in scattered(file[path]):
        if r < rows:
            sums[r] = of_clients(ids, values)
            found[r : r + 1] = values[ids == number] if number in ids else np.nan
    _check(file, path, sums, 0, known)
    return found


def _check(file: h5py.File, path: str, sums: NDArray[np.uint32], first: int, known: Sequence[str]) -> None:
    stored = checked.dataset(file, f"{GROUP}/{ROWS}", "u", (None, len(known)), filled=True)  # its next chunk may not be there yet
    need(stored.shape[0] >= first + len(sums), f"{GROUP}/{ROWS} has {stored.shape[0]} rows and {path} has more")
    wrong = np.flatnonzero(stored[first : first + len(sums), known.index(path)] != sums)
    if len(wrong):
        left = "" if path in IN_FORCE else "; all other columns can be read"
        raise checked.Damaged(f"{path} is damaged in round {rounds(wrong + first)}: its checksum is another{left}")


def abouts(file: h5py.File, known: Sequence[str]) -> dict[str, int]:
    """Of the unit and the description of each column; nothing where the writer made none. `known`: `columns` of this file."""
    if not known or checked.item(file, f"{GROUP}/{ABOUT}") is None:
        return {}
    return dict(zip(known, checked.numbers(file, f"{GROUP}/{ABOUT}", "u", (len(known),)).tolist(), strict=True))


def check_about(path: str, units: Any, about: Any, known: Mapping[str, int]) -> None:
    """That the unit and the description of the column at `path` are as they were written. `known`: `abouts` of this file."""
    need(known.get(path) in (None, _of_about(units, about)), f"the unit or the description of {path} is damaged")


def _of_about(units: Any, about: Any) -> int:
    return of(str(units).encode(), b"\n", str(about).encode())


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
    for name, expected in of_file(found.get(NAME)).items():
        if name.startswith("/"):
            continue
        need(name in found, f"the attribute {name!r} is missing")
        need(expected == _of_value(found[name]), f"the attribute {name!r} is damaged: its checksum is another")


def put_attributes(file: h5py.File) -> None:
    """The checksums of the file's attributes as they are now. Only where the file is not the one that readers see."""
    named = [name for name in file.attrs if name not in (NAME, COUNTER)]
    arrays = {name: sums for name, sums in of_file(checked.attribute(file, NAME)).items() if name.startswith("/") and name in file}
    put_attribute(file, NAME, json.dumps({name: _of_value(checked.attribute(file, name)) for name in named} | arrays))


def put_attribute(file: h5py.File, name: str, value: str | int | float) -> None:
    """Sets an attribute of the file; a bool as 0 or 1, since netCDF4 and ncdump leave bools out in silence.

    A text that takes the place of another is written over it. To set it anew would cost 4 KiB of the file at each opening.
    """
    if isinstance(value, str) and _is_text(file, name):
        file.attrs.modify(name, value)
    else:
        file.attrs[name] = int(value) if isinstance(value, bool | np.bool_) else value


def _is_text(file: h5py.File, name: str) -> bool:
    """Whether there is an attribute of this name that takes text of any length."""
    kind = h5py.check_string_dtype(file.attrs.get_id(name).dtype) if name in file.attrs else None
    return kind is not None and kind.length is None


def _of_value(value: Any) -> int:
    return crc32(repr(value).encode())


def of_file(text: Any) -> dict[str, Any]:
    """What the attribute `crc32` of the file holds."""
    return {} if text is None else checked.from_json(text, f"the attribute {NAME!r}")


def put_once(file: h5py.File, sums: Mapping[str, int]) -> None:
    """The checksums of what is written once, by path. Only where the file is not the one that readers see."""
    put_attribute(file, NAME, json.dumps(of_file(checked.attribute(file, NAME)) | {f"/{path}": found for path, found in sums.items()}))


def check_once(file: h5py.File, path: str, found: int) -> None:
    """That what stands at `path`, of which `found` is the checksum, is what was written; nothing where the writer made none."""
    need(of_file(checked.attribute(file, NAME)).get(f"/{path}") in (None, found), f"{path} is damaged: its checksum is another")


def has(file: h5py.File, path: str) -> bool:
    """Whether something stands there; Damaged where it was written, and is gone."""
    there = checked.item(file, path) is not None
    need(there or f"/{path}" not in of_file(checked.attribute(file, NAME)), f"{path} is missing")
    return there


def labels(file: h5py.File, path: str) -> list[Any]:
    """What the rows of a dimension are called: numbers or texts."""
    found = checked.labels(file, path)
    check(file[path], *_parts(found))
    check_once(file, path, of_array(found))
    return found


def of_array(values: Sequence[Any] | NDArray[Any]) -> int:
    """Of numbers or texts."""
    return of(*_parts(values))


def _parts(values: Sequence[Any] | NDArray[Any]) -> list[bytes]:
    if len(values) and not isinstance(values[0], str | bytes):
        return [np.asarray(values).astype("<i8").tobytes()]
    return [(value.encode() if isinstance(value, str) else value) + b"\n" for value in values]


def put_labels(file: h5py.File, path: str, names: Sequence[str]) -> h5py.Dataset:
    """Stores names, with their checksum."""
    stored = file.create_dataset(path, data=np.array(list(names), dtype=h5py.string_dtype()))
    stored.attrs[NAME] = of_array(names)
    return stored


def lay_out(file: h5py.File, paths: Sequence[str]) -> None:
    """Checksums of these columns too, of the rows that there are. Only where the file is not the one that readers see."""
    known = columns(file)
    new = [path for path in paths if path not in known]
    described = not known or ABOUT in file[GROUP]
    if known and described and not new:
        return
    rows, all_paths = len(file["round"]), [*known, *new]
    table = np.column_stack([*(file[GROUP][ROWS][:].T if known else ()), *(_of_column(file, path, rows) for path in new)])
    about = [*(file[GROUP][ABOUT][:] if known and described else _of_abouts(file, known)), *_of_abouts(file, new)]
    if known:
        del file[GROUP]
    put_labels(file, f"{GROUP}/{COLUMNS}", all_paths)
    shape = (rows, len(all_paths))
    file[GROUP].create_dataset(ROWS, shape, np.uint32, table.reshape(shape), maxshape=(None, shape[1]), chunks=(CHUNK, max(shape[1], 1)))
    file[GROUP].create_dataset(ABOUT, data=np.array(about, np.uint32))


def _of_column(file: h5py.File, path: str, rows: int) -> NDArray[np.uint32]:
    found = np.full(rows, of(), np.uint32)
    if path.startswith(CLIENTS):
        for r, ids, values in scattered(file[path]):
            found[r : r + 1] = of_clients(ids, values)  # none where the file has more than these rows
    elif path not in IN_FORCE:
        found = of_rows(path, file[path][:rows])
    return found


def _of_abouts(file: h5py.File, paths: Sequence[str]) -> list[int]:
    columns = [None if path in IN_FORCE else file[path] for path in paths]
    return [0 if at is None else _of_about(checked.attribute(at, "units"), checked.attribute(at, "long_name")) for at in columns]
