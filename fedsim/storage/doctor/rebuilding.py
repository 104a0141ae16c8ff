"""A run file written anew from what was salvaged, as the writer of runs would have written it."""

from __future__ import annotations

import h5py
import numpy as np
from fedsim_analysis import checksums
from fedsim_analysis import masks as stored_masks
from numpy.typing import NDArray

from fedsim.core.tree import sha256_of
from fedsim.storage import client_gates, encoding
from fedsim.storage.doctor.attributes import MENDED
from fedsim.storage.doctor.findings import summed
from fedsim.storage.doctor.salvage import Salvage
from fedsim.storage.layout import CHUNK, image_of
from fedsim.storage.writer import put_tensor

LONGEST = 10_000  # letters of what it says about mendings


def rebuilt(found: Salvage) -> bytes:
    """The content of the run file."""
    parts = (found.attributes, found.about, found.layers, found.clients, found.counts, found.called)
    return image_of(*parts, fill=lambda file: _fill(file, found), kinds=found.kinds)


def _fill(file: h5py.File, found: Salvage) -> None:
    rows = found.last + 1
    file["round"].resize((rows,))
    file["round"][:] = np.arange(rows)
    sums = np.full((rows, len(known := checksums.columns(file))), checksums.of(), np.uint32)
    for path, values in found.dense.items():
        file[path].resize(values.shape)
        file[path][...] = values
        sums[:, known.index(path)] = checksums.of_rows(path, values)
    for path in found.scattered:
        sums[:, known.index(path)] = _scatter(file, found, path)
    sums[:, known.index(stored_masks.GROUP)] = _put_masks(file, found)
    sums[:, known.index(client_gates.GROUP)] = _put_gates(file, found)
    table = file[checksums.GROUP][checksums.ROWS]
    table.resize(sums.shape)
    table[...] = sums
    _finish(file, found)
    file.attrs.modify("rounds", found.last)


def _scatter(file: h5py.File, found: Salvage, path: str) -> NDArray[np.uint32]:
    """Writes a column of clients; (rows,) its checksums."""
    column, rows = file[path], found.scattered[path]
    column.resize((found.last + 1, found.clients))
    sums = np.full(found.last + 1, checksums.of(), np.uint32)
    for r in range(found.rounds + 1):
        ids, values = rows.row(r)
        chunks = list(encoding.chunks(ids, values, min(CHUNK, found.clients))) if len(ids) else []
        for start, chunk in chunks:
            column.id.write_direct_chunk((r, start), chunk)
        if r == 0 and not chunks:
            column[0, 0] = np.nan  # as the writer begins its index
        sums[r] = checksums.of_clients(ids, values)
    if rows.lost:
        found.lost.append(rows.loss(found.rounds))
    return sums


def _put_masks(file: h5py.File, found: Salvage) -> NDArray[np.uint32]:
    """Stores the masks where they changed; (rows,) their checksums."""
    before = stored_masks.NONE
    sums = np.full(found.last + 1, stored_masks.checksum_of(before), np.uint32)
    for r, now in sorted(found.masks.items()):
        sums[r:] = stored_masks.checksum_of(now)
        if now != before:
            stored = file["masks"].create_dataset(str(r), data=np.frombuffer(now[1], np.uint8))
            stored.attrs["tensors"], stored.attrs[checksums.NAME] = now[0], stored_masks.checksum_of(now)
        before = now
    return sums


def _put_gates(file: h5py.File, found: Salvage) -> NDArray[np.uint32]:
    """The same for gates of clients."""
    before = None
    sums = np.full(found.last + 1, client_gates.checksum_of(before), np.uint32)
    for r, now in sorted(found.gates.items()):
        sums[r:] = client_gates.checksum_of(now)
        if not now.same(before):
            client_gates.put(file, str(r), now)
        before = now
    return sums


def _finish(file: h5py.File, found: Salvage) -> None:
    """The final weights, if there are some, and what a mending could not keep."""
    if found.model is not None:
        for key, value in found.model.items():
            put_tensor(file.require_group("model"), key, value, found.model)
        if found.final is not None:
            client_gates.put(file, client_gates.FINAL, found.final)
        file.attrs.modify("weights_sha256", np.bytes_(sha256_of(found.model)))
        checksums.put_attribute(file, "finished", True)
    if found.lost:
        before = [text] if (text := found.attributes.get(MENDED)) else []
        checksums.put_attribute(file, MENDED, "; ".join([*before, summed(found.lost, 100)])[:LONGEST])
    checksums.put_attributes(file)
