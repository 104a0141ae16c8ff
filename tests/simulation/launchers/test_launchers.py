"""Real launchers start the same job with the same weights; where launcher and library do not belong together, one message says so."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import h5py
import pytest
from launchers import launcher
from processes import environment, rows, wait_for
from small_job import small_job

pytestmark = pytest.mark.processes
OTHERS = ["system", "mpich", "impi"]
FULL = pytest.mark.full
ENDED = 30.0  # seconds, far above the second or two that it takes


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("job") / "job.toml"
    path.write_text(small_job(3))
    return path


@pytest.fixture(scope="module")
def alone(job: Path) -> str:
    """The hash of the weights of one process."""
    command = [sys.executable, "-m", "fedsim", "run", str(job), "--out", "alone.h5"]
    subprocess.run(command, cwd=job.parent, env=environment(), check=True, capture_output=True, timeout=300)
    return weights(job.with_name("alone.h5"))


def weights(run: Path) -> str:
    with h5py.File(run, locking=False) as file:
        return str(file.attrs["weights_sha256"])


def under(starter: str, library: str, job: Path, out: Path) -> subprocess.CompletedProcess[str]:
    """`fedsim run` on three ranks of one launcher with the library of another."""
    words = [*launcher(starter).command(3), sys.executable, "-m", "fedsim", "run", str(job), "--out", str(out)]
    variables = environment() | launcher(library).variables()
    return subprocess.run(words, cwd=job.parent, env=variables, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.parametrize("name", ["openmpi", *[pytest.param(name, marks=FULL) for name in ("system", "impi")], "mpich"])
def test_three_ranks_of_each_launcher_end_with_the_weights_of_one_process(name: str, job: Path, alone: str, tmp_path: Path) -> None:
    ended = under(name, name, job, tmp_path / "run.h5")
    assert ended.returncode == 0, ended.stderr
    assert {"openmpi": "3 ranks of Open MPI 5", "system": "3 ranks of Open MPI 4", "mpich": "MPICH", "impi": "Intel MPI"}[
        name
    ] in ended.stdout
    assert weights(tmp_path / "run.h5") == alone


@pytest.mark.full
@pytest.mark.parametrize(("starter", "library"), [("mpich", "impi"), ("impi", "mpich"), ("system", "openmpi")])
def test_launchers_that_speak_the_librarys_protocol_start_it_too(starter: str, library: str, job: Path, alone: str, tmp_path: Path) -> None:
    ended = under(starter, library, job, tmp_path / "run.h5")
    assert ended.returncode == 0, ended.stderr
    assert weights(tmp_path / "run.h5") == alone


FOREIGN = [("mpich", "openmpi"), ("openmpi", "mpich"), ("openmpi", "impi"), ("openmpi", "system"), ("impi", "openmpi"), ("mpich", "system")]


@pytest.mark.parametrize(("starter", "library"), [FOREIGN[0], *[pytest.param(*pair, marks=FULL) for pair in FOREIGN[1:]]])
def test_a_launcher_of_another_mpi_is_refused_by_one_rank(starter: str, library: str, job: Path, tmp_path: Path) -> None:
    ended = under(starter, library, job, tmp_path / "run.h5")
    assert ended.returncode == 2, ended.stderr
    assert ended.stderr.count("MPI4PY_LIBMPI=") == 1, ended.stderr
    assert str(launcher(library).program.parent) in ended.stderr
    assert "Traceback" not in ended.stderr
    assert "Warning" not in ended.stderr
    assert not (tmp_path / "run.h5").exists()


@contextmanager
def running(name: str, job: Path, out: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Three ranks of a long run, and the mark in the environment by which all its processes are found: hydra gives them other sessions."""
    mark = f"FEDSIM_TEST_RUN={out}"
    words = [*launcher(name).command(3), sys.executable, "-m", "fedsim", "run", str(job), "--out", str(out), "--set", "rounds=3000"]
    variables = environment() | launcher(name).variables() | dict([mark.split("=", 1)])
    with subprocess.Popen(words, cwd=job.parent, env=variables, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process, mark
        finally:
            for member in members(mark):
                with suppress(ProcessLookupError):
                    os.kill(member, signal.SIGKILL)


def members(mark: str) -> list[int]:
    """The living processes that inherited the mark."""
    return [int(entry.name) for entry in Path("/proc").glob("[0-9]*") if mark.encode() in read(entry, "environ").split(b"\0")]


def read(entry: Path, name: str) -> bytes:
    try:
        return (entry / name).read_bytes()
    except OSError:
        return b""


def rank(mark: str, number: int) -> int | None:
    """The process of a rank; the one that watches for it began later."""
    told = {b"OMPI_COMM_WORLD_RANK=%d" % number, b"PMI_RANK=%d" % number}
    found = [pid for pid in members(mark) if told & set(read(Path(f"/proc/{pid}"), "environ").split(b"\0"))]
    return min(found, default=None)


CASES = [("impi", 0, False), ("mpich", 0, True), ("impi", 0, True), ("openmpi", 1, False), ("mpich", 2, False), ("system", 1, True)]


@pytest.mark.parametrize(("name", "number", "trains"), [CASES[0], *[pytest.param(*case, marks=FULL) for case in CASES[1:]]])
def test_all_end_with_a_rank_that_is_killed(name: str, number: int, trains: bool, job: Path, tmp_path: Path) -> None:
    """While it imports, before MPI has started (Intel MPI's launcher would leave the others waiting), or while it trains."""
    out = tmp_path / "run.h5"
    with running(name, job, out) as (process, mark):
        wait_for(lambda: rank(mark, number) and rank(mark, 2) and (out.exists() or not trains))
        killed = rank(mark, number)
        assert killed is not None
        time.sleep(0.2)
        os.kill(killed, signal.SIGKILL)
        give_up = time.monotonic() + ENDED
        while members(mark):
            assert time.monotonic() < give_up, members(mark)
            process.poll()
            time.sleep(0.05)
        assert process.wait() != 0


@pytest.mark.full
@pytest.mark.parametrize(("name", "sent"), [("openmpi", signal.SIGTERM), ("openmpi", signal.SIGUSR1), ("mpich", signal.SIGTERM)])
def test_a_stopped_rank_is_waited_for_and_ended_when_the_run_is_to_stop(name: str, sent: signal.Signals, job: Path, tmp_path: Path) -> None:
    out = tmp_path / "run.h5"
    with running(name, job, out) as (process, mark):
        wait_for(lambda: rows(out) >= 2)
        stopped = rank(mark, 2)
        assert stopped is not None
        os.kill(stopped, signal.SIGSTOP)
        time.sleep(2)
        held = rows(out)
        time.sleep(2)
        assert rows(out) == held
        os.kill(stopped, signal.SIGCONT)
        wait_for(lambda: rows(out) > held + 1)
        os.kill(stopped, signal.SIGSTOP)
        time.sleep(1)  # a rank that was forked stops half a second after the one that stands for it
        process.send_signal(sent)
        wait_for(lambda: process.poll() is not None and not members(mark))
        assert process.returncode != 0
