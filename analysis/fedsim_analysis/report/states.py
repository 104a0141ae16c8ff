"""Which runs have ended, and what is known of the others: whether a process still writes them, and what their sweep says."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fedsim_analysis.watch.lock import holder_of
from fedsim_analysis.watch.planned import Planned, planned

if TYPE_CHECKING:
    import xarray as xr

FINISHED, RUNNING, STOPPED, FAILED, OPEN = "finished", "running", "stopped", "failed", "not finished"
LONGEST = 160  # characters of a sweep's message


@dataclass(frozen=True)
class State:
    """A run, how it fares, and as text how far it is."""

    run: str
    name: str
    rounds: str
    why: str = ""

    def __str__(self) -> str:
        return f"{self.run} ({self.name}, round {self.rounds}{f': {self.why}' if self.why else ''})"


def states(tree: xr.DataTree) -> list[State]:
    """Of every run, in their order."""
    root = tree.to_dataset()
    columns = (root[name].values.tolist() for name in ("run", "path", "finished", "rounds_done", "rounds_planned"))
    listed = _listed(root["path"].values.tolist())
    found = []
    for run, path, finished, done, last in zip(*columns, strict=True):
        name, why = (FINISHED, "") if finished else _open(Path(path), listed)
        found.append(State(str(run), name, rounds(done, last), why))
    return found


def missing(tree: xr.DataTree) -> list[str]:
    """Runs that have failed before they had a file, as the sweeps beside the files say."""
    entries = _listed(tree.to_dataset()["path"].values.tolist())
    return [f"{path.name} ({FAILED}: {_short(entry)})" for path, entry in entries.items() if entry.state == FAILED and not path.exists()]


def rounds(done: int, planned: int) -> str:
    """Rounds that are done, and of how many."""
    return str(max(done, 0)) if planned in (-1, done) else f"{max(done, 0)} of {planned}"


def _listed(paths: list[str]) -> dict[Path, Planned]:
    folders = dict.fromkeys(Path(path).parent for path in paths)
    return {folder / name: entry for folder in folders for name, entry in planned(folder, time.time()).items()}


def _open(path: Path, listed: dict[Path, Planned]) -> tuple[str, str]:
    """How a run fares that has not ended, and why."""
    holder = holder_of(path)
    if holder is not None and holder.writes:
        return RUNNING, ""
    if path in listed and listed[path].state == FAILED:
        return FAILED, _short(listed[path])
    return (OPEN, "") if holder is not None and holder.writes is None else (STOPPED, "")


def _short(entry: Planned) -> str:
    text = " ".join(entry.message.split()) or "no message"
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"
