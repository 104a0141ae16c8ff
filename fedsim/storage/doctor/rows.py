"""The rows of a damaged run file: which there are, and which of their values are as they were written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import h5py
import numpy as np
from fedsim_analysis import checked, checksums
from numpy.typing import NDArray

from fedsim.storage.doctor.complaints import FAULTS
from fedsim.storage.doctor.correction import corrected_row
from fedsim.storage.layout import ROWS

HALF = 0.5  # of the columns of a row that must be sound for it to count as written


@dataclass(frozen=True)
class Table:
    """The checksums of rows."""

    sums: NDArray[np.uint32]  # (rows, columns)
    place: dict[str, int]  # of each column

    def of(self, path: str, rows: int) -> NDArray[np.uint32] | None:
        """(rows,) or fewer of one column; None where there are none."""
        return self.sums[:rows, self.place[path]] if path in self.place else None


@dataclass(frozen=True)
class Array:
    """The rows of a column that could be read."""

    path: str
    values: NDArray[np.float64]  # (rows, …)
    sound: NDArray[np.bool_]  # (rows,), as far as its checksums tell
    checked: bool

    def rows(self, last: int) -> NDArray[np.float64]:
        """(last + 1, …): not a number where it is not sound."""
        found = np.full((last + 1, *self.values.shape[1:]), np.nan)
        have = min(last + 1, len(self.values))
        found[:have][self.sound[:have]] = self.values[:have][self.sound[:have]]
        return found

    def lost(self, last: int) -> list[str]:
        """In which of the rounds up to `last` its value is lost."""
        sound = np.zeros(last + 1, bool)
        sound[: min(last + 1, len(self.sound))] = self.sound[: last + 1]
        wrong = np.flatnonzero(~sound)
        return [f"{self.path} in {_rounds(wrong, last)}"] if len(wrong) else []


def _rounds(wrong: NDArray[np.integer], last: int) -> str:
    return "all rounds" if len(wrong) == last + 1 else f"round {checksums.rounds(wrong)}"


def table_of(file: h5py.File | None, beginning: h5py.File | None) -> tuple[list[str], Table | None]:
    """The columns that have checksums, and the checksums; as many as can be read."""
    known: list[str] = []
    for source in (file, beginning):
        try:
            known = checksums.columns(source) if source is not None and not known else known
        except FAULTS:
            continue
    try:
        found = checked.dataset(file, f"{checksums.GROUP}/{checksums.ROWS}", "u", (None, len(known)), filled=True)
        rows = min(found.shape[0], found.id.get_storage_size() // max(4 * len(known), 1))
        return known, Table(found[:rows].astype(np.uint32), {path: i for i, path in enumerate(known)})
    except (*FAULTS, AttributeError):
        return known, None


def most_rows(file: h5py.File | None, paths: Sequence[str], table: Table | None) -> int:
    """As many rows as any column has, and no more than are stored."""
    found = [0] if table is None else [len(table.sums)]
    for path in ("round", *paths):
        try:
            column = checked.dataset(file, path, checked.NUMBERS, None, filled=True)
            found.append(min(column.shape[0], column.id.get_storage_size() // column.dtype.itemsize))
        except (*FAULTS, AttributeError):
            continue
    return max(found)


def array_of(file: h5py.File | None, path: str, wide: tuple[int, ...], most: int, table: Table | None) -> Array:
    """The rows of a column, up to `most`, each of the shape `wide`. A flipped bit is turned back where the checksum tells which it is."""
    values, read = _values(file, path, wide, most)
    sums = None if table is None else table.of(path, len(values))
    if sums is None:
        return Array(path, values, read, False)
    sound = np.zeros(len(values), bool)
    sound[: len(sums)] = (checksums.of_rows(path, values[: len(sums)]) == sums) & read[: len(sums)]
    for r in np.flatnonzero(~sound & read):
        if r < len(sums) and (fixed := corrected_row(values[r], int(sums[r]))) is not None:
            values[r], sound[r] = fixed, True
    return Array(path, values, sound, True)


def _values(file: h5py.File | None, path: str, wide: tuple[int, ...], most: int) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """(rows, …) of a column, and which of them could be read."""
    try:
        column = checked.dataset(file, path, checked.NUMBERS, (None, *wide), filled=True)
    except (*FAULTS, AttributeError):
        return np.empty((0, *wide)), np.zeros(0, bool)
    rows, step = min(column.shape[0], most), ROWS.get(path.partition("/")[0], 1)
    values, read = np.full((rows, *wide), np.nan), np.zeros(rows, bool)
    for begin in range(0, rows, step):
        part = slice(begin, min(begin + step, rows))
        try:
            values[part] = column[part]
            read[part] = True
        except FAULTS:
            continue
    return values, read


def last_row(file: h5py.File | None, arrays: Sequence[Array], most: int, reach: int) -> int:
    """The last row that was written, as far as the counter says, or as far as `reach` if rows follow that are sound."""
    if file is None:
        return -1
    whole = _whole(file, arrays, most)
    try:
        counter = checked.attribute(file, "rounds")
    except FAULTS:
        counter = None
    last = counter if type(counter) is int and -1 <= counter < most else most - 1
    while last >= 0 and not whole[last]:
        last -= 1
    while last + 1 < min(most, reach + 1) and whole[last + 1]:
        last += 1
    return last


def _whole(file: h5py.File, arrays: Sequence[Array], most: int) -> NDArray[np.bool_]:
    """(most,) whether each row was written: by its checksums, or without them by its number."""
    proofs = [array.sound for array in arrays if array.checked and array.sound.any()]
    if not proofs:
        numbers, read = _values(file, "round", (), most)
        whole = np.zeros(most, bool)
        whole[: len(numbers)] = read & (numbers == np.arange(len(numbers)))
        return whole
    votes = np.zeros(most)
    for sound in proofs:
        votes[: len(sound)] += sound
    return votes >= HALF * len(proofs)


class ClientRows:
    """The rows of a column of clients, read one after the other; `lost` are those of the rounds read so far that are not sound."""

    def __init__(self, file: h5py.File | None, path: str, clients: int, table: Table | None) -> None:
        self.path, self.lost, self._clients = path, list[int](), clients
        self._places: dict[int, list[int]] = {}  # round -> the first client of each chunk
        self._sums = None if table is None else table.of(path, len(table.sums))
        try:
            self._column = checked.dataset(file, path, checked.NUMBERS, (None, clients), filled=True)
            self._column.id.chunk_iter(self._note)
        except (*FAULTS, AttributeError):
            self._column = None

    def _note(self, chunk: h5py.h5d.StoreInfo) -> None:
        self._places.setdefault(chunk.chunk_offset[0], []).append(chunk.chunk_offset[1])

    def row(self, r: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """(ids, values) of what was measured in round `r`; none where it is lost."""
        try:
            ids, values = self._read(r)
        except FAULTS:
            ids, values = np.empty(0, np.int64), None
        expected = None if self._sums is None else int(self._sums[r]) if r < len(self._sums) else checksums.of()
        if values is None or self._column is None or (expected is not None and checksums.of_clients(ids, values) != expected):
            self.lost.append(r)
            return np.empty(0, np.int64), np.empty(0)
        return ids, values

    def loss(self, last: int) -> str:
        """In which rounds its values are lost."""
        return f"{self.path} in {_rounds(np.array(self.lost), last)}"

    def _read(self, r: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        ids, values = [np.empty(0, np.int64)], [np.empty(0)]
        for start in sorted(self._places.get(r, ())):
            chunk = self._column[r, start : start + self._column.chunks[1]].astype(np.float64, copy=False)
            real = np.flatnonzero(~np.isnan(chunk))
            ids.append(real + start)
            values.append(chunk[real])
        return np.concatenate(ids), np.concatenate(values)
