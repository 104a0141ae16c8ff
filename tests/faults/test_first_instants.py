"""Signals and the end of the launcher while a run still starts: it stops cleanly, or its ranks end; the same command then does the run."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from processes import Console, Ended, Lab, Running, assert_same, environment, signals, wait_for

USR1 = signal.SIGUSR1
EARLY = "stopped before the first round; the same command starts the run"
BLOCKED = ("env", "--block-signal=USR1")


def begins(lab: Lab, console: Console, reference: Path) -> None:
    """Nothing was written, and the same command does the run that was never stopped."""
    assert not (lab.folder / "run.h5").exists()
    assert console().code == 0
    assert_same(lab.folder / "run.h5", reference)


def stopped(running: Running) -> Ended:
    os.kill(running.process.pid, USR1)
    ended = running.ended()
    assert ended.code == 3, ended.err
    assert ended.err.count(EARLY) == 1
    return ended


def hears(running: Running, rank: int) -> bool:
    """Whether the rank itself catches the signal; the process that watches for it inherits that."""
    try:
        return signals(running.rank(rank), "SigCgt", USR1)
    except ValueError:  # it has not begun
        return False


@pytest.mark.parametrize(
    ("through", "kind"),
    [pytest.param((), "SigCgt", marks=pytest.mark.full), (BLOCKED, "SigBlk")],
    ids=["as soon as Python hears it", "before"],
)
def test_a_signal_in_the_first_instant_stops_the_run(
    lab: Lab, console: Console, reference: Path, through: tuple[str, ...], kind: str
) -> None:
    """A signal that `env` holds back comes when Python can hear it."""
    running = lab.start(through=through)
    wait_for(lambda: signals(running.process.pid, kind, USR1))
    assert stopped(running).err == EARLY + "\n"
    begins(lab, console, reference)


def test_a_signal_while_ranks_import_stops_them_together(lab: Lab, console: Console, reference: Path) -> None:
    running = lab.start(ranks=3)
    wait_for(lambda: all(hears(running, rank) for rank in range(3)))
    stopped(running)
    begins(lab, console, reference)


def test_a_signal_just_before_the_run_listens_is_heard(tmp_path: Path) -> None:
    """It comes after the run has looked whether one has come, and before it listens itself."""
    run = "import os, signal; from fedsim.simulation.launchers import first_signals; first_signals.note()"
    run += "; from fedsim.simulation.stop_signal import StopSignal; stop = StopSignal(); os.kill(os.getpid(), signal.SIGUSR1)"
    run += "\nwith stop.listening(): raise SystemExit(int(stop()))"
    assert subprocess.run([sys.executable, "-c", run], cwd=tmp_path, check=False).returncode == 1


@pytest.mark.full
def test_a_signal_to_one_rank_stops_all(lab: Lab) -> None:
    running = lab.start(ranks=3)
    wait_for(lambda: all(hears(running, rank) for rank in range(3)))
    os.kill(running.rank(1), USR1)
    ended = running.ended()
    assert (ended.code, ended.err.count(EARLY)) == (3, 1), ended.err


@pytest.mark.parametrize("seconds", [pytest.param(0.0, marks=pytest.mark.full), 0.3, pytest.param(1.5, marks=pytest.mark.full)])
def test_ranks_that_start_end_with_the_launcher_that_was_killed(lab: Lab, seconds: float) -> None:
    """A shell stands between mpirun and Python. The limit is far above the second or two that it takes."""
    running = lab.start(ranks=3, through=("sh", "-c", '"$@"; true', "sh"))
    wait_for(lambda: len(running.ranks()) >= 3)
    time.sleep(seconds)
    os.kill(running.process.pid, signal.SIGKILL)
    running.ended(within=30)


@pytest.mark.parametrize("listens", [pytest.param(True, marks=pytest.mark.full), False])
def test_a_rank_whose_launcher_has_ended_before_ends_too(tmp_path: Path, listens: bool) -> None:
    """What Open MPI tells its ranks names a port, where nobody listens when mpirun is gone."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if listens:
            server.listen()
        told = {"OMPI_COMM_WORLD_SIZE": "1", "PMIX_SERVER_URI41": f"prterun-here-1@0;0.0;tcp4://127.0.0.1:{server.getsockname()[1]}"}
        command = [sys.executable, "-m", "fedsim", "run", "no.toml"]
        ended = subprocess.run(command, cwd=tmp_path, env=environment() | told, capture_output=True, text=True, timeout=100, check=False)
    expected = (2, "no.toml: no such job file\n") if listens else (1, "the launcher that started this rank has ended; the rank ends too\n")
    assert (ended.returncode, ended.stderr) == expected


def test_a_rank_without_mpi_ends_with_its_launcher_by_the_watcher_alone(tmp_path: Path) -> None:
    """The launcher is a shell of that name. A rank that has not come to MPI yet is ended by nobody else."""
    launcher = tmp_path / "mpirun"
    shutil.copy(shutil.which("bash") or "/bin/bash", launcher)
    rank = "import os, time; from fedsim.simulation.launchers import watch; watch.begin(); print(os.getpid(), flush=True); time.sleep(900)"
    words = [launcher, "-c", '"$@"; true', "mpirun", sys.executable, "-c", rank]
    variables = environment() | {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"}
    with subprocess.Popen(words, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as started:
        assert started.stdout is not None
        assert started.stderr is not None
        process = int(started.stdout.readline())
        started.kill()
        try:
            wait_for(lambda: _is_dead(process))
        finally:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        assert "mpirun (process " in started.stderr.read()


def _is_dead(process: int) -> bool:
    """Whether it has ended, or only waits for somebody to ask how."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True
