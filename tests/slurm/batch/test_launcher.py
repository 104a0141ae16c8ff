"""The command that starts ranks, and what is refused before anything starts."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest

from fedsim.errors import BadInput
from fedsim.slurm.batch.launcher import BLOCKING, Start, environment_of_ranks

JOB, OUT = Path("job.toml"), Path("runs/run.h5")
RUN = [*BLOCKING, str(Path(sys.executable).with_name("fedsim")), "run", "job.toml", "--out", "runs/run.h5"]


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that stands first on PATH."""
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    return tmp_path


def program(folder: Path, name: str) -> str:
    path = folder / name
    path.touch()
    path.chmod(0o755)
    return str(path)


def test_one_process_needs_no_launcher() -> None:
    assert Start().command(JOB, OUT, {}) == RUN
    assert Start("none").command(JOB, OUT, {"SLURM_NTASKS": "4"}) == RUN


def test_several_ranks_start_by_the_mpirun_of_the_site_or_the_one_that_is_named(programs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", str(programs / "bin" / "python"))
    with pytest.raises(BadInput, match=r"there is no .*mpirun to start several ranks with: load the MPI of the site"):
        Start(ranks=2).command(JOB, OUT, {"MPIRUN": str(programs / "mpirun")})
    site, other = program(programs, "mpirun"), program(programs, "mpiexec.other")
    begin = Start(options=("--map-by", "node")).command(JOB, OUT, {"SLURM_NTASKS": "3"})
    assert begin[:5] == [site, "-n", "3", "--map-by", "node"]
    assert Start(ranks=2).command(JOB, OUT, {"SLURM_NTASKS": "3", "MPIRUN": other})[:3] == [other, "-n", "2"]
    (programs / "bin").mkdir()
    beside = program(programs / "bin", "mpirun")
    assert Start("mpirun", 1).command(JOB, OUT, {})[:3] == [beside, "-n", "1"]


def test_srun_gets_options_after_its_own(programs: Path) -> None:
    program(programs, "srun")
    begin = ["srun", "--mpi=pmix", "--kill-on-bad-exit=1", "-n", "2"]
    assert Start("srun", 2, ("--mpi=pmi2",)).command(JOB, OUT, {}) == [*begin, "--mpi=pmi2", *RUN]
    assert Start("srun", 2).command(JOB, OUT, {"SLURM_CPUS_PER_TASK": "4"}) == [*begin, "--cpus-per-task=4", *RUN]


@pytest.mark.parametrize(
    ("start", "environment", "message"),
    [
        (Start("none", 2), {}, "--launcher none starts one process, and --ranks 2 are 2"),
        (Start("none", 1, ("-x",)), {}, "--launcher none has no launcher that would take -x"),
        (Start(options=("other.toml",)), {}, "takes one job file, and 'other.toml' is too much"),
        (Start(), {"SLURM_JOB_NUM_NODES": "2"}, "this job has 2 nodes and does not say how many ranks"),
    ],
)
def test_what_does_not_fit_together_is_refused(start: Start, environment: dict[str, str], message: str) -> None:
    with pytest.raises(BadInput, match=re.escape(message)):
        start.command(JOB, OUT, environment)


def test_without_srun_the_message_names_mpirun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BadInput, match="no srun on PATH; outside of SLURM say --launcher mpirun"):
        Start("srun", 2).command(JOB, OUT, {})


def test_ranks_with_several_cores_are_not_bound_to_one(tmp_path: Path) -> None:
    policies = {"PRTE_MCA_hwloc_default_binding_policy", "OMPI_MCA_hwloc_base_binding_policy"}
    assert not policies & set(environment_of_ranks({"SLURM_CPUS_PER_TASK": "1"}, tmp_path))
    assert policies <= set(environment_of_ranks({"SLURM_CPUS_PER_TASK": "2"}, tmp_path))


def test_on_one_node_open_mpi_has_a_session_folder_of_its_own(tmp_path: Path) -> None:
    """A base folder of other nodes would be left there, empty."""
    for place in ("PRTE_MCA_prte_tmpdir_base", "OMPI_MCA_orte_tmpdir_base"):
        assert environment_of_ranks({}, tmp_path / "stopped")[place] == str(tmp_path)
        assert environment_of_ranks({place: "/scratch"}, tmp_path / "stopped")[place] == "/scratch"
        assert place not in environment_of_ranks({"SLURM_JOB_NUM_NODES": "2"}, tmp_path / "stopped")


def test_ranks_keep_the_threads_that_a_user_chose(tmp_path: Path) -> None:
    assert environment_of_ranks({}, tmp_path)["OMP_NUM_THREADS"] == "1"
    assert environment_of_ranks({"OMP_NUM_THREADS": "4"}, tmp_path)["OMP_NUM_THREADS"] == "4"
