"""All runs of one or more jobs in warm processes of one rank: one process imports torch, the others are forked from it, and each takes
one run after the other.

The process that was called hands out the runs, so no two workers have the same one, and it alone speaks. A worker does with its run
what `fedsim run` does: one that is finished is left as it is, one that was killed goes on.
"""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from multiprocessing.connection import wait
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from fedsim.config import own_code
from fedsim.config.job import Job, identity, resolved
from fedsim.config.job import runs as runs_of
from fedsim.errors import BadInput, naming_path
from fedsim.simulation.launchers.ranks import launched, refuse_lonely_tasks
from fedsim.simulation.resume import check_format, differences
from fedsim.simulation.stop_signal import StopSignal
from fedsim.simulation.sweeping.worker import AGAIN, Nest, Outcome, Run, Worker
from fedsim.storage.checkpoint import folder_of
from fedsim.storage.reader import RunReader
from fedsim.storage.sweep_list import SweepList

LOOK = 0.5  # seconds between two looks at the signals and at the rounds done


def _write(message: str) -> None:
    sys.stderr.write(f"{message}\n")
    sys.stderr.flush()


def sweep(
    jobs: Sequence[Job], folder: Path, processes: int | None, console: Console, report: Callable[[str], None] = _write
) -> tuple[int, list[Path]]:
    """Carries out all runs of the jobs; the exit code, and the run files there are. Raises BadInput before any run begins.

    report: is given the message about failed runs and about runs that are left to do.
    """
    refuse_lonely_tasks()
    if launched():
        raise BadInput("fedsim sweep starts its own processes on one machine: call it without mpirun")
    runs = plan(jobs, folder)
    brake = StopSignal(stopping="stopping each run after its pack in flight; a second Ctrl-C ends them at once", raises=False)
    processes = min(processes or _processes(runs), len(runs))
    with brake.listening(), SweepProgress(runs, console, report) as tally:
        brake.say = tally.say
        tally.say(f"{len(runs)} run{'s' * (len(runs) > 1)} in {processes} process{'es' * (processes > 1)}; writing {folder}")
        _carry_out(runs, processes, brake, tally)
    return tally.close(brake.signalled), [run.out for run in runs if run.out.exists()]


def plan(jobs: Sequence[Job], folder: Path) -> list[Run]:
    """Every run with its file; BadInput where two would write one file, or where one holds something else."""
    with naming_path(folder, "; choose another --out FOLDER"):
        taken = folder.exists() and not folder.is_dir()
    if taken:
        raise BadInput(f"--out {folder}: it is the folder of the run files, and there is a file of that name")
    planned = [Run(job, folder / job.file) for each in jobs for job in runs_of(each)]
    names = [run.name for run in planned]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise BadInput(f"two runs would write {folder / twice[0]}.h5: give the jobs different names, or sweep them into different folders")
    for run in planned:
        with naming_path(run.out, "; choose another --out FOLDER"):
            folder_of(run.out).exists()  # the longest of its names
    if others := [run.out for run in planned if run.out.exists() and RunReader(run.out).attributes.get("job_sha256") != identity(run.job)]:
        more = f", and {len(others) - 1} more {'do' if len(others) > 2 else 'does'}" if len(others) > 1 else ""
        known, run = RunReader(others[0]).attributes, next(run for run in planned if run.out == others[0])
        check_format(others[0], known)
        how = differences(RunReader(others[0]).job, resolved(run.job))
        raise BadInput(f"{others[0]} already holds another job ({how}){more}: choose another --out FOLDER")
    return planned


