"""When another start would be in vain: without progress since the last one, and beyond the limit."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedsim.slurm.batch.command import STOPPED, Ended
from fedsim.slurm.batch.progress import Reached
from fedsim.slurm.batch.requeue import Requeue
from fedsim.slurm.batch.restarts import Restart
from fedsim.slurm.batch.slurm_job import JobState, SlurmJob

AT = "2026-01-31T12:00:00+00:00"


def in_vain(former: list[Restart], now: int, limit: int = 3, restarts: int = 0) -> str:
    return Requeue(SlurmJob("7", restarts), Path("run.h5"), Reached(now, 9), limit)._in_vain(former)


def noted(job: str, r: int) -> Restart:
    return Restart(job, AT, r, "stopped by SIGUSR1")


def test_a_job_goes_on_as_long_as_it_makes_progress() -> None:
    assert in_vain([], -1) == ""
    assert in_vain([noted("7", -1)], 0) == ""
    assert in_vain([noted("7", 2), noted("7", 4)], 5) == ""
    assert in_vain([noted("7", 2), noted("6", 5)], 5) == ""  # another job's


@pytest.mark.parametrize("r", [-1, 4])
def test_a_job_without_progress_is_not_requeued(r: int) -> None:
    said = in_vain([noted("7", r)], r)
    assert "job 7 makes no progress and is not requeued" in said
    assert AT in said


def test_the_limit_counts_what_was_noted_and_what_slurm_counted() -> None:
    assert in_vain([noted("7", 1), noted("7", 2)], 3, limit=2).startswith("job 7 was requeued 2 times and is not again (--restarts 2)")
    assert in_vain([], 3, limit=1, restarts=1).startswith("job 7 was requeued once and is not again (--restarts 1)")
    assert in_vain([], 3, limit=0).startswith("job 7 may not be requeued (--restarts 0)")
    assert in_vain([noted("7", 1)], 3, limit=2, restarts=1) == ""


def test_a_job_that_slurm_requeues_or_its_user_cancelled_is_left_alone() -> None:
    requeue = Requeue(SlurmJob("7", 0), Path("run.h5"), Reached(3, 9), 3)
    assert requeue._state_forbids(JobState("RUNNING", "None", preempted=False, requeued=False)) == ""
    assert requeue._state_forbids(JobState("COMPLETING", "None", preempted=False, requeued=True)) == "SLURM requeues job 7 by itself"
    assert "job 7 was cancelled" in requeue._state_forbids(JobState("COMPLETING", "None", preempted=False, requeued=False))


def test_a_run_that_stopped_unasked_as_on_a_full_disk_is_not_started_again() -> None:
    assert Ended(STOPPED, "", asked=False).unfit(interrupted=False) == STOPPED
    assert Ended(STOPPED, "", asked=True).unfit(interrupted=False) is None
    assert Ended(STOPPED, "SIGUSR1", asked=False).unfit(interrupted=True) is None
    assert Ended(0, "", asked=False).unfit(interrupted=False) is None  # mpirun that lost a daemon
    assert Ended(137, "", asked=False).unfit(interrupted=False) == 1
