"""Arrays over several run files, of which only what is used is read. No file stays open."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray
from xarray.backends import BackendArray
from xarray.core import indexing

from fedsim_analysis import checked, checksums, masks, run_file
from fedsim_analysis.dataset.sources import Source

Key = tuple[Any, ...]  # whole numbers, slices, or one-dimensional arrays of places
FEW = 8  # a reader of at most 1 / FEW of the rounds reads them one by one


class OverRuns(BackendArray):
    """(run, …): the part that is asked for, file by file."""

    def __init__(self, sources: Sequence[Source], shape: tuple[int, ...], dtype: Any) -> None:
        self.sources, self.shape, self.dtype = sources, shape, np.dtype(dtype)

    def __getitem__(self, key: indexing.ExplicitIndexer) -> Any:
        return indexing.explicit_indexing_adapter(key, self.shape, indexing.IndexingSupport.OUTER, self._part)

    def _part(self, key: Key) -> NDArray[Any]:
        """What is asked for of each run, put together."""
        runs = np.arange(len(self.sources))[key[0]]
        parts = [self.of_run(self.sources[i], key[1:]) for i in np.atleast_1d(runs)]
        if runs.ndim == 0:
            return parts[0]
        return np.stack(parts) if parts else np.empty((0, *_size(self.shape[1:], key[1:])), self.dtype)

    def of_run(self, source: Source, key: Key) -> NDArray[Any]:
        """Of one run, by the key of the other axes."""
        raise NotImplementedError


def _size(shape: tuple[int, ...], key: Key) -> tuple[int, ...]:
    """The shape of an array of `shape` at `key`."""
    return tuple(size for axis, k in zip(shape, key, strict=True) for size in np.arange(axis)[k].shape)


def _at(values: NDArray[Any], key: Key) -> NDArray[Any]:
    """`values` at the key, one axis after the other."""
    for axis in reversed(range(len(key))):
        values = values[(*[slice(None)] * axis, key[axis])]
    return values


class Column(OverRuns):
    """(run, round) or (run, round, client or layer) of a column: NaN where a run has no such round, client, layer or column."""

    def __init__(self, sources: Sequence[Source], group: str, name: str, shape: tuple[int, ...], labels: Sequence[Any] = ()) -> None:
        super().__init__(sources, shape, np.float64)
        self.group, self.name, self.labels = group, name, labels  # of layers: which runs may have in another order

    def of_run(self, source: Source, key: Key) -> NDArray[np.float64]:
        found = np.full(_size(self.shape[1:], key), np.nan)
        wanted = np.atleast_1d(np.arange(self.shape[1])[key[0]])
        there = np.flatnonzero(wanted < source.rows)
        if self.name not in source.columns[self.group] or not len(there):
            return found
        rows = source.read(lambda file: self._rows(file, source, wanted[there], key[1:]))
        if np.ndim(np.arange(self.shape[1])[key[0]]) == 0:
            return np.asarray(rows[0])
        found[there] = rows
        return found

    def _rows(self, file: h5py.File, source: Source, wanted: NDArray[np.intp], rest: Key) -> NDArray[np.float64]:
        """(the wanted rounds, …)."""
        need = int(checked.attribute(file, "rounds")) + 1 >= source.rows
        checked.need(need, f"it has fewer rounds than the {source.rows} that it had when it was opened; open it again")
        if self.group == "clients" and np.ndim(rest[0]) == 0 and not isinstance(rest[0], slice):
            if rest[0] >= source.clients:
                return np.full(len(wanted), np.nan)
            return run_file.values(file, self.group, self.name, client=int(rest[0]), known=source.sums)[wanted]
        if len(wanted) * FEW <= source.rows or self._is_large(source):
            values = np.stack([run_file.values(file, self.group, self.name, int(r), known=source.sums) for r in wanted])
        else:
            values = run_file.values(file, self.group, self.name, known=source.sums)[wanted]
        return _at(self._widened(source, values), (slice(None), *rest))

    def _is_large(self, source: Source) -> bool:
        """Whether all rows at once are more than a reader should hold beside what was asked for."""
        return self.group == "clients" and source.rows * source.clients * 8 > run_file.WHOLE

    def _widened(self, source: Source, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """The run's own clients or layers at the places that they have over all runs."""
        if values.ndim == 1 or (values.shape[1] == self.shape[2] and (not self.labels or list(source.layers) == list(self.labels))):
            return values
        wide = np.full((len(values), self.shape[2]), np.nan)
        places = [self.labels.index(name) for name in source.layers] if self.labels else np.arange(values.shape[1])
        wide[:, places] = values
        return wide


class Masks(OverRuns):
    """(run, round, …) of a weight: True where it is kept. After its last round a run has the masks of that round."""

    def __init__(self, sources: Sequence[Source], name: str, shape: tuple[int, ...]) -> None:
        super().__init__(sources, shape, bool)
        self.name = name

    def of_run(self, source: Source, key: Key) -> NDArray[np.bool_]:
        rounds = np.arange(self.shape[1])[key[0]]
        found = dict(source.read(lambda file: list(self._of_rounds(file, source, np.unique(rounds)))))
        parts = [_at(found[int(r)], key[1:]) for r in np.atleast_1d(rounds)]
        return parts[0] if rounds.ndim == 0 else np.stack(parts) if parts else np.empty(_size(self.shape[1:], key), bool)

    def _of_rounds(self, file: h5py.File, source: Source, rounds: NDArray[np.intp]) -> Iterator[tuple[int, NDArray[np.bool_]]]:
        at, kept = None, np.ones(self.shape[2:], bool)
        for r in rounds:
            stored = max((n for n in source.mask_rounds if n <= r), default=None)
            if stored is not None and stored != at:
                at, kept = stored, self._kept(file, stored, source.sums)
            yield int(r), kept

    def _kept(self, file: h5py.File, r: int, known: Sequence[str]) -> NDArray[np.bool_]:
        layout, packed = masks.in_force(file, r, known)
        found = next((mask for key, mask in masks.unpacked(masks.shapes(layout), packed) if key == masks.PREFIX + self.name), None)
        return np.ones(self.shape[2:], bool) if found is None else found


class Counts(OverRuns):
    """(run, client, class): training images; NaN where a run has no such client or class, or did not store them."""

    def __init__(self, sources: Sequence[Source], shape: tuple[int, ...]) -> None:
        super().__init__(sources, shape, np.float64)

    def of_run(self, source: Source, key: Key) -> NDArray[np.float64]:
        found = np.full(self.shape[1:], np.nan)
        if source.counts:
            clients, classes = source.counts
            found[:clients, :classes] = source.read(_counts)
        return _at(found, key)


def _counts(file: h5py.File) -> NDArray[Any]:
    found = checked.numbers(file, "partition/counts", "iu", (None, None))
    checksums.check_once(file, "partition/counts", checksums.of_array(found))
    return found
