"""Runs with a mirror that are stopped, killed and continued: as without one, and no process of a tracker stays."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import tracked
from processes import Console, Lab, Running, _read, assert_same, rows, wait_for

from fedsim.simulation.mirrors.names import PLACES
from fedsim.storage.reader import RunReader

CODES = {"SIGUSR1": 3, "SIGTERM": 1, "SIGKILL": -9}  # of mpirun
HOW = [
    pytest.param("csv", "SIGKILL", 0),
    *(pytest.param(name, how, 3, marks=pytest.mark.full) for name in PLACES for how in CODES),
]


def copying(run: Path) -> list[int]:
    """The processes of its mirror, and those that these have started."""
    marks = (b"fedsim.simulation.mirrors.copying", str(run).encode())
    leaders = [pid for pid in _all() if all(mark in _read(pid, "cmdline") for mark in marks)]
    return [pid for pid in _all() if _session(pid) in leaders]


def _all() -> list[int]:
    return [int(entry.name) for entry in Path("/proc").glob("[0-9]*")]


def _session(pid: int) -> int:
    try:
        return os.getsid(pid)
    except OSError:
        return -1


def end(running: Running, how: str) -> None:
    """By a signal to the run or its launcher; what ends it at once leaves the mirror some moments."""
    leaders = {os.getsid(pid) for pid in copying(running.run)}
    assert leaders
    running.process.send_signal(getattr(signal, how))
    assert running.ended().code == CODES[how]
    if how == "SIGUSR1":
        assert not copying(running.run)
    wait_for(lambda: not [pid for pid in _all() if _session(pid) in leaders and _lives(pid)])  # also those that were started since


def _lives(pid: int) -> bool:
    return _read(pid, "stat").rpartition(b")")[2].split()[:1] not in ([], [b"Z"])


@pytest.mark.full
@pytest.mark.processes
@pytest.mark.parametrize(("name", "how", "ranks"), HOW)
def test_it_ends_as_without_a_mirror_and_goes_on(
    name: str, how: str, ranks: int, lab: Lab, console: Console, reference: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = lab.start("--set", f'record.mirror="{name}"', ranks=ranks, hold=4)
    running.until(2)
    end(running, how)
    held, sha = tracked.held(name, running.run, monkeypatch)
    assert set(held["density"]) == set(range(rows(running.run) + 1))
    assert sha == ""
    assert console("--set", f'record.mirror="{name}"').code == 0
    assert_same(running.run, reference)
    held, sha = tracked.held(name, running.run, monkeypatch)
    assert set(held["density"]) == set(range(9))
    assert sha == ("" if name == "csv" else RunReader(running.run).attributes["weights_sha256"])
