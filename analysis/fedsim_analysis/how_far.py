"""How far a run is, by two attributes of its file: of thousands of runs in seconds."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np

from fedsim_analysis import run_file
from fedsim_analysis.checked import attribute

FAULTS = (OSError, ValueError, KeyError, RuntimeError, TypeError)


@dataclass(frozen=True)
class HowFar:
    """round: the last complete one, -1 where there is none. trouble: why the file cannot be read; empty where it can, or is not there."""

    round: int = -1
    finished: bool = False
    trouble: str = ""


def how_far(path: Path) -> HowFar:
    """From a run file as it is now; it may be half-written. What the quick look cannot make out is read with all checks."""
    if not path.is_file():
        return HowFar(trouble="" if not os.path.lexists(path) else f"{path} is no file")
    try:
        return _quick(path)
    except FAULTS:
        pass
    try:
        return run_file.read(path, lambda file: HowFar(int(attribute(file, "rounds")), bool(attribute(file, "finished"))))
    except FileNotFoundError:
        return HowFar()
    except run_file.Unreadable as error:
        return HowFar(trouble=str(error))


def _quick(path: Path) -> HowFar:
    """Without the checks that a reader of columns needs; a third of the time."""
    access = h5py.h5p.create(h5py.h5p.FILE_ACCESS)
    access.set_fapl_stdio()
    file = h5py.h5f.open(os.fsencode(path), h5py.h5f.ACC_RDONLY, access)
    try:
        rounds, finished = _whole(file, b"rounds"), _whole(file, b"finished")
    finally:
        file.close()
    if rounds < -1 or finished not in (0, 1):
        raise ValueError
    return HowFar(rounds, bool(finished))


def _whole(file: h5py.h5f.FileID, name: bytes) -> int:
    """A whole number. ValueError where the attribute is anything else."""
    found = h5py.h5a.open(file, name)
    if found.shape != () or found.dtype.kind not in "iu":
        raise ValueError
    value = np.zeros((), found.dtype)
    found.read(value)
    return int(value)
