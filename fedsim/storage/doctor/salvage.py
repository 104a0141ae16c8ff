"""What is sound in a damaged run file, with what the copy from before its first row knows, as one whole that can be written anew."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import h5py
import numpy as np
from fedsim_analysis import checked, checksums, masks, run_file
from fedsim_analysis.masks import Packed
from fedsim_analysis.run_file import DIMENSIONS
from numpy.typing import NDArray

from fedsim.core.tree import Tree
from fedsim.storage import client_gates
from fedsim.storage.client_gates import Gates
from fedsim.storage.columns import COLUMNS, OF_METHODS, Column
from fedsim.storage.doctor import attributes
from fedsim.storage.doctor.complaints import FAULTS, changes
from fedsim.storage.doctor.rows import ClientRows, array_of, last_row, most_rows, table_of
from fedsim.storage.reader import counts_of, kinds_of

NO_GATES = Gates(np.empty(0, np.int64), np.empty((0, 0), bool), {})  # of no client: which were in force is not known


class Hopeless(ValueError):
    """Too little is left of a run file to write it anew; the message says what is lost."""


@dataclass
class Salvage:
    """A whole run file: what is not sound is not in it, and `lost` says what that is."""

    attributes: dict[str, Any]
    layers: list[str]
    clients: int
    counts: NDArray[np.int32] | None
    called: dict[str, list[str]]
    about: dict[str, Column]  # by the path of the column
    rounds: int  # the last row of which something is known
    last: int  # the last row, which is that of the newest checkpoint where this is later
    dense: dict[str, NDArray[np.float64]] = field(default_factory=dict)  # path -> (last + 1, …), but for columns of clients
    scattered: dict[str, ClientRows] = field(default_factory=dict)
    masks: dict[int, Packed] = field(default_factory=dict)  # from each round on
    gates: dict[int, Gates] = field(default_factory=dict)
    final: Gates | None = None
    model: Tree | None = None  # of a finished run
    lost: list[str] = field(default_factory=list)
    kinds: NDArray[np.int32] | None = None  # of the devices of clients


@dataclass(frozen=True)
class Sources:
    """Where the parts of a run are sought."""

    file: h5py.File | None
    beginning: h5py.File | None  # the run file as it was before its first row
    checkpoint: int  # the round of the newest whole checkpoint; -1: there is none
    stands: bool = True  # whether HDF5 opens the file; else zeros may stand for what was cut off

    def first(self, what: str, read: Callable[[h5py.File], Any]) -> Any:
        """What `read` gives for the first of the two files of which it can be read."""
        for file in (self.file, self.beginning):
            if file is not None:
                try:
                    return read(file)
                except FAULTS:
                    continue
        raise Hopeless(f"{what} cannot be read")

    def tried(self, read: Callable[[h5py.File], Any]) -> Any:
        """The same; None where neither can be read."""
        try:
            return self.first("", read)
        except Hopeless:
            return None


def salvaged(sources: Sources) -> Salvage:
    """All that is sound. Hopeless where that is too little."""
    file = sources.file
    layers = sources.first("the names of its layers", lambda file: checksums.labels(file, "layer"))
    clients = sources.first("the number of its clients", _clients)
    known, table = table_of(file, sources.beginning)
    kept, lost = attributes.salvaged(file, sources.beginning)
    if file is not None and known and table is None:
        kept_anyway = "so that nothing vouches for their values" if sources.stands else "and with them all that was measured"
        lost.append(f"the checksums of rows, {kept_anyway}")
    wide: dict[str, tuple[int, ...]] = {"clients": (clients,), "layers": (len(layers),)}
    about = _columns(sources, known, wide)
    dense = [path for path in about if not path.startswith(checksums.CLIENTS)]
    most = most_rows(file, dense, table)
    trusted = sources.stands or table is not None
    arrays = [array_of(file if trusted else None, path, wide.get(path.partition("/")[0], ()), most, table) for path in dense]
    planned = kept.get("rounds_planned", -1) if kept["finished"] else -1
    rounds = last_row(file, arrays, most, max(planned, sources.checkpoint))
    last = max(rounds, -1 if kept["finished"] and rounds >= planned else sources.checkpoint)
    lost += [f"all that was measured in rounds {rounds + 1} to {last}"] if last > rounds else []
    lost += [line for array in arrays for line in array.lost(rounds)]
    called = {at: names for at in ("client", "class") if (names := sources.tried(partial(_called, dimension=at)))}
    found = Salvage(kept, layers, clients, sources.tried(counts_of), called, about, rounds, last, lost=lost, kinds=sources.tried(kinds_of))
    found.dense = {array.path: array.rows(last) for array in arrays}
    found.scattered = {path: ClientRows(file if trusted else None, path, clients, table) for path in about if path not in found.dense}
    _take_in_force(found, file, known if table is not None else ())
    _take_model(found, sources)
    return found


def _clients(file: h5py.File) -> int:
    found = checked.numbers(file, "client", "iu", (None,))
    checksums.check_once(file, "client", checksums.of_array(found))
    return len(found)


def _called(file: h5py.File, dimension: str) -> list[str] | None:
    path = f"partition/{dimension}_name"
    return checksums.labels(file, path) if checksums.has(file, path) else None


def _columns(sources: Sources, known: Sequence[str], wide: Mapping[str, tuple[int, ...]]) -> dict[str, Column]:
    """The columns that were written, with their units: those that have checksums, or else those that are there."""
    there: list[str] = [path for path in known if path not in checksums.IN_FORCE]
    for group in DIMENSIONS if not known else ():
        for file in (sources.file, sources.beginning):
            there += [f"{group}/{name}" for name in _names(file, group, wide.get(group, ()))]
    about = OF_METHODS | COLUMNS
    for group in DIMENSIONS:
        about |= _abouts(sources, group, known)
    return {path: about.get(path, Column()) for path in dict.fromkeys(there)}


def _names(file: h5py.File | None, group: str, wide: tuple[int, ...]) -> list[str]:
    """The columns of a group that are columns."""
    found = list[str]()
    try:
        names = [] if file is None else run_file.names(file, group)
    except FAULTS:
        return found
    for name in names:
        try:
            checked.dataset(file, f"{group}/{name}", checked.NUMBERS, (None, *wide), filled=True)
        except FAULTS:
            continue
        found.append(name)
    return found


def _abouts(sources: Sources, group: str, known: Sequence[str]) -> dict[str, Column]:
    """The unit and the description of each column of a group that can be read."""
    found = dict[str, Column]()
    for file in (sources.beginning, sources.file):  # the file's own win
        try:
            found |= {f"{group}/{name}": Column(*about) for name, about in run_file.abouts(file, group, known).items()} if file else {}
        except FAULTS:
            continue
    return found


def _take_in_force(found: Salvage, file: h5py.File | None, known: Sequence[str]) -> None:
    """Masks and gates, where they changed; those of nothing, where it is not known which were in force."""
    if file is None:
        return
    for r in changes(file, masks.GROUP, _listed(masks.stored_rounds, file), found.rounds, known):
        try:
            found.masks[r] = masks.in_force(file, r, known)
        except FAULTS:
            found.masks[r] = masks.NONE
            found.lost.append(f"the masks from round {r} on, until they change again")
    for r in changes(file, client_gates.GROUP, _listed(client_gates.stored_rounds, file), found.rounds, known):
        try:
            gates = client_gates.last(file, r)
        except FAULTS:
            gates = NO_GATES
            found.lost.append(f"the clients' gates from round {r} on, until they change again")
        found.gates |= {r: gates} if gates else {}


def _listed(stored: Callable[[h5py.File], list[int]], file: h5py.File) -> list[int]:
    try:
        return stored(file)
    except FAULTS:
        return []


def _take_model(found: Salvage, sources: Sources) -> None:
    """The final weights and gates, if they are sound; else the run counts as not finished, and its last checkpoint gives them anew."""
    finished, planned = found.attributes.pop("finished"), found.attributes.get("rounds_planned", found.rounds)
    expected = found.attributes.pop("weights_sha256", "")
    if sources.file is None or not finished:
        return
    try:
        found.model, found.final = attributes.sound_model(sources.file, expected), client_gates.final(sources.file)
    except FAULTS:
        found.model = None
    if found.model is None or found.rounds < planned:
        found.model, found.final = None, None
        source = (
            "there is no checkpoint of them" if sources.checkpoint < planned else "the next `fedsim run` makes them from the checkpoint"
        )
        found.lost.append(f"the final weights: {source}")
