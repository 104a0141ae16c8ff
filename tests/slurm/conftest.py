from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import Cluster, missing, started
from submitted import JOB, Lab, alone


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A real SLURM of two nodes; skipped where it is not installed."""
    if lacking := missing():
        pytest.skip(f"no real SLURM here, {', '.join(lacking)} missing; on Debian: apt install slurmctld slurmd slurm-client munge")
    with started(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> object:
    """The hash that each run of the job must end with."""
    return alone(written(tmp_path_factory.mktemp("alone")))


@pytest.fixture
def lab(cluster: Cluster, tmp_path: Path) -> Lab:
    return Lab(cluster, written(tmp_path), tmp_path / "run.h5")


def written(folder: Path) -> Path:
    (folder / "job.toml").write_text(JOB)
    return folder / "job.toml"
