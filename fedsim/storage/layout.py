"""Where things stand in a run file: its groups, dimension scales, columns and attributes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import h5py
import numpy as np
from fedsim_analysis import checksums
from fedsim_analysis.run_file import DIMENSIONS, FORMAT, RENAMED
from numpy.typing import NDArray

from fedsim.core import keys
from fedsim.storage.columns import Column

__all__ = ["DIMENSIONS", "FORMAT", "RENAMED"]  # which readers have too

Attributes = Mapping[str, str | int | float | bool]
Item = TypeVar("Item")

COUNTS_UP_TO = 100_000  # clients, beyond which /partition/counts and /devices/kind are left out
KINDS = "devices/kind"
ACCESS = {"meta_block_size": 0}  # else HDF5 sets 2 KiB aside at each opening that appends a mask, and what is left of them is lost
CHUNK = 512  # clients in a chunk: a row writes only the chunks it touches
ROWS = {"rounds": 1024, "timing": 1024, "speed": 1024, "layers": 256, "clients": 1}  # rounds in a chunk; 64 chunks are indexed by one node


def writable(path: Path) -> h5py.File:
    """The run file, for writing, whatever else has it open in this process for reading: see `fedsim_analysis.run_file.apart`."""
    return h5py.File(path, "r+", driver="stdio", locking=False, **ACCESS)


def splits(held: int, more: int) -> bool:
    """Whether HDF5 splits a node of a column's index when `more` chunks are appended to the `held` ones, in order.

    Why it matters. HDF5 finds the chunks of a column through an index, a B-tree of version 1. To append a chunk, it changes one node in
    place: it adds an entry after the others. A kill before, during or after that write leaves the old entries as they were. When a node
    is full, HDF5 splits it: it moves entries to a new node, and writes the old node, the new node and their parent in an order that
    we cannot choose. A kill between these writes can lose entries, and with them rows that readers trust already. So the writer must
    know before it appends whether a node will split. If one will, it works on a copy of the file (`RunWriter._aside`).

    Where the numbers come from.
    64: a node holds up to 2 K entries. K is "Indexed Storage Internal Node K" of the superblock: 32, unless a program sets it (HDF5 File
        Format Specification, "Format Signature and Superblock" and "Version 1 B-trees").
    57: the last node, to which we append, splits at the ratio 0.9 (`H5Pset_btree_ratios`; the defaults are 0.1, 0.5 and 0.9). It keeps
        floor(0.9 * 64) = 57 of its 64 entries. The other 7 and the new one begin the next node.
    65: so node i begins after 57 i chunks, and splits when it would get its 65th entry, which is chunk 57 i + 65 of the column. A column
        of n chunks has therefore seen floor((n - 8) / 57) splits, where 8 = 65 - 57, and a split is due where that number grows.

    A resumed run cuts chunks at the end. Nodes keep their beginnings then, and only empty ones are removed. If the next node exists
    already, the function foresees a split that does not come; that costs one copy. It never misses a split:
    `test_splits_of_an_index_are_foreseen` counts the nodes of real files. A parent splits only when one of its nodes does.
    """
    return max(held + more - 8, 0) // 57 > max(held - 8, 0) // 57


def appends_a_split(r: int) -> bool:
    """Whether row `r` splits a node of the index of a column that is no client's: each begins a chunk every so many rows."""
    return any(r % rows == 0 and splits(r // rows, 1) for rows in {*ROWS.values(), checksums.CHUNK} - {ROWS["clients"]})


def image_of(
    attributes: Attributes,
    columns: Mapping[str, Column],
    layers: Sequence[str],
    clients: int,
    counts: NDArray[np.integer] | None,
    called: Mapping[str, Sequence[str]],
    fill: Callable[[h5py.File], object] = lambda file: None,
    kinds: NDArray[np.integer] | None = None,
) -> bytes:
    """The content of a run file with no rows, or with those that `fill` adds. It is made in the memory."""
    with h5py.File("run.h5", "w", driver="core", backing_store=False) as file:
        lay_out(file, attributes, columns, layers, clients, counts, called, kinds)
        fill(file)
        file.flush()
        content: bytes = file.id.get_file_image()
    return content


def lay_out(
    file: h5py.File,
    attributes: Attributes,
    columns: Mapping[str, Column],
    layers: Sequence[str],
    clients: int,
    counts: NDArray[np.integer] | None,
    called: Mapping[str, Sequence[str]],
    kinds: NDArray[np.integer] | None = None,
) -> None:
    """A run file with no rows. `called`: the names of clients or classes, where they have some; `kinds`: of their devices."""
    # All attributes have their final size from the start, so that a later change is one write in place.
    for name, value in {"format_version": FORMAT, **attributes, "rounds": -1, "finished": False}.items():
        checksums.put_attribute(file, name, value)
    file.attrs["weights_sha256"] = np.bytes_(64 * " ")
    _scale(file, "round", np.arange(0), maxshape=(None,), chunks=(1024,))
    _scale(file, "client", np.arange(clients), chunks=(min(clients, 65536),), shuffle=True, compression=1)
    checksums.put_labels(file, "layer", layers).make_scale("layer")
    for group in DIMENSIONS:
        _link_scales(file, group)
    for path, column in columns.items():
        add_column(file, path, column)
    checksums.lay_out(file, [*columns, *checksums.IN_FORCE])
    checksums.put_attributes(file)
    file.create_group("masks")
    if counts is not None and clients <= COUNTS_UP_TO:
        _put_counts(file, counts)
    if kinds is not None and clients <= COUNTS_UP_TO:
        _put_kinds(file, kinds)
    for dimension, texts in called.items():
        checksums.put_labels(file, f"partition/{dimension}_name", texts)
    counted = ("class", "counts") if "partition/counts" in file else ()
    devices = [KINDS] if KINDS in file else []
    once = ["client", "layer", *devices, *(f"partition/{name}" for name in (*counted, *(f"{dimension}_name" for dimension in called)))]
    checksums.put_once(file, {path: checksums.of_array(file[path][()]) for path in once})


def _link_scales(file: h5py.File, group: str) -> None:
    """Has the labels of a group stand in it too, where they do not yet: as in a group that the writer of an older file did not know."""
    for dimension in DIMENSIONS[group]:
        if dimension not in file.require_group(group):
            file[group][dimension] = file[dimension]


def _scale(file: h5py.File, name: str, data: NDArray[Any], **options: Any) -> None:
    file.create_dataset(name, data=data, **options).make_scale(name)


def _put_counts(file: h5py.File, counts: NDArray[np.integer]) -> None:
    _scale(file, "partition/class", np.arange(counts.shape[1]))
    file["partition/client"] = file["client"]
    stored = file.create_dataset("partition/counts", data=counts.astype(np.int32), shuffle=True, compression=1)
    stored.attrs["long_name"] = "training images"
    stored.dims[0].attach_scale(file["client"])
    stored.dims[1].attach_scale(file["partition/class"])


def _put_kinds(file: h5py.File, kinds: NDArray[np.integer]) -> None:
    stored = file.create_dataset(KINDS, data=kinds.astype(np.int32), shuffle=True, compression=1)
    stored.attrs["long_name"] = "number of the kind of each client's device, in the order of the attribute `devices`"
    stored.dims[0].attach_scale(file["client"])


def add_column(file: h5py.File, path: str, column: Column) -> h5py.Dataset:
    """A column of not-a-numbers, as long as the others."""
    group = path.partition("/")[0]
    if group not in DIMENSIONS:
        raise ValueError(f"column {path!r} is under none of {', '.join(DIMENSIONS)}")
    _link_scales(file, group)
    scales = [file[name] for name in DIMENSIONS[group]]
    wide = tuple(scale.shape[0] for scale in scales[1:])
    chunks = (ROWS[group], *(min(CHUNK, size) if group == "clients" else size for size in wide))
    added = file.create_dataset(
        path,
        shape=(scales[0].shape[0], *wide),
        maxshape=(None, *wide),
        chunks=chunks,
        dtype=np.float64,
        fillvalue=np.nan,
        compression=1 if group == "clients" else None,
    )
    added.attrs.update({"units": column.units, "long_name": column.about})
    for axis, scale in enumerate(scales):
        added.dims[axis].attach_scale(scale)
    return added


def mask_of(key: str, model: Mapping[str, Item]) -> Item | None:
    return model.get(keys.MASKS + key.removeprefix(keys.WEIGHTS)) if key.startswith(keys.WEIGHTS) else None
