"""Which runs there will be, as files say: sweep.json of a sweep on one machine, and slurm/submitted.json of what was given to SLURM.

`fedsim/storage/sweep_list.py` writes the first, and how each run ended; `fedsim/slurm/records.py` the second. Whether a job still waits in
SLURM no file says: a submitted run without a run file counts as waiting. One that was requeued is known by RUN.h5.restarts.json.
"""

from __future__ import annotations

import json
import re
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedsim_analysis.watch.lock import began

NAME = "sweep.json"
SUBMITTED = "slurm/submitted.json"
RESTARTS = ".restarts.json"  # behind the name of a run file
LARGEST = 2**24  # bytes of a file that is read
LARGEST_RESTARTS = 2**20  # bytes
MOST = 100_000  # runs of a folder
JOB = re.compile(r"\d{1,12}(_\d{1,9})?")  # as SLURM names a job
SILENT = 600.0  # seconds without a sign of life, after which a sweep on another machine counts as ended; it gives one every 30 s


@dataclass(frozen=True)
class Planned:
    """What a sweep says of one of its runs."""

    rounds: int
    state: str  # waiting, running, done, failed, stopped
    message: str
    lives: bool  # whether the sweep still goes on, as far as can be seen from here
    job: str = ""  # of SLURM: "12", or "12_3" for a task of an array
    requeued: int | None = None  # the last complete round when this job was requeued last


def planned(folder: Path, now: float) -> dict[str, Planned]:
    """The runs that sweeps and submissions of this folder list, by the names of their files. now: seconds since 1970."""
    submitted, swept = _submitted(folder), _swept(folder, now)
    return submitted | {name: plan for name, plan in swept.items() if plan.lives or name not in submitted}


def _swept(folder: Path, now: float) -> dict[str, Planned]:
    path = folder / NAME
    try:
        silent = now - path.stat().st_mtime
    except OSError:
        return {}
    return {name: _entry(entry, silent) for name, entry in listed(path).items() if _is_name(name) and isinstance(entry, dict)}


def _submitted(folder: Path) -> dict[str, Planned]:
    found = {}
    for name, entry in listed(folder / SUBMITTED).items():
        if _is_name(name) and isinstance(entry, dict):
            rounds, job = entry.get("rounds"), entry.get("job")
            job = job if isinstance(job, str) and JOB.fullmatch(job) else ""
            begun = (folder / name).exists()
            requeued = _requeued(folder / f"{name}{RESTARTS}", job) if begun else None
            found[name] = Planned(rounds if type(rounds) is int and rounds > 0 else 0, "waiting", "", not begun, job or "?", requeued)
    return found


def _requeued(path: Path, job: str) -> int | None:
    """The round after which the job was requeued last; None where it was not."""
    try:
        if path.stat().st_size > LARGEST_RESTARTS:
            return None
        last = json.loads(path.read_bytes())["restarts"][-1]
        return last["round"] if last["job"] == job and type(last["round"]) is int else None
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None


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
