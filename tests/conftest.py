"""For all tests: which code other processes run, where temporary files go, and in which order files are tested."""

from __future__ import annotations

import os
import shutil
import tempfile
from multiprocessing import util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MEMORY = Path("/dev/shm")  # a disk in memory: a checkpoint waits for the disk twice, which takes 20 ms on some and 0.1 ms there
ROOM = 2**30  # bytes that must be free there; a whole run of the tests needs less than half of it
OUTSIDE = {"test_chromium.py", "test_launchers.py", "test_other_programs.py"}  # beside all of STARTERS
_temporary = ""  # the folder for temporary files of the programs that tests start
STARTERS = {"faults", "slurm"}  # folders whose tests all start processes, or need the run of one


def pytest_configure() -> None:
    """Puts the code of this checkout before what is installed, temporary files into memory, and those of other programs into a folder."""
    path = [str(ROOT), str(ROOT / "analysis"), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(path))
    if _fits():
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))
    global _temporary
    _temporary = tempfile.mkdtemp(prefix="fedsim-tests-")
    os.environ["TMPDIR"] = tempfile.tempdir = _temporary


def pytest_unconfigure() -> None:
    util._run_finalizers()  # a sweep in this process leaves a folder of multiprocessing, which it removes at its end
    shutil.rmtree(_temporary, ignore_errors=True)


def pytest_runtest_setup() -> None:
    """Removes what killed launchers of earlier tests left: one with the same process number would not start beside it."""
    for session in Path(_temporary).glob("ompi.*"):
        if not Path("/proc", session.name.rpartition(".")[2]).exists():
            shutil.rmtree(session, ignore_errors=True)


def _fits() -> bool:
    """Whether there is such a disk, with room, where files may be executed too, as SLURM does with scripts."""
    if not os.access(MEMORY, os.W_OK):
        return False
    return shutil.disk_usage(MEMORY).free > ROOM and not os.statvfs(MEMORY).f_flag & os.ST_NOEXEC


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that start processes come first: they take longest, and at the end all workers have small files to share."""
    for item in items:
        if item.path.parent.name in STARTERS:
            item.add_marker(pytest.mark.processes)
        if STARTERS & set(item.path.parts) or item.path.name in OUTSIDE:
            item.add_marker(pytest.mark.outside)
    starting = {item.path for item in items if item.get_closest_marker("processes")}
    items.sort(key=lambda item: item.path not in starting)
