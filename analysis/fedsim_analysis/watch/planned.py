"""sweep.json, in which a sweep says which runs there will be, and how each ended (`fedsim/storage/sweep_list.py` writes it)."""

from __future__ import annotations

import json
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedsim_analysis.watch.lock import began

NAME = "sweep.json"
LARGEST = 2**24  # bytes of a file that is read
MOST = 100_000  # runs of a folder
SILENT = 600.0  # seconds without a sign of life, after which a sweep on another machine counts as ended; it gives one every 30 s


@dataclass(frozen=True)
class Planned:
    """What a sweep says of one of its runs."""

    rounds: int
    state: str  # waiting, running, done, failed, stopped
    message: str
    lives: bool  # whether the sweep still goes on, as far as can be seen from here


def planned(folder: Path, now: float) -> dict[str, Planned]:
    """The runs that the sweeps of this folder list, by the names of their files. now: seconds since 1970."""
    path = folder / NAME
    try:
        silent = now - path.stat().st_mtime
    except OSError:
        return {}
    return {name: _entry(entry, silent) for name, entry in listed(path).items() if _is_name(name) and isinstance(entry, dict)}


def listed(path: Path) -> dict[str, Any]:
    """The entries of a file, as they stand there; none where it is no such file."""
    try:
        if path.stat().st_size > LARGEST:
            return {}
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    runs = found.get("runs") if isinstance(found, dict) else None
    return runs if isinstance(runs, dict) and len(runs) <= MOST else {}


def _is_name(name: str) -> bool:
    """Whether it names a file of the folder itself."""
    return name not in ("", ".", "..") and "/" not in name and "\0" not in name


def _entry(entry: dict[str, Any], silent: float) -> Planned:
    rounds, state, message = entry.get("rounds"), entry.get("state"), entry.get("message")
    return Planned(rounds if type(rounds) is int and rounds > 0 else 0, str(state), str(message or ""), lives(entry, silent))


def lives(entry: dict[str, Any], silent: float) -> bool:
    """Whether the sweep that an entry belongs to goes on. silent: seconds since it gave a sign of life."""
    process = entry.get("process")
    if entry.get("host") == socket.gethostname() and type(process) is int and (there := entry.get("began")):
        return began(process) == there
    return silent < SILENT
