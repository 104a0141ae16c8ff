from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from cases import HERE, RUNS, images, run


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the user's images lie."""
    made = tmp_path_factory.mktemp("conformance")
    images(made)
    return made


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
        "PYTHONPATH": str(HERE),
    }
