"""`fedsim batch` without SLURM: what it weighs, how it ends, and that its ranks end with it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import h5py
import pytest
from processes import environment, rows, wait_for
from small_job import small_job

HEAVY = ("torch", "numpy", "h5py", "hdf5")
pytestmark = pytest.mark.processes


@contextmanager
def batch(folder: Path, rounds: int, *options: str, **variables: str) -> Iterator[subprocess.Popen[str]]:
    """`fedsim batch` of a small job that writes `run.h5`."""
    (folder / "job.toml").write_text(small_job(rounds, execution={"plan": "reference", "device": "cpu", "time_limit": 60}))
    command = [sys.executable, "-m", "fedsim", "batch", "job.toml", "--out", "run.h5", *options]
    with subprocess.Popen(
        command, cwd=folder, env=environment() | variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def children(process: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def test_it_is_light_and_its_ranks_end_when_it_is_killed(tmp_path: Path) -> None:
    with batch(tmp_path, 100_000) as process:
        wait_for(lambda: (tmp_path / "run.h5").exists() and rows(tmp_path / "run.h5") >= 1)
        files = Path(f"/proc/{process.pid}/maps").read_text()
        assert not [name for name in HEAVY if name in files]
        (rank,) = children(process.pid)
        process.kill()
        wait_for(lambda: not Path(f"/proc/{rank}").exists())


def test_outside_of_slurm_a_signal_ends_it_with_3_and_the_same_command_goes_on(tmp_path: Path) -> None:
    with batch(tmp_path, 40) as process:
        wait_for(lambda: (tmp_path / "run.h5").exists() and rows(tmp_path / "run.h5") >= 1)
        os.kill(process.pid, signal.SIGTERM)
        _, said = process.communicate(timeout=100)
    assert process.returncode == 3, said
    assert "fedsim batch: SIGTERM came" in said
    with batch(tmp_path, 40) as process:
        out, said = process.communicate(timeout=100)
    assert process.returncode == 0, said
    assert "going on after round" in out
    with h5py.File(tmp_path / "run.h5", locking=False) as file:
        assert file.attrs["finished"]
    assert [path.name for path in tmp_path.glob("*.json")] == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--ranks", "2", "--launcher", "none"], "--launcher none starts one process"),
        (["other.toml"], "'other.toml' is too much; options of the launcher come after --"),
        (["--set", "rounds=3"], "No such option: --set"),
    ],
)
def test_a_wrong_command_line_is_refused_with_2(tmp_path: Path, options: list[str], message: str) -> None:
    with batch(tmp_path, 2, *options) as process:
        _, said = process.communicate(timeout=100)
    assert process.returncode == 2, said
    assert message in said
    assert "Traceback" not in said
    assert not (tmp_path / "run.h5").exists()


@pytest.mark.parametrize(
    ("launcher", "code", "message"),
    [
        ("exit 137", 1, "the ranks ended with exit code 137 (SIGKILL); the run is not finished"),
        ("exit 1", 1, ""),
        ("exit 2", 2, ""),
        ("kill -9 $$", 3, "fedsim batch: the launcher was lost before the first round; the same command starts the run"),
    ],
)
def test_what_the_launcher_ends_with_decides(tmp_path: Path, launcher: str, code: int, message: str) -> None:
    script = tmp_path / "mpirun"
    script.write_text(f"#!/bin/sh\n{launcher}\n")
    script.chmod(0o755)
    with batch(tmp_path, 2, "--ranks", "2", MPIRUN=str(script)) as process:
        _, said = process.communicate(timeout=100)
    assert process.returncode == code, said
    assert message in said
    assert said.count("\n") == bool(message)
