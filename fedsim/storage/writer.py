"""The writer of a run file: a row is flushed before the counter says that it is there, and no kill can lose what was there."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from shutil import copyfile
from typing import Any
from zlib import crc32

import h5py
import numpy as np
from fedsim_analysis import checksums, run_file
from fedsim_analysis import masks as stored_masks
from fedsim_analysis.run_file import DIMENSIONS, names
from numpy.typing import NDArray
from torch import Tensor

from fedsim.errors import BadInput, CannotWrite, NoRoom, reason
from fedsim.storage import checkpoint, client_gates, disk_room, encoding, growth
from fedsim.storage.client_gates import Gates
from fedsim.storage.columns import COLUMNS, OF_DEVICES, OF_METHODS, Column
from fedsim.storage.layout import CHUNK, FORMAT, Attributes, add_column, appends_a_split, image_of, mask_of, splits, writable
from fedsim.storage.places import presence
from fedsim.storage.reader import RunReader

Tree = dict[str, Tensor]
Chunk = tuple[int, bytes]  # first client, compressed values
Spaces = tuple[h5py.h5s.SpaceID, h5py.h5s.SpaceID]  # of a row, in memory and in the file

COPIED_UP_TO = 64_000_000  # bytes, below which a split is worth a copy
FLOAT, UINT = np.dtype("<f8"), np.dtype("<u4")


class RunWriter:
    """The writer of one run file: `create` or `resume` it, write each `row`, `finish`, `close`.

    HDF5 writes the parts of its indices in no order that a kill would respect. So whatever changes the structure of the file
    (a new column, a mask, the final model, rows cut on resume, an index node that splits) is done on a copy that is renamed
    into place, and in place there are only appended chunks, which no trusted row depends on. Beyond `COPIED_UP_TO`, splits are
    done in place too: a kill within that millisecond may damage a column. A row is on the disk before it is counted, and a copy before it
    takes the file's place: when the machine dies, what the disk has not yet is lost.

    Before each change room is reserved. Where there is none, `row`, `finish`, `create` and `resume` raise NoRoom; the file is as it was.
    """

    _gates: Gates | None  # last stored

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        self._open(self._path)
        self._count()

    @classmethod
    def create(
        cls,
        path: str | Path,
        *,
        attributes: Attributes,
        layers: Sequence[str],
        clients: int,
        columns: Mapping[str, Column] = COLUMNS,
        counts: NDArray[np.integer] | None = None,
        called: Mapping[str, Sequence[str]] | None = None,
        kinds: NDArray[np.integer] | None = None,
    ) -> RunWriter:
        """A new run file with no rows yet.

        `columns`: by "rounds/…", "clients/…", "layers/…", "timing/…". `counts`: (clients, classes) training images.
        `called`: "client", "class" -> the name of each, where the data set has names. `kinds`: (clients,) numbers of their devices' kinds.
        Raises BadInput where `path` exists already or cannot be written.
        """
        path = Path(path)
        if path.exists():
            raise BadInput(presence.refusal(path, attributes))
        content = image_of(attributes, columns, layers, clients, counts, called or {}, kinds=kinds)
        try:
            with disk_room.as_no_room(path, len(content)):
                path.parent.mkdir(parents=True, exist_ok=True)
            disk_room.put(path, content)
        except OSError as error:
            raise BadInput(f"{path} cannot be written: {reason(error)}; choose another --out") from None
        return cls(path)

    @classmethod
    def resume(cls, path: str | Path, r: int, attributes: Attributes | None = None) -> RunWriter:
        """The run file with `r` as its last row (-1: none), later rows cut and some `attributes` new.

        BadInput where it ends before `r`, and where it is damaged or cannot be written.
        """
        done = RunReader(path).rounds
        if done < r:
            raise BadInput(f"{path} ends with round {done}, before its checkpoint of round {r}; choose another --out to start afresh")
        try:
            record = cls(path)
            record._go_back(r, attributes or {})
        except run_file.FAULTS as error:
            raise BadInput(f"{path} cannot be continued: {run_file.message_of(error)}; choose another --out to start afresh") from error
        return record

    @property
    def rounds(self) -> int:
        """The last complete round, -1 before row 0."""
        return int(self._file.attrs["rounds"])

    def row(
        self,
        r: int,
        values: Mapping[str, float],
        clients: Mapping[str, tuple[NDArray[np.integer], NDArray[Any]]] | None = None,
        layers: Mapping[str, NDArray[Any]] | None = None,
        masks: Tree | None = None,
        timing: Mapping[str, float] | None = None,
        gates: Gates | None = None,
        speed: Mapping[str, float] | None = None,
    ) -> None:
        """Row `r`, the one after the last: `clients` maps a name to (ids, values), `masks` and `gates` are stored where they changed.

        A name not declared before is added, with NaN in the rows that lack it.
        """
        if r != self.rounds + 1:
            raise ValueError(f"row {r} cannot follow row {self.rounds} of {self._path}")
        groups: dict[str, Mapping[str, Any]] = {"rounds": values, "clients": clients or {}, "layers": layers or {}}
        groups |= {"timing": timing or {}, "speed": speed or {}}
        row = {f"{group}/{name}": value for group, entries in groups.items() for name, value in entries.items()}
        measured = {path: self._in_order(path, *value) for path, value in row.items() if path.startswith(checksums.CLIENTS)}
        row |= measured
        mask = encoding.pack(masks) if masks else self._mask
        chunks = {path: list(encoding.chunks(*value, min(CHUNK, self._clients))) for path, value in measured.items()}
        moved = gates is not None and not gates.same(self._gates)
        appends = r > 0 and mask == self._mask and not moved and row.keys() <= self._columns.keys() and not self._splits(r, chunks)
        needed = self._needed(r, row, chunks) + sum(map(len, mask)) + growth.of_gates(gates)
        with self._in_place(needed) if appends else self._aside(needed):
            self._extend(r + 1)
            self._put_in_force(r, mask, gates if moved else None)
            self._put(r, row, chunks)
            self._file.flush()
            if appends:
                os.fsync(self._handle)
            self._file.attrs.modify("rounds", r)
            self._file.flush()
        self._reached.update(dict.fromkeys(row, r))

    def finish(self, model: Tree, weights_sha256: str, gates: Gates | None = None) -> None:
        """Stores the final weights, and gates of clients, and marks the run as finished."""
        with self._aside(growth.SLACK + growth.of_model(model) + growth.of_gates(gates)):
            if gates is not None:
                client_gates.put(self._file, client_gates.FINAL, gates)
            for key, value in model.items():
                put_tensor(self._file.require_group("model"), key, value, model)
            self._file.attrs.modify("weights_sha256", np.bytes_(weights_sha256))
            checksums.put_attribute(self._file, "finished", True)
            checksums.put_attributes(self._file)

    def close(self) -> None:
        if self._file:
            self._file.flush()
            end = self._file.id.get_filesize()
            self._file.close()
            disk_room.give_back(self._handle, end)

    def discard(self) -> None:
        """Of a run that was refused before its first row."""
        self.close()
        self._path.unlink()
        checkpoint.clear(checkpoint.folder_of(self._path))

    def __enter__(self) -> RunWriter:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if self._file and isinstance(error, CannotWrite) and not isinstance(error, NoRoom):
            presence.abandon(self._file, self._handle)
        else:
            self.close()

    def check(self) -> None:
        """CannotWrite where the file was removed or replaced."""
        presence.check_file(self._handle, self._path)

    def _open(self, path: Path) -> None:
        with run_file.READING:
            self._file, self._handle = writable(path), os.open(path, os.O_RDWR)
        self._clients: int = self._file["client"].shape[0]
        self._numbers = self._file["round"]
        self._columns = {f"{group}/{name}": self._file[group][name] for group in DIMENSIONS for name in names(self._file, group)}
        self._wide = {group: tuple(self._file[name].shape[0] for name in scales[1:]) for group, scales in DIMENSIONS.items()}
        self._find_checksums()
        self._mask = stored_masks.in_force(self._file, self.rounds)
        self._gates = client_gates.last(self._file, self.rounds)
        self._sums = {"masks": stored_masks.checksum_of(self._mask), "client_gates": client_gates.checksum_of(self._gates)}  # of IN_FORCE

    def _find_checksums(self) -> None:
        """The table of checksums, the place of each column in it, and the checksums of a row that was not measured."""
        self._checksums = self._file[checksums.GROUP][checksums.ROWS] if checksums.GROUP in self._file else None
        self._place = {path: i for i, path in enumerate(checksums.columns(self._file))}
        groups = [path.partition("/")[0] for path in self._place]
        dense = {*groups}.intersection(self._wide) - {"clients"}
        of_group = {group: crc32(np.full(self._wide[group], np.nan, FLOAT).data) for group in dense}
        self._unmeasured = np.array([of_group.get(group, checksums.of()) for group in groups], UINT)

    def _count(self) -> None:
        """The chunks that each column of the clients holds; kept up by every row."""
        self._held = {path: column.id.get_num_chunks() for path, column in self._columns.items() if path.startswith("clients/")}
        self._reached: dict[str, int] = {}  # column -> the last row that was written to it

    @contextmanager
    def _in_place(self, needed: int) -> Iterator[None]:
        disk_room.reserve(self._file, self._path, needed, self._path)
        yield
        disk_room.sync(self._path)

    @contextmanager
    def _aside(self, needed: int) -> Iterator[None]:
        """Until its end, the record writes to a copy, which then takes the file's place."""
        aside = self._path.with_name(self._path.name + ".new")
        self.close()
        try:
            with disk_room.as_no_room(self._path, self._path.stat().st_size + needed):
                aside.unlink(missing_ok=True)  # it might be a link
                copyfile(self._path, aside)
            self._open(aside)
            disk_room.reserve(self._file, aside, needed, self._path)
            yield
            self.close()
            disk_room.sync(aside)
            aside.rename(self._path)
            disk_room.sync(self._path.parent)
        finally:
            self.close()
            aside.unlink(missing_ok=True)
            self._open(self._path)

    def _go_back(self, r: int, attributes: Attributes) -> None:
        """Makes row `r` the last, with these attributes, and with checksums where an older writer made none."""
        table = growth.of_checksums(r, len(self._columns), anew=True)
        with self._aside(growth.SLACK + table + growth.of_attributes(attributes)):
            self._cut(r)
            for name, value in {**attributes, "format_version": FORMAT}.items():
                checksums.put_attribute(self._file, name, value)
            checksums.put_attributes(self._file)
            checksums.lay_out(self._file, list(self._columns))
            self._find_checksums()
        self._count()

    def _cut(self, r: int) -> None:
        self._file.attrs.modify("rounds", r)
        checksums.put_attribute(self._file, "finished", False)
        self._file.attrs.modify("weights_sha256", np.bytes_(b""))
        self._extend(r + 1)
        for later in [f"masks/{number}" for number in stored_masks.stored_rounds(self._file) if number > r]:
            del self._file[later]
        if "model" in self._file:
            del self._file["model"]
        client_gates.cut(self._file, r)
        self._mask, self._gates = stored_masks.in_force(self._file, r), client_gates.last(self._file, r)

    def _extend(self, rows: int) -> None:
        self._numbers.id.set_extent((rows,))  # by the library's own call: resize asks for the shape three times
        for path, column in self._columns.items():
            column.id.set_extent((rows, *self._wide[path.partition("/")[0]]))
        if self._checksums is not None:
            self._checksums.id.set_extent((rows, len(self._place)))

    def _put(self, r: int, row: Mapping[str, Any], chunks: Mapping[str, list[Chunk]]) -> None:
        if new := sorted(row.keys() - self._columns.keys()):
            for path in new:
                self._columns[path] = add_column(self._file, path, (OF_METHODS | OF_DEVICES | COLUMNS).get(path, Column()))
            checksums.lay_out(self._file, new)
            self._find_checksums()
        spaces = {wide: _spaces(r, wide) for wide in {(), *self._wide.values()}}
        self._numbers.id.write(*spaces[()], np.full(1, r, np.int64))
        found = self._unmeasured.copy()
        for path in self._sums.keys() & self._place.keys():
            found[self._place[path]] = self._sums[path]
        for path, column in self._columns.items():
            group = path.partition("/")[0]
            if group == "clients":
                self._put_chunks(r, path, chunks.get(path, []))
                if path in row and path in self._place:
                    found[self._place[path]] = checksums.of_clients(*row[path])
            # A column's index is made with its first row, lest it be made under rows that readers trust already.
            elif path in row or r == 0:
                values = np.empty((1, *self._wide[group]), FLOAT)
                values[:] = row.get(path, np.nan)
                column.id.write(*spaces[self._wide[group]], values)
                if path in self._place:
                    found[self._place[path]] = crc32(values.data)
        if self._checksums is not None:
            self._checksums.id.write(*_spaces(r, found.shape), found)

    def _needed(self, r: int, row: Mapping[str, Any], chunks: Mapping[str, list[Chunk]]) -> int:
        """Bytes that the columns grow by at most in row `r`."""
        paths = row.keys() if r else row.keys() | self._columns.keys()
        anew = not row.keys() <= self._columns.keys()
        columns = growth.of_columns(r, paths, self._reached, self._wide)
        clients = growth.of_clients(r, dict.fromkeys(self._held, ()) | dict(chunks) if r == 0 else chunks, self._held)
        return growth.SLACK + columns + clients + growth.of_checksums(r, len(paths | self._columns.keys()), anew)

    def _in_order(self, path: str, ids: Any, measured: Any) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        ids, measured = np.asarray(ids, np.int64), np.asarray(measured, np.float64)
        if ids.shape != measured.shape or ids.ndim != 1:
            raise ValueError(f"{path}: ids are {ids.shape}, values {measured.shape}; both must be (K,)")
        if ids.size and not 0 <= ids.min() <= ids.max() < self._clients:
            raise ValueError(f"{path}: ids are 0 … {self._clients - 1}, not {ids.min()} … {ids.max()}")
        return encoding.in_order(ids, measured)

    def _splits(self, r: int, chunks: Mapping[str, list[Chunk]]) -> bool:
        due = appends_a_split(r) or any(splits(self._held[path], len(new)) for path, new in chunks.items())
        return due and self._path.stat().st_size <= COPIED_UP_TO

    def _put_chunks(self, r: int, path: str, chunks: list[Chunk]) -> None:
        column = self._columns[path]
        if r == 0 and not chunks:
            column[0, 0] = np.nan
        # The library's own path decompresses, slices and compresses again: ten times the cost for a scattered cohort.
        for start, chunk in chunks:
            column.id.write_direct_chunk((r, start), chunk)
        self._held[path] = self._held.get(path, 0) + max(len(chunks), int(r == 0))

    def _put_in_force(self, r: int, mask: tuple[str, bytes], gates: Gates | None) -> None:
        """Stores a mask that is another than the one in force, and gates if there are new ones."""
        stored, bits = None, np.frombuffer(mask[1], np.uint8)
        if mask != self._mask:
            stored = self._file["masks"].create_dataset(str(r), bits.shape, bits.dtype)
            stored.attrs["tensors"], self._mask = mask[0], mask
            stored.attrs[checksums.NAME] = self._sums["masks"] = stored_masks.checksum_of(mask)
        if gates is not None:
            client_gates.put(self._file, str(r), gates)
            self._gates, self._sums["client_gates"] = gates, client_gates.checksum_of(gates)
        if stored is not None:  # bits are written after all objects: HDF5 leaves a gap of up to 2 KiB between bits and a later object
            stored[...] = bits


def _spaces(r: int, wide: tuple[int, ...]) -> Spaces:
    """Row `r` of columns that are that wide. The indexing of h5py would make it anew for each, which costs five times as much."""
    shape = (1, *wide)
    there = h5py.h5s.create_simple((r + 1, *wide))
    there.select_hyperslab((r, *(0 for _ in wide)), shape)
    return h5py.h5s.create_simple(shape), there


def put_tensor(group: h5py.Group, key: str, value: Tensor, model: Tree) -> None:
    """Stores one of the final weights."""
    data, about = encoding.store(value, mask_of(key, model))
    group.create_dataset(key, data=data).attrs.update(about)
