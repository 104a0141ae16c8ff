from __future__ import annotations

from collections.abc import Iterator

import pytest
from cluster import Cluster, missing, started


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A real SLURM of two nodes; skipped where it is not installed."""
    if lacking := missing():
        pytest.skip(f"no real SLURM here, {', '.join(lacking)} missing; on Debian: apt install slurmctld slurmd slurm-client munge")
    with started(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster
