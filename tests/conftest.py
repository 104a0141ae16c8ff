"""For all tests: which code other processes run, where temporary files go, and which tests start processes."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MEMORY = Path("/dev/shm")  # a disk in memory: a checkpoint waits for the disk twice, which takes 20 ms on some and 0.1 ms there
ROOM = 2**30  # bytes that must be free there; a whole run of the tests needs less than half of it
STARTERS = {"cluster", "gate", "half", "killed", "lab", "quickstart", "run_files"}  # fixtures that start processes


def pytest_configure() -> None:
    """Puts the code of this checkout before what is installed, and temporary files into memory."""
    path = [str(ROOT), str(ROOT / "analysis"), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(path))
    if _fits():
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))


def _fits() -> bool:
    """Whether there is such a disk, with room, where files may be executed too, as SLURM does with scripts."""
    if not os.access(MEMORY, os.W_OK):
        return False
    return shutil.disk_usage(MEMORY).free > ROOM and not os.statvfs(MEMORY).f_flag & os.ST_NOEXEC


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if STARTERS & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.processes)
