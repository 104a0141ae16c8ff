"""Which job was requeued when, and after which round: `RUN.h5.restarts.json`, beside the run file until the run is finished.

The file is written by whoever writes the run, and read as text of a stranger: what is no entry counts as none.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

LARGEST = 2**20  # bytes of the file that are read
KEPT = 1000  # entries, the newest


@dataclass(frozen=True)
class Restart:
    """One requeue."""

    job: str  # as scontrol names it: "12", or "12_3" for an element of an array
    at: str  # when, with the zone: "2026-01-31T12:00:00+00:00"
    round: int  # the last complete round then, -1 where there was none
    why: str  # what stopped the run

    @classmethod
    def of(cls, entry: Any) -> Restart:
        """The entry of a file. ValueError or TypeError where it is none."""
        made = cls(**entry)
        wanted = {"job": str, "at": str, "round": int, "why": str}
        if any(type(value) is not wanted[name] for name, value in asdict(made).items()) or made.round < -1:
            raise ValueError
        datetime.fromisoformat(made.at)
        return made


def file_of(out: Path) -> Path:
    """The file that belongs to the run file `out`."""
    return out.with_name(f"{out.name}.restarts.json")


def read(out: Path) -> list[Restart]:
    """The requeues of the run `out`, the oldest first; none where the file is absent, damaged or too large."""
    try:
        entries = json.loads(_text(file_of(out)))["restarts"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return []
    found = []
    for entry in entries if isinstance(entries, list) else ():
        with suppress(TypeError, ValueError):
            found.append(Restart.of(entry))
    return found


def write(out: Path, restarts: Sequence[Restart]) -> None:
    """Writes the file aside and renames it; removes it where there is none to write. Raises NoRoom and OSError; then the former stands."""
    if not restarts:
        remove(out)
        return
    from fedsim.storage.disk_room import put  # it imports h5py

    text = json.dumps({"restarts": [asdict(each) for each in restarts[-KEPT:]]}, indent=1)
    put(file_of(out), f"{text}\n".encode())


def remove(out: Path) -> None:
    """Removes the file, if there is one and it can be removed."""
    with suppress(OSError):
        file_of(out).unlink()


def _text(path: Path) -> bytes:
    """What the file holds. ValueError where it is too large or no plain file: a pipe would never end."""
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(handle, "rb") as file:
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode) or found.st_size > LARGEST:
            raise ValueError
        return file.read(LARGEST)
