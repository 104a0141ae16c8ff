"""Has SLURM requeue this job, unless that would be in vain: its user cancelled it, it makes no progress, or it was started too often."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from fedsim.errors import NoRoom
from fedsim.simulation.launchers.first_signals import SIGNALS
from fedsim.slurm.batch import restarts
from fedsim.slurm.batch.progress import Reached
from fedsim.slurm.batch.restarts import Restart
from fedsim.slurm.batch.running import say
from fedsim.slurm.batch.slurm_job import JobState, Refused, SlurmJob

KILLED = 60.0  # seconds that SLURM gets to end the job that it requeues
ADVICE = "give the job more time (--time), or its rounds less work (fewer clients in a cohort, fewer epochs, more ranks)"


@dataclass(frozen=True)
class Requeue:
    """The requeue of a job whose run stopped at `now`, allowed `limit` times."""

    job: SlurmJob
    out: Path
    now: Reached
    limit: int

    def unless_in_vain(self, why: str) -> None:
        """Requeues the job, or says in one line why not. Where SLURM does, it ends this process meanwhile."""
        former = restarts.read(self.out)
        try:
            state = self.job.state()
            if obstacle := self._state_forbids(state) or self._in_vain(former):
                say(f"{why} {self.now}; {obstacle}")
                return
            self._requeue(former, "preempted" if state.preempted else why)
        except Refused as error:
            say(f"{why} {self.now}; job {self.job.name} is not requeued: {error}. Submitted again, it goes on from there")
        except (NoRoom, OSError) as error:
            say(f"{why} {self.now}; job {self.job.name} is not requeued, since that cannot be noted: {error}")

    def _state_forbids(self, state: JobState) -> str:
        if state.requeued:
            return f"SLURM requeues job {self.job.name} by itself"
        if state.can_be_requeued:
            return ""
        return f"job {self.job.name} was cancelled ({state.state}), so it is not requeued; submitted again, it goes on from there"

    def _in_vain(self, former: Sequence[Restart]) -> str:
        """Why another start would not help: no progress since the last, or too many starts. Empty where it would."""
        mine = [each for each in former if each.job == self.job.name]
        if mine and mine[-1].round == self.now.round:
            last = mine[-1]
            return (
                f"job {self.job.name} makes no progress and is not requeued: it was {self.now} when it was requeued at {last.at}, and"
                f" is so at {_time()} too; {ADVICE}"
            )
        if (count := max(len(mine), self.job.restarts)) >= self.limit:
            times = {0: "may not be requeued", 1: "was requeued once and is not again"}.get(
                count, f"was requeued {count} times and is not again"
            )
            return f"job {self.job.name} {times} (--restarts {self.limit}); submitted again, it goes on from there"
        return ""

    def _requeue(self, former: Sequence[Restart], why: str) -> None:
        entry = Restart(self.job.name, _time(), self.now.round, why)
        restarts.write(self.out, [*former, entry])
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            self.job.requeue()
        except Refused:
            restarts.write(self.out, former)
            raise
        count = 1 + max(sum(each.job == self.job.name for each in former), self.job.restarts)
        say(f"{why} {self.now}; job {self.job.name} is requeued and goes on from there (restart {count} of {self.limit} at most)")
        signal.sigtimedwait(SIGNALS, KILLED)  # SLURM's SIGTERM


def _time() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
