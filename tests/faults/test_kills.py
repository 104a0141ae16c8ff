"""Processes that are killed at any instant: nothing hangs, nothing is lost, and the run goes on on other ranks."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest
from processes import Console, Lab, Running, assert_readable, assert_same, rows


def kill_after(running: Running, r: int, seconds: float) -> None:
    running.until(r)
    time.sleep(seconds)
    running.kill()


@pytest.mark.parametrize(
    ("r", "seconds", "ranks"),
    [
        pytest.param(0, 0.0, 2, id="after row 0, on two ranks", marks=pytest.mark.full),
        pytest.param(2, random.Random(2).uniform(0, 0.2), 0, id="within round 3, in one process"),
        pytest.param(5, random.Random(5).uniform(0, 0.2), 0, id="within round 6, in one process", marks=pytest.mark.full),
    ],
)
def test_three_ranks_killed_and_resumed_are_a_run_never_stopped(
    lab: Lab, console: Console, reference: Path, r: int, seconds: float, ranks: int
) -> None:
    kill_after(lab.start(ranks=3, hold=r + 2), r, seconds)
    held = rows(lab.folder / "run.h5")
    assert held in (r, r + 1)
    ended = lab.run(ranks=ranks) if ranks else console()
    assert ended.code == 0, ended.err
    assert_same(lab.folder / "run.h5", reference)


@pytest.mark.full
def test_a_run_killed_again_and_again_is_a_run_never_stopped(lab: Lab, console: Console, reference: Path) -> None:
    instant = random.Random(0)
    for r in (1, 3, 4):
        kill_after(lab.start("--set", "execution.checkpoint_every=2", hold=r + 2), r, instant.uniform(0, 0.1))
    ended = console("--resume", "must")
    assert ended.code == 0, ended.err
    assert "going on after round" in ended.out
    assert_same(lab.folder / "run.h5", reference)


@pytest.mark.parametrize("number", [pytest.param(0, marks=pytest.mark.full), pytest.param(2, marks=pytest.mark.full)])
def test_the_job_ends_with_the_rank_that_was_killed(lab: Lab, number: int) -> None:
    running = lab.start("--set", "rounds=100", ranks=3)
    running.until(1)
    os.kill(running.rank(number), signal.SIGKILL)
    assert running.ended(within=30).code != 0
    assert_readable(lab.folder / "run.h5", 1)


def test_the_ranks_end_with_the_launcher_that_was_killed(lab: Lab) -> None:
    """And nothing of it is left, beside which a launcher with its process number would not start."""
    running = lab.start("--set", "rounds=100", ranks=2)
    running.until(1)
    session = Path(os.environ["TMPDIR"], f"ompi.{running.process.pid}")
    assert session.exists()
    os.kill(running.process.pid, signal.SIGKILL)
    running.ended(within=30)
    assert_readable(lab.folder / "run.h5", 1)
    assert not session.exists()
