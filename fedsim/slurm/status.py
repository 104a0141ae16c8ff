"""`fedsim submit --status`: what became of each run that was submitted, from run files, SLURM's answers and the output of jobs.

SLURM is asked once for all runs. What has ended is asked for once more, by array. A site without accounts forgets a job some minutes after
its end: then the run file and the last line of the output remain.
"""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from math import isfinite
from pathlib import Path

from fedsim_analysis.foreign_text import printable
from fedsim_analysis.how_far import HowFar, how_far
from fedsim_analysis.watch.runs import Run

from fedsim.errors import BadInput
from fedsim.slurm import logs, queue, records, states
from fedsim.slurm.batch import restarts
from fedsim.slurm.queue import End, Queued
from fedsim.slurm.records import Entry, Ledger

DONE, RUNNING, WAITING, REQUEUED = "done", "running", "waiting", "requeued"
FAILED, STOPPED, LOST, UNREADABLE, NEVER, UNKNOWN = "failed", "stopped", "lost", "unreadable", "not submitted", "unknown"
ORDER = (DONE, RUNNING, WAITING, REQUEUED, FAILED, STOPPED, LOST, UNREADABLE, NEVER, UNKNOWN)
AGAIN = (FAILED, STOPPED, LOST, NEVER)  # what --resubmit submits
SAID_BY_STATE = ("", "None", "NonZeroExitCode", "TimeLimit", "OutOfMemory")  # reasons that tell nothing beside the state and the code
CANCELLED = "CANCELLED"  # its reason is the one for which the job waited before
STOP_CODE = 3  # of a run that was stopped before its end


@dataclass(frozen=True)
class Fate:
    """What became of a run. what: the rest of its line."""

    name: str
    state: str
    what: str = ""
    job: str = ""


@dataclass(frozen=True)
class Status:
    """What became of all runs of a folder. silent: why SLURM did not answer; empty where it did."""

    ledger: Ledger
    fates: tuple[Fate, ...]
    silent: str = ""

    @property
    def count(self) -> dict[str, int]:
        found = Counter(fate.state for fate in self.fates)
        return {state: found[state] for state in ORDER if found[state]}

    @property
    def code(self) -> int:
        """As `fedsim watch FOLDER`: 0 all are done, 1 some failed, 2 some cannot be read, 3 some stopped or go on."""
        there = self.count.keys()
        if there & {FAILED, LOST}:
            return 1
        if UNREADABLE in there:
            return 2
        return 0 if there <= {DONE} else 3

    @property
    def again(self) -> list[str]:
        """The runs that --resubmit submits."""
        return [fate.name for fate in self.fates if fate.state in AGAIN]

    def lines(self) -> Iterator[str]:
        """The count, and a line for each run."""
        yield ", ".join(f"{count:,} {state}" for state, count in self.count.items())
        if self.silent:
            yield f"SLURM does not answer ({printable(self.silent)}); what follows is from files alone"
        names = [printable(fate.name) for fate in self.fates]
        wide, state = max(map(len, names)), max(len(fate.state) for fate in self.fates)
        for name, fate in zip(names, self.fates, strict=True):
            yield f"{name:<{wide}}  {fate.state:<{state}}  {printable(fate.what)}".rstrip()


def status(folder: Path) -> Status:
    """What became of the runs that were submitted into a folder. BadInput where none was."""
    ledger = records.read(folder)
    if not ledger.names:
        if not folder.is_dir():
            raise BadInput(
                f"--status {folder}: {'it is a file' if folder.exists() else 'there is no such folder'}; name the folder of --out"
            )
        raise BadInput(
            f"nothing was submitted into {folder}: it has no slurm/runs.txt. `fedsim watch {shlex.quote(str(folder))}` shows run files"
        )
    silent, there = "", dict[str, Queued]()
    try:
        for user in {each.user for each in ledger.submissions}:
            there |= queue.queued(user)
    except FileNotFoundError:
        silent = "there is no squeue on this machine"
    except queue.Refused as error:
        silent = " ".join(str(error).split())
    records.find_lost(ledger, {job: each.script for job, each in there.items()})
    names = list(dict.fromkeys(ledger.names))
    far = {name: how_far(ledger.folder / f"{name}.h5") for name in names}
    over = [name for name in names if not far[name].finished and (job := ledger.job(name)) and _is_over(there.get(job))]
    known = {} if silent else queue.ends([ledger.job(name) for name in over])
    return Status(ledger, tuple(_fate(name, ledger, far[name], there, known, silent) for name in names), silent)


