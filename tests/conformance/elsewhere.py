"""Lines of the table run by another program, and the folder that all processes of a test session share."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from cases import HERE, images
from filelock import FileLock

PATIENCE = 800  # seconds that a program may take, less than the tests' timeout; the longest takes 40 on two cores
MPI = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe"}


def run_lines(folder: Path, name: str, pairs: Iterable[tuple[str, str]], launcher: tuple[str, ...] = ()) -> Path:
    """Runs lines of the table, (method, way), in one program; the folder of their run files."""
    command = [*launcher, sys.executable, str(HERE / "cases.py"), str(folder), name, *map(":".join, pairs)]
    environment = os.environ | MPI | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return folder / name


def shared_folder(base: Path) -> Path:
    """A folder with the user's images, the same one for all processes that share the tests; `base` is the temporary folder of this one."""
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "conformance"
    folder.mkdir(exist_ok=True)
    with FileLock(folder / "images.lock"):
        images(folder)
    return folder
