"""The batch script by bash, without SLURM: a signal before the run begins ends it with 3, and submitted again it does the run."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import h5py
import pytest
from processes import MPIRUN, environment, signals, wait_for
from small_job import small_job

SCRIPT = Path(__file__).parents[2] / "slurm" / "quickstart.sbatch"


@pytest.fixture
def script(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """The script, started on two ranks, when bash can hear signals."""
    if not MPIRUN.exists():
        pytest.skip("needs the extra [mpi]")
    with started(tmp_path) as process:
        wait_for(lambda: signals(process.pid, "SigCgt", signal.SIGUSR1))
        yield process


def started(folder: Path, **variables: str) -> subprocess.Popen[str]:
    job = folder / "job.toml"
    job.write_text(small_job(2))
    told = environment() | {"SLURM_NTASKS": "2", "JOB": str(job), "OUT": str(folder / "run.h5"), "VENV": sys.prefix} | variables
    return subprocess.Popen(["bash", str(SCRIPT)], cwd=folder, env=told, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("seconds", [0.0, pytest.param(0.05, marks=pytest.mark.full), pytest.param(0.5, marks=pytest.mark.full)])
def test_a_signal_before_the_run_has_begun_ends_the_script_with_3(script: subprocess.Popen[str], tmp_path: Path, seconds: float) -> None:
    """Before mpirun is started, before it can hear signals, or while its ranks import."""
    time.sleep(seconds)
    os.kill(script.pid, signal.SIGUSR1)
    _, said = script.communicate(timeout=150)
    assert script.returncode == 3, said
    assert len(re.findall("stopped .*before the first round", said)) == 1
    assert "Traceback" not in said
    assert not (tmp_path / "run.h5").exists()
    if not seconds:
        with started(tmp_path) as again:
            out, said = again.communicate(timeout=150)
        assert again.returncode == 0, out + said
        with h5py.File(tmp_path / "run.h5", locking=False) as file:
            assert file.attrs["finished"]


@pytest.mark.parametrize(
    ("holds", "code", "message"), [(None, 3, "the launcher was lost before the first round"), (b"no HDF5", 1, "cannot be read")]
)
def test_without_a_run_file_that_can_be_read_there_is_one_message(tmp_path: Path, holds: bytes | None, code: int, message: str) -> None:
    """An mpirun that exits with 0 though the run did not begin."""
    if holds is not None:
        (tmp_path / "run.h5").write_bytes(holds)
    with started(tmp_path, MPIRUN="true") as process:
        _, said = process.communicate(timeout=100)
    assert (process.returncode, said.count("\n")) == (code, 1), said
    assert message in said
