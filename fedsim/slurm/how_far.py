"""How far a run is, by its file alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedsim_analysis import run_file
from fedsim_analysis.checked import attribute


@dataclass(frozen=True)
class HowFar:
    """round: the last complete one, -1 where there is none. trouble: why the file cannot be read; empty where it can, or is not there."""

    round: int = -1
    finished: bool = False
    trouble: str = ""


def how_far(out: Path) -> HowFar:
    """From the run file as it is now; it may be half-written."""
    try:
        return run_file.read(out, _look)
    except FileNotFoundError:
        return HowFar()
    except run_file.Unreadable as error:
        return HowFar(trouble=str(error))


def _look(file: Any) -> HowFar:
    return HowFar(int(attribute(file, "rounds")), bool(attribute(file, "finished")))
