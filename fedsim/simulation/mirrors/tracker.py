"""What a tracker is to fedsim, and what it remembers beside its own files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from fedsim.simulation.mirrors.rows import Described, Row

LARGEST = 2**20  # bytes of that file
STATE = "fedsim.json"  # in the folder of a tracker: which run it follows, and how far


class Tracker(Protocol):
    """One tracker, open for the rows of one run. Any exception of it ends the mirror, and not the run."""

    last: int  # the last round that it holds; the next one is written next

    def write(self, r: int, row: Row) -> None:
        """Takes the row of round `r`."""

    def flush(self) -> None:
        """Sees to it that all rows so far can be read by others."""

    def close(self, run: Described) -> None:
        """Ends; `run` has its `weights_sha256` where it is finished."""


Opening = Callable[[Path, Described, int, Path], Tracker]
"""(where it writes, the run, the last round whose row is valid: -1 for a run that begins afresh, the run file) -> the tracker."""


def known_state(folder: Path, run: Described, done: int) -> dict[str, Any]:
    """What `keep_state` kept in the folder for this run; empty for another run, or one that begins afresh."""
    try:
        if (folder / STATE).stat().st_size > LARGEST:
            return {}
        found = json.loads((folder / STATE).read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    sound = isinstance(found, dict) and found.get("job_sha256") == run.job_sha256 and isinstance(found.get("last"), int)
    return found if sound and done >= 0 else {}


def keep_state(folder: Path, run: Described, last: int, **more: Any) -> None:
    aside = folder / f"{STATE}.new"
    aside.write_text(json.dumps({"job_sha256": run.job_sha256, "last": last} | more) + "\n")
    aside.replace(folder / STATE)
