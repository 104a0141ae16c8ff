"""Signals and the time limit: exit code 3, the last complete round stands, and the same command goes on from there."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import own
import pytest
from processes import Console, Ended, Lab, Running, assert_readable, assert_same, rows, wait_for

from fedsim.simulation.loop import RoundWriter
from fedsim.simulation.stop_signal import AGAIN, StopSignal

ENDED = "ended at once; run.h5 holds all complete rounds, and the same command goes on from there"
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


def pressed_twice(lab: Lab, process: Callable[[Running], int], ranks: int = 0) -> Ended:
    """How a run ends that is told to stop in a pack that lasts and lasts, and then to end at once."""
    running = lab.start(ranks=ranks)
    running.until(2)
    os.kill(process(running), signal.SIGINT)
    wait_for(lambda: "stopping after the pack" in (lab.folder / "out.txt").read_text())
    time.sleep(2 * AGAIN)
    assert running.process.poll() is None
    os.kill(process(running), signal.SIGINT)
    return running.ended(within=30)


@pytest.mark.parametrize("ranks", [0, pytest.param(3, marks=pytest.mark.full)])
def test_a_second_ctrl_c_ends_the_run_at_once(lab: Lab, console: Console, reference: Path, monkeypatch: Any, ranks: int) -> None:
    monkeypatch.setenv("SLEEP_ROUND", "3")
    ended = pressed_twice(lab, lambda running: running.rank(0) if ranks else running.process.pid, ranks)
    monkeypatch.delenv("SLEEP_ROUND")
    assert ended.code == 3, ended.err
    assert ended.err.startswith(ENDED + "\n")
    told = "stopping after the packs in flight\n" if ranks else "stopping after the pack in flight; a second Ctrl-C ends the run at once\n"
    assert ended.out.count(told) == 1
    assert_readable(lab.folder / "run.h5", 2)
    goes_on(console, lab, reference)


def test_a_forced_end_waits_for_the_row_of_the_round_before(
    lab: Lab, console: Console, reference: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The round is complete, and the thread that writes it down has only begun when both signals come."""
    written, played = RoundWriter.write, own.Lasting.round

    def slow(self: RoundWriter, r: int, *rest: Any) -> None:
        if r == 2:
            time.sleep(3 * AGAIN)
        written(self, r, *rest)

    def pressing(self: own.Lasting, setting: Any, state: Any, fleet: Any, at: int) -> Any:
        if at == 3:
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(1.2 * AGAIN)
        return played(self, setting, state, fleet, at)

    with monkeypatch.context() as patch:
        patch.setattr(RoundWriter, "write", slow)
        patch.setattr(own.Lasting, "round", pressing)
        ended = console()
    assert (ended.code, ended.err) == (3, ENDED + "\n")
    assert rows(lab.folder / "run.h5") == 2
    goes_on(console, lab, reference)


def test_one_key_press_that_arrives_twice_does_not_force_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a launcher hands on what its ranks got from the terminal already; other signals never force it."""
    said: list[str] = []
    stop = StopSignal(say=said.append)
    with stop.listening():
        for name in (signal.SIGINT, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            os.kill(os.getpid(), name)
        time.sleep(2 * AGAIN)
        os.kill(os.getpid(), signal.SIGTERM)
        assert (stop(), stop.forced) == (True, False)
        time.sleep(2 * AGAIN)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    wait_for(lambda: said)
    assert said == ["stopping after the pack in flight; a second Ctrl-C ends the run at once"]
    assert stop.forced


@pytest.mark.full
def test_mpirun_that_is_terminated_kills_its_ranks_and_the_run_goes_on(lab: Lab, console: Console, reference: Path) -> None:
    """mpirun hands neither TERM nor INT on: it ends its ranks itself, with an exit code of its own."""
    running = lab.start(ranks=2, hold=4)
    running.until(2)
    os.kill(running.process.pid, signal.SIGTERM)
    assert running.ended(within=30).code != 0
    assert_readable(lab.folder / "run.h5", 2)
    goes_on(console, lab, reference)
