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
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The job file."""
    path = tmp_path_factory.mktemp("job") / "job.toml"
    path.write_text(JOB)
    return path


@pytest.fixture(scope="session")
def weights(job: Path) -> object:
    """The hash that each run of the job must end with."""
    return alone(job)


@pytest.fixture
def lab(cluster: Cluster, job: Path, tmp_path: Path) -> Lab:
    return Lab(cluster, job, tmp_path / "run.h5")
