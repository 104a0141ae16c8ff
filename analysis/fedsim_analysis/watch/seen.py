"""What a run file says now, read again only where the file has changed, and then only the new rows of a few columns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from fedsim_analysis import checked, checksums, run_file
from fedsim_analysis.watch.pace import Pace, pace_of

Array = NDArray[np.float64]

COLUMNS = ("accuracy", "loss", "train_loss", "client_accuracy", "density", "bytes_up", "bytes_down", "seconds")
CHANGING = ("rounds", "finished", "weights_sha256")  # attributes that a run writes anew
PHASES = 50  # at most
PATIENCE = 3  # looks at one state of a file, after which it is not half-written but damaged
MANY = 5000  # rows, as many of which are read as quickly as one


@dataclass(frozen=True)
class Seen:
    """A run file at one moment: rows 0 … `rounds`."""

    attributes: dict[str, Any]
    clients: int
    rounds: int  # the last complete round, -1 before round 0
    finished: bool
    columns: dict[str, Array]  # (rounds + 1,) each
    timing: dict[str, Array]  # (rounds + 1,) seconds of each phase
    damaged: list[str] = field(default_factory=list)  # what is left out, and why

    @property
    def planned(self) -> int:
        return max(int(self.attributes.get("rounds_planned") or 0), self.rounds)

    @property
    def ranks(self) -> int:
        return int(self.attributes.get("ranks") or 1)

    def column(self, name: str) -> Array:
        """(rounds + 1,) of a column; not-a-numbers where the file does not have it."""
        return self.columns.get(name, np.full(self.rounds + 1, np.nan))

    def last(self, name: str) -> tuple[float, int]:
        """The last value that was measured, and in which round; (not-a-number, -1) where there is none."""
        measured = np.flatnonzero(np.isfinite(column := self.column(name)))
        return (float(column[measured[-1]]), int(measured[-1])) if len(measured) else (float("nan"), -1)

    def sent(self) -> Array:
        """(rounds + 1,) bytes up and down in each round; not-a-number where neither is known."""
        both = np.stack([self.column("bytes_up"), self.column("bytes_down")])
        return np.where(np.isfinite(both).any(0), np.nan_to_num(both, posinf=0, neginf=0).sum(0), np.nan)

    def seconds(self) -> Array:
        """(rounds + 1,) from the end of a round to the end of the next; on several ranks recording goes on beside the next round."""
        record = self.timing.get("record", np.zeros(0)) if self.ranks == 1 else np.zeros(0)
        return self.column("seconds") + (np.nan_to_num(record) if len(record) == self.rounds + 1 else 0.0)

    def pace(self) -> Pace:
        return pace_of(self.seconds(), np.isfinite(self.column("accuracy")), self._every())

    def _every(self) -> int:
        try:
            every = run_file.job(self.attributes).get("evaluate", {}).get("every", 0)
        except (checked.Damaged, AttributeError):
            every = 0
        if type(every) is int and every > 0:
            return every
        evaluated = np.flatnonzero(np.isfinite(self.column("accuracy")))
        return int(np.diff(evaluated)[-1]) if len(evaluated) > 1 else 0


class RunFile:
    """A run file that may grow. It is never held open."""

    def __init__(self, path: Path, phases: bool) -> None:
        """phases: whether the seconds of phases are wanted too."""
        self.path, self.phases = path, phases
        self.seen: Seen | None = None  # the last that could be read
        self.trouble = ""  # why the file cannot be read as it is now
        self.changed = 0.0  # when it was last written to, in seconds since 1970
        self._state: tuple[int, ...] = ()
        self._tries = 0  # at this state

    @property
    def exists(self) -> bool:
        return bool(self._state)

    @property
    def damaged(self) -> bool:
        """Whether it could not be read in several looks."""
        return bool(self.trouble) and self._tries >= PATIENCE

    def look(self, anew: bool = False) -> bool:
        """Reads what is new; whether there was something. anew: even if the system says that the file has not changed."""
        try:
            found = self.path.stat()
        except OSError as error:
            gone = isinstance(error, FileNotFoundError | NotADirectoryError)
            self._state, self.trouble = (), "" if gone else f"{self.path} cannot be reached: {error.strerror}"
            return False
        state = (found.st_mtime_ns, found.st_size, found.st_ino)
        if state == self._state and not self.trouble and not anew:
            return False
        if self.damaged and state == self._state and not anew:
            return False
        self._tries = self._tries + 1 if state == self._state else 1
        moved, self._state, self.changed = state[2:] != self._state[2:], state, found.st_mtime
        return self._read(moved)

    def _read(self, moved: bool) -> bool:
        before, lenient = self.seen, self._tries >= PATIENCE
        try:
            self.seen, self.trouble = run_file.read(self.path, lambda file: _seen(file, before, moved, self.phases, lenient)), ""
        except FileNotFoundError:
            self._state = ()
        except (run_file.Unreadable, run_file.Absent) as error:
            self.trouble = str(error)
        return self.seen is not before


def _seen(file: h5py.File, before: Seen | None, moved: bool, phases: bool, lenient: bool) -> Seen:
    rounds, finished = int(checked.attribute(file, "rounds")), bool(checked.attribute(file, "finished"))
    if before and (rounds < before.rounds or before.damaged):
        before = None  # the run went back to a checkpoint
    attributes = before.attributes if before and not moved else run_file.attributes(file)
    attributes = {name: value for name, value in attributes.items() if name not in CHANGING}
    if before and attributes.get("started_at") != before.attributes.get("started_at"):
        before = None  # it is another run
    clients = before.clients if before else int(checked.dataset(file, "client", "iu", (None,)).shape[0])
    known, damaged = checksums.columns(file), list[str]()
    columns = _columns(file, "rounds", COLUMNS, before.columns if before else {}, known, damaged)
    names = [name for name in run_file.names(file, "timing")[:PHASES] if phases or name == "record"]
    timing = _columns(file, "timing", names, before.timing if before else {}, known, damaged)
    if damaged and not lenient:
        raise checked.Damaged(damaged[0])
    return Seen(attributes, clients, rounds, finished, columns, timing, damaged)


def _columns(
    file: h5py.File, group: str, names: Sequence[str], before: dict[str, Array], known: Sequence[str], damaged: list[str]
) -> dict[str, Array]:
    """Those of the columns that there are; what is wrong with others is added to `damaged`."""
    there, found = run_file.names(file, group), dict[str, Array]()
    damaged += [f"{path} is missing" for path in checksums.missing(group, there, known) if path.partition("/")[2] in names]
    for name in names:
        if name not in there:
            continue
        try:
            found[name] = _column(file, group, name, before.get(name), known)
        except checked.Damaged as error:
            damaged.append(str(error))
    return found


def _column(file: h5py.File, group: str, name: str, before: Array | None, known: Sequence[str]) -> Array:
    rows = int(checked.attribute(file, "rounds")) + 1
    if before is None or rows <= MANY * (rows - len(before)):
        return run_file.values(file, group, name, known=known)
    new = [run_file.values(file, group, name, r, known=known) for r in range(len(before), rows)]
    return np.concatenate([before, np.array(new, np.float64)]) if new else before
