"""What readers refuse of a run file: all that it holds is read once, as they read it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import h5py
import numpy as np
from fedsim_analysis import checked, checksums, masks, run_file
from fedsim_analysis.run_file import DIMENSIONS

from fedsim.storage import client_gates
from fedsim.storage.layout import KINDS
from fedsim.storage.reader import counts_of, kinds_of, model_of

FAULTS = (*run_file.FAULTS, run_file.Absent, run_file.Unreadable)
FILE, MODEL, COUNTER = "the file", "the final weights", "the counter of rounds"


@dataclass
class Checked:
    """What was read of a run file, and what was refused."""

    known: dict[str, Any] = field(default_factory=dict)  # its attributes, as far as they can be read
    refused: dict[str, str] = field(default_factory=dict)  # part -> why
    seen: list[str] = field(default_factory=list)  # what was sound, in words

    @property
    def rounds(self) -> int:
        """The last complete round, as the counter says; -1 where it says nothing that can be."""
        found = self.known.get("rounds", -1)
        return found if type(found) is int else -1

    @property
    def finished(self) -> bool:
        return self.known.get("finished") in (1, True)

    def take(self, part: str, read: Callable[..., Any], *given: Any) -> Any:
        """What `read` gives for what it is given; None, with a note, where that is refused."""
        try:
            return read(*given)
        except FAULTS as error:
            self.refused[part] = message_of(error)
            return None


def message_of(error: Exception) -> str:
    """What an error says, in one line."""
    return run_file.message_of(error) if isinstance(error, Exception) else ""


def of(file: h5py.File) -> Checked:
    """All of an open run file, whose counter and format were checked."""
    found = Checked()
    found.known = {name: found.take(f"the attribute {name!r}", checked.attribute, file, name) for name in _names(file)}
    _attributes(file, found)
    known = found.take("checksums", checksums.columns, file) or []
    _labels(file, found)
    measured = [_columns(file, found, group, known) for group in DIMENSIONS]
    proof = "each row by its checksum" if known else "without checksums, since its writer made none"
    found.seen.append(f"{found.rounds + 1:,} rows of {sum(measured)} columns, {proof}")
    _in_force(file, found, known)
    if found.finished:
        if found.take(MODEL, model_of, file) is not None:
            found.seen.append("the final weights by their SHA-256")
        planned = found.known.get("rounds_planned")
        if type(planned) is int and planned != found.rounds:
            found.refused[COUNTER] = f"the run is marked as finished, and the counter stands at round {found.rounds} of {planned}"
    return found


def _names(file: h5py.File) -> list[str]:
    return [name for name in list(file.attrs)[: run_file.ATTRIBUTES] if name != checksums.NAME]


def _attributes(file: h5py.File, found: Checked) -> None:
    """The attributes with their checksums, and the texts in them."""
    known = found.take("attributes", run_file.attributes, file)
    texts = known if known is not None else found.known
    found.take("the job", run_file.job, texts)
    for name in ("plan", "partition"):
        if isinstance(texts.get(name), str):
            found.take(f"the attribute {name!r}", checked.from_json, texts[name], f"the attribute {name!r}")
    if known is not None:
        found.seen.append(f"{len(known)} attributes")


def _labels(file: h5py.File, found: Checked) -> None:
    for dimension in ("client", "layer"):
        found.take(f"the names in {dimension}", checksums.labels, file, dimension)
    found.take("partition/counts", counts_of, file)
    found.take(KINDS, kinds_of, file)
    for path in ("partition/client_name", "partition/class_name"):
        found.take(path, _names_of, file, path)


def _names_of(file: h5py.File, path: str) -> list[Any] | None:
    return checksums.labels(file, path) if checksums.has(file, path) else None


def _columns(file: h5py.File, found: Checked, group: str, known: Sequence[str]) -> int:
    """Reads the columns of a group; how many are sound."""
    there = found.take(f"{group}/", run_file.names, file, group) or []
    for path in checksums.missing(group, there, known):
        found.refused[path] = f"{path} is missing"
    found.take(f"units of {group}/", run_file.abouts, file, group, known)
    one = 0 if group == "clients" else None  # a client at a time needs little memory, and all rows are checked for it
    for name in there:
        found.take(f"{group}/{name}", run_file.values, file, group, name, None, one, known)
    return sum(f"{group}/{name}" not in found.refused for name in there)


def _in_force(file: h5py.File, found: Checked, known: Sequence[str]) -> None:
    """Masks and gates, where they change."""
    stored = found.take("masks/", masks.stored_rounds, file) or []
    for r in changes(file, masks.GROUP, stored, found.rounds, known):
        found.take(f"masks/{r}", masks.in_force, file, r, known)
    gates = found.take("client_gates/", client_gates.stored_rounds, file) or []
    for r in changes(file, client_gates.GROUP, gates, found.rounds, known):
        found.take(f"client_gates/{r}", client_gates.last, file, r)
    if found.finished:
        found.take("client_gates/final", client_gates.final, file)
    inside = [name for name, rounds in (("masks", stored), ("gates of clients", gates)) if rounds]
    found.seen += [f"{name} by their checksums" for name in inside]


def changes(file: h5py.File, path: str, stored: Sequence[int], last: int, known: Sequence[str]) -> list[int]:
    """The rounds, rising, after which masks or gates may be others than before: where some are stored, or their checksum changes."""
    rounds = {0, *stored} if last >= 0 else set[int]()
    if path in known:
        with suppress(*FAULTS):  # each column says so
            rounds |= set(_of_table(file, path, last, known))
    return sorted(r for r in rounds if r <= last)


def _of_table(file: h5py.File, path: str, last: int, known: Sequence[str]) -> Iterator[int]:
    table = checked.dataset(file, f"{checksums.GROUP}/{checksums.ROWS}", "u", (None, len(known)), filled=True)
    sums = table[: min(last + 1, table.shape[0]), known.index(path)]
    yield from (np.flatnonzero(sums[1:] != sums[:-1]) + 1).tolist()
