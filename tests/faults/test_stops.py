"""Signals and the time limit: exit code 3, the last complete round stands, and the same command goes on from there."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import own
import pytest
from processes import Console, Ended, Lab, assert_readable, assert_same, rows

STOPPED = "stopped; run.h5 holds all complete rounds, and the same command goes on from there"


def goes_on(console: Console, lab: Lab, reference: Path) -> None:
    """The same command, in one process, ends as the run that was never stopped."""
    ended = console()
    assert ended.code == 0, ended.err
    assert "going on after round" in ended.out
    assert_same(lab.folder / "run.h5", reference)


def stopped_in(r: int, name: signal.Signals, console: Console, monkeypatch: pytest.MonkeyPatch) -> Ended:
    """How the run ends in this process when it signals itself in round `r`."""
    played = own.Lasting.round

    def signalling(self: own.Lasting, setting: Any, state: Any, fleet: Any, at: int) -> Any:
        if at == r:
            os.kill(os.getpid(), name)
        return played(self, setting, state, fleet, at)

    with monkeypatch.context() as patch:
        patch.setattr(own.Lasting, "round", signalling)
        return console()


def test_a_run_stopped_by_each_signal_in_turn_is_a_run_never_stopped(
    lab: Lab, console: Console, reference: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first from outside."""
    running = lab.start(hold=3)
    running.until(1)
    os.kill(running.process.pid, signal.SIGTERM)
    ended = running.ended(within=30)
    assert (ended.code, ended.err) == (3, STOPPED + "\n")
    assert_readable(lab.folder / "run.h5", 1)
    for name in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        before = rows(lab.folder / "run.h5")
        ended = stopped_in(before + 1, name, console, monkeypatch)
        assert (ended.code, ended.err) == (3, STOPPED + "\n")
        assert_readable(lab.folder / "run.h5", before)
    goes_on(console, lab, reference)


def test_a_run_whose_time_is_over_stops_and_goes_on(lab: Lab, console: Console, reference: Path) -> None:
    assert console("--set", "execution.time_limit=0.000001").code == 3
    assert not (lab.folder / "run.h5").exists() or rows(lab.folder / "run.h5") < 8
    assert console().code == 0
    assert_same(lab.folder / "run.h5", reference)


@pytest.mark.parametrize(("name", "receiver"), [pytest.param(signal.SIGTERM, "rank 0", marks=pytest.mark.full), (signal.SIGUSR1, "mpirun")])
def test_ranks_stop_together(lab: Lab, console: Console, reference: Path, name: signal.Signals, receiver: str) -> None:
    """mpirun hands USR1 and USR2 on to its ranks."""
    running = lab.start(ranks=3, hold=4)
    running.until(2)
    os.kill(running.rank(0) if receiver == "rank 0" else running.process.pid, name)
    ended = running.ended(within=30)
    assert ended.code == 3, ended.err
    assert ended.err.count(STOPPED) == 1
    assert_readable(lab.folder / "run.h5", 2)
    goes_on(console, lab, reference)


@pytest.mark.full
def test_mpirun_that_is_terminated_kills_its_ranks_and_the_run_goes_on(lab: Lab, console: Console, reference: Path) -> None:
    """mpirun hands neither TERM nor INT on: it ends its ranks itself, with an exit code of its own."""
    running = lab.start(ranks=2, hold=4)
    running.until(2)
    os.kill(running.process.pid, signal.SIGTERM)
    assert running.ended(within=30).code != 0
    assert_readable(lab.folder / "run.h5", 2)
    goes_on(console, lab, reference)
