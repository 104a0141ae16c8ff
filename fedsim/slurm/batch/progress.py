"""How far the run is, by its run file. Read when the ranks have ended: it imports h5py and numpy."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Reached:
    """How far a run is. round: the last complete one, -1 where there is none."""

    round: int = -1
    of: int | None = None
    finished: bool = False

    def __str__(self) -> str:
        return "before the first round" if self.round < 0 else f"after round {self.round} of {self.of}"


def reached(out: Path) -> Reached:
    """From the run file; raises Unreadable where it is none, or damaged."""
    from fedsim_analysis import run_file
    from fedsim_analysis.checked import attribute

    def look(file: Any) -> Reached:
        planned = attribute(file, "rounds_planned") if "rounds_planned" in file.attrs else None
        return Reached(int(attribute(file, "rounds")), planned, bool(attribute(file, "finished")))

    try:
        return run_file.read(out, look, time.sleep)
    except FileNotFoundError:
        return Reached()
