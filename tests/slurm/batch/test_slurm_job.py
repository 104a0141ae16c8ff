"""What SLURM 22.05 answered of jobs in each state, and what it means for a requeue."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fedsim.slurm.batch.slurm_job import JobState, Refused, SlurmJob

SHOWN = """JobId=10 ArrayJobId=8 ArrayTaskId=0 JobName=JobState=CANCELLED Reason=x
   UserId=root(0) GroupId=root(0) MCS_label=N/A
   JobState={state} Reason={reason} Dependency=(null)
   Requeue=1 Restarts={restarts} BatchFlag=1 Reboot=0 ExitCode=0:0
   RunTime=00:00:03 TimeLimit=00:01:00 TimeMin=N/A
   PreemptEligibleTime=2026-01-31T12:00:00 PreemptTime={preempt}
   Comment=JobState=CANCELLED Restarts=7
"""


def state(state: str, reason: str = "None", restarts: int = 1, preempt: str = "None") -> JobState:
    """Of a job that had been restarted once when it began."""
    return JobState.of(SHOWN.format(state=state, reason=reason, restarts=restarts, preempt=preempt), 1)


@pytest.mark.parametrize(
    ("shown", "allowed"),
    [
        (state("RUNNING"), True),
        (state("RUNNING", preempt="2026-01-31T12:00:01"), True),
        (state("COMPLETING", "TimeLimit"), True),  # at the time limit
        (state("TIMEOUT", "TimeLimit"), True),
        (state("COMPLETING"), False),  # scancel
        (state("CANCELLED"), False),
        (JobState.of("", 0), False),
    ],
)
def test_a_job_that_its_user_cancelled_may_not_be_requeued(shown: JobState, allowed: bool) -> None:
    assert shown.can_be_requeued is allowed


def test_a_requeue_by_slurm_itself_and_a_preemption_are_seen() -> None:
    assert state("COMPLETING", restarts=2).requeued
    assert not state("COMPLETING").requeued
    assert state("RUNNING", preempt="2026-01-31T12:00:01").preempted
    assert not state("RUNNING").preempted


def test_an_element_of_an_array_has_a_name_of_its_own() -> None:
    """One element has the number of the array, by which scontrol would requeue all of them."""
    element = {"SLURM_JOB_ID": "8", "SLURM_ARRAY_JOB_ID": "8", "SLURM_ARRAY_TASK_ID": "3", "SLURM_RESTART_COUNT": "2"}
    assert SlurmJob.around(element) == SlurmJob("8_3", 2)
    assert SlurmJob.around({"SLURM_JOB_ID": "8"}) == SlurmJob("8", 0)
    assert SlurmJob.around({"SLURM_NTASKS": "3"}) is None


def test_without_scontrol_the_requeue_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(Refused, match=f"scontrol requeue 8.*{os.strerror(2)}"):
        SlurmJob("8", 0).requeue()
