"""`fedsim batch`: starts the ranks, waits for them, and decides what becomes of the job. The exit code is that of `fedsim run`."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import MutableMapping
from dataclasses import dataclass
from pathlib import Path

from fedsim.errors import BadInput
from fedsim.slurm.batch import launcher, restarts
from fedsim.slurm.batch.running import Running, say
from fedsim.slurm.batch.slurm_job import SlurmJob

DONE, FAULT, BAD_INPUT, STOPPED = 0, 1, 2, 3
EARLY = "FEDSIM_WARNED"  # set by a batch script whose shell heard a signal before this program was started


def main(job: Path, out: Path, start: launcher.Start, limit: int, environment: MutableMapping[str, str] = os.environ) -> int:
    """Does the run `out` of `job`, and has SLURM requeue this job, at most `limit` times, if the run was stopped before its end.

    Raises BadInput.
    """
    running = Running()
    running.listen(before=environment.pop(EARLY, "") != "")
    with tempfile.TemporaryDirectory(prefix="fedsim-batch-", ignore_cleanup_errors=True) as folder:
        note = Path(folder) / "stopped"
        command = start.command(job, out, environment)
        try:
            code = running.run(command, launcher.environment_of_ranks(environment, note))
        except OSError as error:
            raise BadInput(f"{command[0]} cannot be started: {error.strerror}") from None
        ended = Ended(code, running.warned, note.exists())
    return _conclude(out, ended, SlurmJob.around(environment), limit)


@dataclass(frozen=True)
class Ended:
    """How the ranks ended.

    code: of the launcher, negative for a signal that ended it; None where it was not started. warned: the signal that this process
    heard. asked: a signal or the time limit of the job made the ranks stop.
    """

    code: int | None
    warned: str
    asked: bool

    def unfit(self, interrupted: bool) -> int | None:
        """The exit code of an unfinished run that must not be started again as it is; None where it may go on.

        interrupted: SLURM or its user was ending the job, which ends ranks by signals.
        """
        if interrupted or self.code in (None, DONE) or self.code < 0:
            return None
        if self.code == STOPPED:
            return None if self.asked else STOPPED  # else for want of room, say; the run has said why
        say(f"the ranks ended with exit code {self.code}{_signal_of(self.code)}; the run is not finished")
        return FAULT

    @property
    def why(self) -> str:
        """What stopped the run."""
        if self.warned:
            return f"stopped by {self.warned}"
        return "stopped by its time limit or a signal to its ranks" if self.asked else "the launcher was lost"


def _conclude(out: Path, ended: Ended, job: SlurmJob | None, limit: int) -> int:
    """The exit code, by the run file, which has the last word: mpirun exits with 0 when it loses the daemon of a node."""
    from fedsim_analysis.run_file import Unreadable

    from fedsim.slurm.batch.progress import reached
    from fedsim.slurm.batch.requeue import Requeue

    interrupted = bool(ended.warned) or bool(ended.code and job and job.is_ending())
    if ended.code == BAD_INPUT or (ended.code == FAULT and not interrupted):  # mpirun ends with 1 too when SLURM ends its daemons
        return ended.code
    try:
        now = reached(out)
    except Unreadable as error:
        say(str(error))
        return FAULT
    if now.finished:
        restarts.remove(out)
        return DONE
    if (code := ended.unfit(interrupted)) is not None:
        return code
    if job:
        Requeue(job, out, now, limit).unless_in_vain(ended.why)
    elif ended.code != STOPPED:
        say(f"{ended.why} {now}; the same command {'goes on from there' if out.exists() else 'starts the run'}")
    return STOPPED


def _signal_of(code: int) -> str:
    try:
        return f" ({signal.Signals(code - 128).name})"
    except ValueError:
        return ""
