from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import HERE, RUNS, images, run


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the user's images lie."""
    made = tmp_path_factory.mktemp("conformance")
    images(made)
    _compile_kernels(made)
    return made


def _compile_kernels(made: Path) -> None:
    """Fills numba's cache on disk in a process of its own: a kernel that was just compiled rounds otherwise than one from the cache."""
    lines = "[cases.run(name, way, folder, folder / 'compiled' / f'{name}.h5') for name, way in cases.RUNS if way == 'sparse']"
    program = f"import pathlib, sys, cases; folder = pathlib.Path(sys.argv[1]); {lines}"
    paths = os.pathsep.join((str(HERE), str(HERE.parents[1])))
    subprocess.run([sys.executable, "-c", program, str(made)], env=os.environ | {"PYTHONPATH": paths}, capture_output=True, check=True)


@pytest.fixture(scope="session")
def alone(folder: Path) -> dict[tuple[str, str], Path]:
    """The run file of every line of the table in every way, in one process."""
    threads = torch.get_num_threads()
    made = {}
    for name, way in RUNS:
        made[name, way] = folder / "alone" / f"{name}-{way}.h5"
        assert run(name, way, folder, made[name, way]) == 0
    torch.set_num_threads(threads)
    return made


@pytest.fixture(scope="session")
def ranks_environment() -> dict[str, str]:
    """What mpirun needs for root and for more ranks than cores."""
    return os.environ | {
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join((str(HERE), str(HERE.parents[1]))),
    }
