"""This job, as SLURM knows it: what becomes of it, and how it is requeued.

What SLURM 22.05 does to a job whose script is one process (seen on a real one, which the tests start):

- `--signal=B:USR1@N`: SIGUSR1 to the script alone. Without `B:` to the steps alone.
- The time limit: SIGCONT and SIGTERM to steps and script, SIGKILL after KillWait. The job is COMPLETING with Reason=TimeLimit then, and
  `scontrol requeue` still starts it again.
- Preemption with a grace time: SIGCONT and SIGTERM to the steps alone, while the job stays RUNNING with a PreemptTime. If the script ends
  by itself within the grace time the job is over (FAILED for code 3), not requeued. At its end, or where there is no grace time, SIGTERM
  to all, SIGKILL after KillWait, and SLURM requeues the job.
- A node that died: SIGTERM to all on the nodes that are left, SIGKILL after KillWait, and SLURM requeues the job.
- `scancel`: SIGCONT and SIGTERM to steps and script, SIGKILL after KillWait. The job is COMPLETING with another reason, and
  `scontrol requeue` would start it again although its user wanted its end.
- Where SLURM requeues by itself, `Restarts` of the job has grown as soon as signals come.
- `scontrol requeue` from inside: SIGTERM to all at once, SIGKILL after KillWait; the job waits for some minutes, then starts anew.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

PATIENCE = 60.0  # seconds that an answer of SLURM may take
LINES = ("JobState", "Requeue", "PreemptEligibleTime")  # of `scontrol show job`, by the field that each begins with


@dataclass(frozen=True)
class SlurmJob:
    """The job around this process: its name for scontrol, and how often SLURM had started it before."""

    name: str
    restarts: int

    @classmethod
    def around(cls, environment: Mapping[str, str]) -> SlurmJob | None:
        """From the variables of the job; None outside of SLURM."""
        number, array, element = (environment.get(f"SLURM_{name}", "") for name in ("JOB_ID", "ARRAY_JOB_ID", "ARRAY_TASK_ID"))
        if not number.isdigit():
            return None
        # One element of an array has the number of the array itself: by that number scontrol would requeue them all.
        name = f"{array}_{element}" if array.isdigit() and element.isdigit() else number
        count = environment.get("SLURM_RESTART_COUNT", "")
        return cls(name, int(count) if count.isdigit() else 0)

    def state(self) -> JobState:
        """What SLURM says of the job now. Raises Refused."""
        return JobState.of(_scontrol("show", "job", self.name), self.restarts)

    def is_ending(self) -> bool:
        """Whether SLURM ends this job, for whatever reason. False where it does not answer."""
        try:
            state = self.state()
        except Refused:
            return False
        return state.preempted or state.requeued or state.state != "RUNNING"

    def requeue(self) -> None:
        """Has SLURM end this job and start it again. Raises Refused."""
        _scontrol("requeue", self.name)


@dataclass(frozen=True)
class JobState:
    """What SLURM says of a job."""

    state: str
    reason: str
    preempted: bool  # its grace time runs
    requeued: bool  # SLURM has done so by itself since the job began

    @classmethod
    def of(cls, shown: str, restarts: int) -> JobState:
        """From the answer of `scontrol show job`, of a job that had been restarted so often when it began."""
        fields = {name: value for line in LINES for name, value in _fields(line, shown)}
        count = fields.get("Restarts", "")
        return cls(
            state=fields.get("JobState", "unknown"),
            reason=fields.get("Reason", ""),
            preempted=fields.get("PreemptTime", "None") not in ("None", "N/A"),
            requeued=count.isdigit() and int(count) > restarts,
        )

    @property
    def can_be_requeued(self) -> bool:
        """Whether it goes on, or ends for its time limit alone; a job that its user cancelled may not."""
        return self.state in ("RUNNING", "TIMEOUT") or self.reason == "TimeLimit"


class Refused(Exception):
    """SLURM did not do what it was asked; the message says why."""


def _fields(begin: str, shown: str) -> list[tuple[str, str]]:
    """The fields of the line that begins so. Names and paths of users stand in lines of their own, and may look like fields."""
    line = re.search(rf"^ *({begin}=.*)$", shown, re.MULTILINE)
    return re.findall(r"(\w+)=(\S*)", line[1]) if line else []


def _scontrol(*arguments: str) -> str:
    command = ["scontrol", *arguments]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=PATIENCE, check=False, env=_plain())
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Refused(f"`{' '.join(command)}` did not work: {error}") from None
    if ended.returncode:
        raise Refused(f"`{' '.join(command)}` was refused: {' '.join(ended.stderr.split()) or f'exit code {ended.returncode}'}")
    return ended.stdout


def _plain() -> dict[str, str]:
    """Without what changes the form of times and answers."""
    return {name: value for name, value in os.environ.items() if name not in ("SLURM_TIME_FORMAT", "SCONTROL_ALL")} | {"LC_ALL": "C"}
