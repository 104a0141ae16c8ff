"""Signals and the time limit: exit code 3, the last complete round stands, and the same command goes on from there."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from processes import Lab, assert_readable, assert_same, rows

STOPPED = "stopped; run.h5 holds all complete rounds, and the same command goes on from there"


def test_a_run_stopped_by_each_signal_in_turn_is_a_run_never_stopped(lab: Lab, reference: Path) -> None:
    for r, name in enumerate((signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2), 1):
        running = lab.start()
        running.until(r)
        os.kill(running.process.pid, name)
        ended = running.ended(within=10)
        assert (ended.code, ended.err) == (3, STOPPED + "\n")
        assert_readable(lab.folder / "run.h5", r)
    assert rows(lab.folder / "run.h5") < 8
    assert lab.run().code == 0
    assert_same(lab.folder / "run.h5", reference)


def test_a_run_whose_time_is_over_stops_and_goes_on(lab: Lab, reference: Path) -> None:
    limit = ("--set", "execution.time_limit=0.000001")
    assert lab.run(*limit).code == 3
    assert not (lab.folder / "run.h5").exists() or rows(lab.folder / "run.h5") < 8
    assert lab.run().code == 0
    assert_same(lab.folder / "run.h5", reference)


@pytest.mark.parametrize(("name", "told"), [(signal.SIGTERM, "rank 0"), (signal.SIGUSR1, "mpirun")])
def test_ranks_stop_together(lab: Lab, reference: Path, name: signal.Signals, told: str) -> None:
    """mpirun hands USR1 and USR2 on to its ranks."""
    running = lab.start(ranks=3)
    running.until(2)
    os.kill(running.rank(0) if told == "rank 0" else running.process.pid, name)
    ended = running.ended(within=20)
    assert ended.code == 3, ended.err
    assert ended.err.count(STOPPED) == 1
    assert_readable(lab.folder / "run.h5", 2)
    assert lab.run().code == 0
    assert_same(lab.folder / "run.h5", reference)


def test_mpirun_that_is_terminated_kills_its_ranks_and_the_run_goes_on(lab: Lab, reference: Path) -> None:
    """mpirun hands neither TERM nor INT on: it ends its ranks itself, with an exit code of its own."""
    running = lab.start(ranks=2)
    running.until(2)
    os.kill(running.process.pid, signal.SIGTERM)
    assert running.ended(within=20).code != 0
    assert_readable(lab.folder / "run.h5", 2)
    assert lab.run().code == 0
    assert_same(lab.folder / "run.h5", reference)
