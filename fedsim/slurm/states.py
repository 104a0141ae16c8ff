"""The states of jobs that SLURM knows, and what they mean for a run."""

from __future__ import annotations

WAITS = {"PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT", "RESV_DEL_HOLD"}
RUNS = {"RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING"}


def waits(state: str) -> bool:
    return state in WAITS


def ended(state: str) -> bool:
    """Whether a job in this state will not go on. sacct adds words: CANCELLED by 1000."""
    return bool(state) and state not in WAITS | RUNS
