"""N processes that a launcher started and that do not know of each other are told apart from N ranks, and one of them says so."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from processes import environment
from small_job import small_job

STEP = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "3", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "3"}
BATCH = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "3", "SLURM_PROCID": "0"}


def answer(folder: Path, command: str, **variables: str) -> tuple[int, str]:
    """The exit code of `fedsim COMMAND no.toml` with these variables, and what it says on the error stream."""
    words = [sys.executable, "-m", "fedsim", command, "no.toml"]
    ended = subprocess.run(words, cwd=folder, env=environment() | variables, capture_output=True, text=True, timeout=100, check=False)
    assert ended.stdout == ""
    return ended.returncode, ended.stderr


@pytest.mark.processes
def test_tasks_of_srun_without_pmi_are_refused_by_the_first_alone(tmp_path: Path) -> None:
    code, message = answer(tmp_path, "run", **STEP, SLURM_PROCID="0")
    assert (code, message.count("\n")) == (2, 1)
    assert message.startswith("srun started 3 processes that do not know of each other")
    assert "`mpirun -n 3 fedsim run" in message
    assert answer(tmp_path, "run", **STEP, SLURM_PROCID="2") == (2, "")


@pytest.mark.processes
def test_a_batch_script_and_a_step_of_one_task_are_alone(tmp_path: Path) -> None:
    for variables in (BATCH, {**STEP, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}):
        assert answer(tmp_path, "run", **variables) == (2, "no.toml: no such job file\n")


@pytest.mark.processes
def test_one_process_in_the_terminal_of_a_step_of_many_tasks_is_alone(tmp_path: Path) -> None:
    """`srun --pty -n 3 bash`: the user is in the first task, the others have ended."""
    assert answer(tmp_path, "run", **STEP, SLURM_PROCID="0", SLURM_PTY_PORT="1") == (2, "no.toml: no such job file\n")


@pytest.mark.processes
def test_ranks_of_another_mpi_are_refused_by_the_first_alone(tmp_path: Path) -> None:
    """A launcher offers what the library of mpi4py does not take, which would start each rank alone."""
    (tmp_path / "job.toml").write_text(small_job(1))
    words = [sys.executable, "-m", "fedsim", "run", "job.toml", "--out", "run.h5"]
    variables = environment() | {"PMI_SIZE": "3", "PMI_RANK": "0"}
    ended = subprocess.run(words, cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=100, check=False)
    assert (ended.returncode, ended.stderr.count("\n")) == (2, 1), ended.stderr
    assert "the launcher started 3 processes, but mpi4py takes Open MPI" in ended.stderr
    assert "MPI4PY_LIBMPI" in ended.stderr
    assert not (tmp_path / "run.h5").exists()