def _is_over(queued: Queued | None) -> bool:
    return queued is None or states.ended(queued.state)


def _fate(name: str, ledger: Ledger, far: HowFar, there: dict[str, Queued], known: dict[str, End], silent: str) -> Fate:
    job, entry = ledger.job(name), ledger.runs.get(name)
    at = there.get(job)
    if far.finished:
        return Fate(name, DONE, "", job)
    if entry is None:
        return Fate(name, NEVER, _round(far))
    if at and not states.ended(at.state):
        return _waits(name, ledger, far, at) if states.waits(at.state) else _runs(name, ledger, far, at)
    if far.trouble:
        return Fate(name, UNREADABLE, far.trouble, job)
    if silent:
        return Fate(name, UNKNOWN, _joined(f"job {job}" if job else "", _round(far)), job)
    return _ended(name, ledger, far, entry, known.get(job))


def _waits(name: str, ledger: Ledger, far: HowFar, at: Queued) -> Fate:
    """A job that waits although it has printed something was requeued: by `fedsim batch`, which notes that, or by SLURM itself."""
    entry = ledger.runs[name]
    count = sum(each.job == at.job for each in restarts.read(ledger.folder / f"{name}.h5"))
    begun = count or (ledger.slurm / "log" / ledger.submissions[entry.submission].log(entry.index)).exists()
    why = at.reason if at.state == "PENDING" else f"{at.state}, {at.reason}"
    return Fate(name, REQUEUED if begun else WAITING, _joined(f"job {at.job} ({why})", _times(count), _round(far)), at.job)


def _runs(name: str, ledger: Ledger, far: HowFar, at: Queued) -> Fate:
    out = ledger.folder / f"{name}.h5"
    run = Run(out, phases=False, waits=True)
    run.look(None)
    left = f"about {timedelta(seconds=round(seconds))} left" if isfinite(seconds := run.left()) else ""
    rounds = f"round {max(far.round, 0)}/{ledger.runs[name].rounds}"
    state = "" if at.state == "RUNNING" else at.state
    limit = f"time limit in {at.left}" if at.left and at.left[0].isdigit() else ""
    count = sum(each.job == at.job for each in restarts.read(out))
    return Fate(name, RUNNING, _joined(f"job {at.job} on {at.nodes}", state, rounds, left, limit, _times(count)), at.job)


def _ended(name: str, ledger: Ledger, far: HowFar, entry: Entry, end: End | None) -> Fate:
    submitted = ledger.submissions[entry.submission]
    job = submitted.number(entry.index)
    said = logs.last_line(ledger.slurm / "log" / submitted.log(entry.index)) if job else ""
    if end is None:
        why = f"SLURM no longer knows job {job}" if job else "its submission was cut short, and SLURM knows no such job"
        return Fate(name, LOST, _joined(why, _round(far), said), job)
    if not states.ended(end.state):  # it has begun or been requeued since
        return Fate(name, RUNNING, _joined(f"job {job} ({end.state})", _round(far)), job)
    reason = f" ({end.reason})" if end.reason not in SAID_BY_STATE and not end.state.startswith(CANCELLED) else ""
    how = end.state + reason + (f", exit code {end.code}" if end.code else "") + (f", signal {end.signal}" if end.signal else "")
    where = f" on {end.nodes}" if end.nodes and end.nodes != "(null)" else ""
    stopped = end.state.startswith(CANCELLED) or (end.state == "FAILED" and end.code == STOP_CODE)
    return Fate(name, STOPPED if stopped else FAILED, _joined(f"job {job}{where}: {how}", _round(far), said), job)


def _round(far: HowFar) -> str:
    return f"after round {far.round}" if far.round >= 0 else ""


def _times(count: int) -> str:
    return f"requeued {count} time{'s' * (count > 1)}" if count else ""


def _joined(*parts: str) -> str:
    return "; ".join(filter(None, parts))
