"""Which libraries belong to which launchers, and what a rank that does not belong is told."""

from __future__ import annotations

import pytest

from fedsim.errors import LonelyRanks
from fedsim.fleet.mpi.mpi_library import Library
from fedsim.simulation.launchers import belonging, ranks

OPEN_MPI_5, OPEN_MPI_4 = Library("Open MPI", (5, 0, 11)), Library("Open MPI", (4, 1, 4))
MPICH, INTEL = Library("MPICH", (5, 0, 2), "MPICH configure: --with-pm=hydra"), Library("Intel MPI", (2021, 18, 1))
WITH_PMIX = Library("MPICH", (5, 0, 2), "MPICH configure: --with-pmix=/opt/pmix")
OPEN_MPIS = {"OMPI_COMM_WORLD_SIZE": "3", "PMIX_NAMESPACE": "prterun-1@1", "PMIX_RANK": "0"}
HYDRAS = {"PMI_SIZE": "3", "PMI_RANK": "0", "PMI_FD": "11", "MPI_LOCALNRANKS": "3"}
MARKS = (
    *ranks.LAUNCHED,
    *ranks.RANK,
    *ranks.SIZES,
    "PMIX_NAMESPACE",
    "PMI_FD",
    "PMI_PORT",
    "OPAL_PREFIX",
    "I_MPI_PMI",
    "I_MPI_PMI_LIBRARY",
)


@pytest.fixture
def under(monkeypatch: pytest.MonkeyPatch):
    """Sets the variables of a launcher, and those alone."""
    for name in MARKS:
        monkeypatch.delenv(name, raising=False)

    def call(variables: dict[str, str]) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return call


@pytest.mark.parametrize(
    ("variables", "library"),
    [
        ({}, MPICH),
        (OPEN_MPIS, OPEN_MPI_5),
        (OPEN_MPIS, OPEN_MPI_4),
        (OPEN_MPIS, WITH_PMIX),
        (OPEN_MPIS | {"I_MPI_PMI": "pmix"}, INTEL),
        (OPEN_MPIS, Library("MVAPICH", (4, 0))),
        (HYDRAS, MPICH),
        (HYDRAS, INTEL),
        (HYDRAS, OPEN_MPI_4),
    ],
)
def test_what_may_work_is_tried(under, variables: dict[str, str], library: Library) -> None:
    under(variables)
    belonging.refuse_foreign(library)


@pytest.mark.parametrize(("variables", "library"), [(OPEN_MPIS, MPICH), (OPEN_MPIS, INTEL), (HYDRAS, OPEN_MPI_5)])
def test_what_cannot_work_is_refused_before_mpi_starts(under, variables: dict[str, str], library: Library) -> None:
    under(variables)
    with pytest.raises(LonelyRanks, match=rf"the launcher started 3 processes, but mpi4py takes {library}, to which it does not belong"):
        belonging.refuse_foreign(library)


def test_an_open_mpi_that_would_take_the_plugins_of_another_is_refused(under, tmp_path) -> None:
    under(OPEN_MPIS | {"OPAL_PREFIX": str(tmp_path / "one")})
    (tmp_path / "link").symlink_to(tmp_path / "one")
    belonging.refuse_foreign(Library("Open MPI", (5, 0), path=str(tmp_path / "link" / "lib" / "libmpi.so.40")))
    with pytest.raises(LonelyRanks, match="two/lib/libmpi"):
        belonging.refuse_foreign(Library("Open MPI", (5, 0), path=str(tmp_path / "two" / "lib" / "libmpi.so.40")))


def test_one_rank_of_several_is_refused_after_mpi_has_started(under) -> None:
    under(HYDRAS)
    belonging.refuse_lonely_ranks(3, MPICH)
    with pytest.raises(LonelyRanks, match=r"MPICH 5\.0\.2 sees each of them alone"):
        belonging.refuse_lonely_ranks(1, MPICH)
    under({"PMI_SIZE": "1"})
    belonging.refuse_lonely_ranks(1, MPICH)


@pytest.mark.parametrize(
    ("variables", "count"),
    [
        ({}, 0),
        ({"MPI_LOCALNRANKS": "2"}, 2),
        ({"SLURM_STEP_TASKS_PER_NODE": "3,2(x4),1", "SLURM_NODEID": "0"}, 3),
        ({"SLURM_STEP_TASKS_PER_NODE": "3,2(x4),1", "SLURM_NODEID": "4"}, 2),
        ({"SLURM_STEP_TASKS_PER_NODE": "3,2(x4),1", "SLURM_NODEID": "5"}, 1),
        ({"SLURM_STEP_TASKS_PER_NODE": "3", "SLURM_NODEID": "1"}, 0),
    ],
)
def test_how_many_ranks_a_launcher_started_here(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], count: int) -> None:
    for name in ("MPI_LOCALNRANKS", "SLURM_STEP_TASKS_PER_NODE", "SLURM_NODEID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert ranks.here() == count