def _processes(runs: Sequence[Run]) -> int:
    """One a core that this process may use, or fewer when a run takes more threads."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // max(run.job.execution.threads for run in runs))


def _carry_out(runs: Sequence[Run], processes: int, brake: StopSignal, tally: SweepProgress) -> None:
    """Hands out the runs until none is left, or a signal came and those in flight have stopped."""
    waiting, busy = deque(runs), list[Worker]()
    with_script = any(name.startswith("__main__:") for run in runs for name in own_code.names(run.job))
    nest = Nest()
    free = [Worker(nest, with_script) for _ in range(processes)]
    try:
        while waiting or busy:
            if brake():
                waiting.clear()
                for worker in busy:
                    worker.stop(brake.forced)  # at every look, since a worker that is about to begin forgets a signal
            while waiting and free:
                busy.append(free.pop(0))
                busy[-1].begin(waiting.popleft())
            tally.look([worker.run for worker in busy])
            ready = wait([worker.pipe for worker in busy], LOOK)
            for worker in [worker for worker in busy if worker.pipe in ready]:
                busy.remove(worker)
                outcome = worker.outcome(brake())
                tally.add(worker.run, outcome)
                if outcome.full:
                    waiting.clear()
                free.append(Worker(nest, with_script) if worker.dead and waiting else worker)
    finally:
        for worker in busy:
            worker.process.terminate()
        for worker in (*free, *busy):
            worker.pipe.close()
        for worker in (*free, *busy):
            worker.end()
        nest.close()


class SweepProgress:
    """What is printed while the runs go on, and how they ended."""

    def __init__(self, runs: Sequence[Run], console: Console, report: Callable[[str], None] = _write) -> None:
        self.runs, self.console, self.report = runs, console, report
        self.width = max(len(run.name) for run in runs)
        self.outcomes: dict[Path, Outcome] = {}
        columns = (BarColumn(20), TextColumn("{task.description}"), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
        quiet = not console.is_terminal
        self.bar = Progress(*columns, console=console, refresh_per_second=4, speed_estimate_period=600, transient=True, disable=quiet)
        self.task = self.bar.add_task(f"0/{len(runs)} runs", total=sum(run.job.rounds for run in runs))

    def __enter__(self) -> SweepProgress:
        self.bar.start()
        self.list = SweepList(self.runs[0].out.parent, {run.out.name: run.job.rounds for run in self.runs}, time.monotonic())
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()
        self._note({run.out.name: ("stopped", "") for run in self.runs})

    def say(self, line: str) -> None:
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def add(self, run: Run, outcome: Outcome) -> None:
        """Takes note of an outcome and tells it in a line."""
        self.outcomes[run.out] = outcome
        self.say(f"{run.name:<{self.width}}  {_outcome_line(run, outcome)}")

    def look(self, busy: Sequence[Run]) -> None:
        """Shows how far the runs are, by their rounds, and writes down which go on."""
        self._note(dict.fromkeys((run.out.name for run in busy), ("running", "")))
        if self.console.is_terminal:
            done = sum(run.job.rounds for run in self.runs if run.out in self.outcomes) + sum(map(_rounds, busy))
            self.bar.update(self.task, completed=done, description=f"{len(self.outcomes)}/{len(self.runs)} runs")

    def _note(self, others: dict[str, tuple[str, str]]) -> None:
        """Writes down how runs ended, and what is known of others."""
        self.list.note(others | {out.name: _state(outcome) for out, outcome in self.outcomes.items()}, time.monotonic())

    def close(self, signalled: bool) -> int:
        """Reports what failed and why, and whether something is left to do; the exit code."""
        failed = [(run, outcome) for run in self.runs if (outcome := self.outcomes.get(run.out)) and outcome.code in (1, 2)]
        done = sum(outcome.code == 0 for outcome in self.outcomes.values())
        stopped = done + len(failed) < len(self.runs)
        lines = [f"{len(failed)} of {len(self.runs)} runs failed:"] if failed else []
        lines += [f"{run.name}: {outcome.message}" for run, outcome in failed]
        lines += [outcome.message for outcome in self.outcomes.values() if outcome.full][:1]
        if stopped:
            lines.append(f"stopped; {done} of {len(self.runs)} runs are done, and {AGAIN}")
        if lines:
            self.report("\n".join(lines))
        if stopped and signalled:
            return 3
        return min((outcome.code for _, outcome in failed), default=3 if stopped else 0)


def _state(outcome: Outcome) -> tuple[str, str]:
    """How a run ended, for others, and what it said of it in one line."""
    state = {0: "done", 3: "stopped"}.get(outcome.code, "failed")
    return state, _said(outcome) if outcome.code else ""


def _said(outcome: Outcome) -> str:
    lines = outcome.message.splitlines() or [""]
    return lines[-1 if lines[0].startswith("Traceback") else 0]


def _outcome_line(run: Run, outcome: Outcome) -> str:
    if outcome.full:
        return f"{outcome.message.splitlines()[0]} (after round {_rounds(run)})"
    if outcome.code == 3:
        return f"stopped after round {_rounds(run)}"
    if outcome.code:
        return f"failed: {_said(outcome) or '?'}"
    how = "finished already" if outcome.already else f"{outcome.seconds:.1f} s"
    try:
        return f"accuracy {_accuracy(run.out):>6.1%}  {how}"
    except BadInput as error:
        return f"{how}; {error}"


def _accuracy(out: Path) -> float:
    """The last that was measured."""
    known = RunReader(out, time.sleep).column("accuracy")
    known = known[np.isfinite(known)]
    return float(known[-1]) if len(known) else float("nan")


def _rounds(run: Run) -> int:
    """Rounds done so far, as its file says."""
    try:
        return max(RunReader(run.out).rounds, 0)
    except BadInput:
        return 0  # not there yet, or in the middle of a write
