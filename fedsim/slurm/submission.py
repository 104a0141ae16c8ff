"""Runs become jobs of SLURM: one run is one job, several are job arrays that fit the site's MaxArraySize.

Why neither submitit (1.5.4) nor simple-slurm (0.3.6) is used underneath; both were read for this:

- submitit submits a Python function: it pickles the function and its arguments into a folder, unpickles them in the job, and pickles the
  result. Here a job is a TOML file and a result an HDF5 file, and nothing is unpickled.
- Its text starts `srun python -m submitit.core._submit`, so ranks are tasks of srun, which need a SLURM with the PMI of the MPI. We also
  start mpirun, inside a script that hears signals before Python is there.
- It requeues by a handler in a Python task, after a timeout at most three times unless told otherwise, and calls `checkpoint()` of the
  pickled object. Here `fedsim batch` decides by the run file: progress, a limit, preemption, scancel.
- It asks sacct for states, which sites without accounting do not have, and makes one array of any length: it knows no MaxArraySize.
- simple-slurm writes option lines without quotation marks, hands the text to a shell (`sbatch << EOF`), and has no arrays beyond one.

What is left, a text and a call of sbatch, is in `script.py` and `queue.py`.
"""

from __future__ import annotations

import getpass
import os
import re
import sys
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedsim_analysis.how_far import how_far

from fedsim.config import job as jobs
from fedsim.config import own_code
from fedsim.config.job import Job
from fedsim.config.job_file import set_field
from fedsim.errors import BadInput, naming_path
from fedsim.simulation.resume import differences
from fedsim.simulation.sweep import plan
from fedsim.slurm import arrays, queue, records, script, states
from fedsim.slurm.arrays import Array, Limits
from fedsim.slurm.options import Options
from fedsim.slurm.records import Ledger, Submitted
from fedsim.slurm.script import Name, Place


class PartlyRefused(RuntimeError):
    """SLURM took some of the jobs and refused another; `submission` says which run where. The same call submits the rest."""

    def __init__(self, message: str, submission: Submission) -> None:
        super().__init__(message)
        self.submission = submission


@dataclass(frozen=True)
class Part:
    """What sbatch gets in one call: a batch text, and the runs it does. job: SLURM's number of it; empty where nothing was submitted."""

    text: str
    path: Path
    runs: tuple[str, ...]
    job: str = ""


@dataclass(frozen=True)
class Submission:
    """What was submitted, or would be. skipped: by the names of runs, why these were not."""

    folder: Path
    parts: tuple[Part, ...] = ()
    skipped: Mapping[str, str] = field(default_factory=dict)

    @property
    def job_ids(self) -> list[str]:
        """SLURM's numbers of the jobs and arrays, in the order of `texts`; empty after a dry run."""
        return [part.job for part in self.parts if part.job]

    @property
    def run_files(self) -> list[Path]:
        """The files that the submitted runs will write."""
        return [self.folder / f"{run}.h5" for part in self.parts for run in part.runs]

    @property
    def texts(self) -> list[str]:
        """The batch texts."""
        return [part.text for part in self.parts]


@dataclass(frozen=True)
class Wanted:
    """A run that is to be submitted. job: its resolved job as TOML; None where the one of its last submission stands."""

    name: str
    rounds: int
    job: str | None = None


def submit(given: Sequence[Job], folder: Path, options: Options, dry_run: bool = False) -> Submission:
    """Submits the runs of some jobs; a job without [sweep] alone is one job of SLURM. With `dry_run` nothing is written or submitted.

    Runs that are finished, and those that wait or run in SLURM already, are left out. Raises BadInput before anything is submitted, and
    PartlyRefused where SLURM has taken a part.
    """
    if not dry_run:
        queue.refuse_without_sbatch()
    _refuse_code_of_this_process(given)
    given = [_as_submitted(job, options) for job in given]
    options = replace(options, threads=max(job.execution.threads for job in given))
    planned = plan(given, folder)
    chosen = [planned[i] for i in arrays.chosen(options.array, len(planned))]
    with _alone(folder, dry_run):
        ledger = records.read(folder)
        busy = busy_runs(ledger, [run.name for run in chosen], dry_run)
        wanted, skipped = list[Wanted](), dict[str, str]()
        for run in chosen:
            text = jobs.resolved(run.job)
            if run.name in busy:
                _refuse_another_job(ledger, run.name, run.job)
                skipped[run.name] = busy[run.name]
            elif how_far(run.out).finished:
                skipped[run.name] = "it is finished"
            else:
                wanted.append(Wanted(run.name, run.job.rounds, text))
        title = given[0].name if len(given) == 1 else folder.absolute().name or "fedsim"
        return Sending(ledger, options, title, skipped, dry_run).send(wanted)


def busy_runs(ledger: Ledger, names: Sequence[str], dry_run: bool = False) -> dict[str, str]:
    """Which of the runs wait or run in SLURM, and as which job. BadInput where SLURM cannot say; in a dry run there is nobody to ask."""
    known = {name: ledger.runs[name] for name in names if name in ledger.runs}
    found: dict[str, str] = {}
    try:
        for user in {ledger.submissions[entry.submission].user for entry in known.values()}:
            there = queue.queued(user)
            records.find_lost(ledger, {job: each.script for job, each in there.items()})
            for name in known:
                if (at := there.get(ledger.job(name))) and not states.ended(at.state):
                    found[name] = f"it {'waits' if states.waits(at.state) else 'runs'} as job {at.job}"
    except (queue.Refused, FileNotFoundError) as error:
        if not dry_run:
            raise BadInput(f"SLURM does not say which runs of {ledger.folder} wait or run already: {error}") from None
    return found


@dataclass(frozen=True)
class Batch:
    """What sbatch gets in one call, and what the ledger says of it. array: None for a single run."""

    part: Part
    name: str
    array: Array | None = None


@dataclass(frozen=True)
class Sending:
    """Runs on their way to SLURM, whatever became of them before. title: the name of their arrays."""

    ledger: Ledger
    options: Options
    title: str
    skipped: Mapping[str, str] = field(default_factory=dict)
    dry_run: bool = False
    here: Path = field(default_factory=lambda: working_folder())

    def send(self, wanted: Sequence[Wanted]) -> Submission:
        """Submits the runs, unless it is a dry run. Raises as `submit`."""
        batches = self._batches([run.name for run in wanted])
        if not self.dry_run and wanted:
            self._write(wanted)
            batches = self._carry_out(batches, {run.name: run.rounds for run in wanted})
        return self._submission(batches)

    def _submission(self, batches: Sequence[Batch]) -> Submission:
        return Submission(self.ledger.folder, tuple(batch.part for batch in batches), self.skipped)

    def _batches(self, runs: Sequence[str]) -> list[Batch]:
        place = Place(self.here, Path(os.path.normpath(working_folder() / self.ledger.folder)), _program(self.options))
        if "\\" in str(place.folder):
            raise BadInput(
                f"{place.folder}: SLURM cannot write the output of jobs into a folder with a \\ in its name; choose another --out"
            )
        limits = queue.limits() or Limits()
        if len(runs) < 2 or not limits.allows_arrays:
            texts = [script.text(Name(run, run), place, self.options) for run in runs]
            return [Batch(Part(text, place.slurm / f"{run}.sbatch", (run,)), run) for run, text in zip(runs, texts, strict=True)]
        names = {index: name for name, index in self.ledger.indices(runs).items()}
        found = []
        for number, array in enumerate(arrays.cut(sorted(names), limits, arrays.at_once(self.options.array)), self._free_number()):
            text = script.text(Name(self.title), place, self.options, array)
            part = Part(text, place.slurm / f"array-{number}.sbatch", tuple(names[index] for index in array.indices))
            found.append(Batch(part, self.title, array))
        return found

    def _free_number(self) -> int:
        """From which on no array has a text."""
        names = [Path(each.text).name for each in self.ledger.submissions] + [
            path.name for path in self.ledger.slurm.glob("array-*.sbatch")
        ]
        return max((int(match[1]) for name in names if (match := re.fullmatch(r"array-(\d{1,9})\.sbatch", name))), default=-1) + 1

    def _write(self, wanted: Sequence[Wanted]) -> None:
        """The resolved jobs, and the names of the runs."""
        with naming_path(self.ledger.slurm):
            for name in ("jobs", "log"):
                (self.ledger.slurm / name).mkdir(parents=True, exist_ok=True)
            for run in wanted:
                if run.job is not None:
                    records.put(self.ledger.slurm / "jobs" / f"{run.name}.toml", run.job.encode())
            self.ledger.add([run.name for run in wanted])

    def _carry_out(self, batches: Sequence[Batch], rounds: Mapping[str, int]) -> list[Batch]:
        """Calls sbatch once for each batch. What was submitted is known at every instant: an entry is written before each call."""
        done: list[Batch] = []
        indices = self.ledger.indices(list(rounds))
        for batch in batches:
            records.put(batch.part.path, os.fsencode(batch.part.text))
            before = self.ledger.begin(self._submitted(batch), {run: (indices[run], rounds[run]) for run in batch.part.runs})
            try:
                job = queue.sbatch(batch.part.path, self.here)
            except queue.Silent as error:
                raise PartlyRefused(f"{error}; whether it took {batch.part.path} is seen later", self._submission(done)) from None
            except queue.Refused as error:
                self.ledger.withdraw(before)
                batch.part.path.unlink(missing_ok=True)
                raise self._refusal(str(error), done, len(rounds)) from None
            self.ledger.numbered(job)
            done.append(replace(batch, part=replace(batch.part, job=job)))
        return done

    def _submitted(self, batch: Batch) -> Submitted:
        array = batch.array
        return Submitted(
            batch.name,
            str(batch.part.path),
            datetime.now(UTC).isoformat(timespec="seconds"),
            getpass.getuser(),
            str(self.here),
            self.options.given,
            array.offset if array else 0,
            array.spec if array else None,
        )

    def _refusal(self, why: str, done: Sequence[Batch], count: int) -> Exception:
        if not done:
            return BadInput(f"sbatch refused it: {why}")
        runs = sum(len(batch.part.runs) for batch in done)
        there = ", ".join(batch.part.job for batch in done)
        return PartlyRefused(
            f"sbatch refused more: {why}\n{runs} of {count} runs are submitted (job {there}); the same command submits the rest later",
            self._submission(done),
        )


def _as_submitted(job: Job, options: Options) -> Job:
    """The job with what the options say of its execution. Ranks that share a GPU get equal parts of its memory, if the job says none."""
    more: dict[str, Any] = {"threads": options.threads, "scratch": options.scratch or None}
    if (job.given.get("execution") or {}).get("scratch"):
        del more["scratch"]
    if options.ranks_per_gpu > 1 and job.execution.gpu_memory_fraction == 1:
        more["gpu_memory_fraction"] = 1 / -(-options.all_ranks // options.gpus)
    if not (more := {name: value for name, value in more.items() if value is not None}):
        return job
    table = job.given
    for name, value in more.items():
        set_field(table, f"execution.{name}", value)
    return jobs.check(table, job.name)


def _refuse_code_of_this_process(given: Sequence[Job]) -> None:
    """BadInput for a method or a model that stands in the script or the notebook that submits: a job of SLURM does not have it."""
    for job in given:
        for name in own_code.names(job):
            if name.startswith("__main__:"):
                own = name.removeprefix("__main__:")
                raise BadInput(
                    f"{job.name}: {name} stands in this script or notebook; write it to a file, such as mine.py, and name it mine:{own}"
                )


def _refuse_another_job(ledger: Ledger, name: str, job: Job) -> None:
    """BadInput where a run of this name waits in SLURM and computes something else."""
    path = ledger.slurm / "jobs" / f"{name}.toml"
    if path.exists() and jobs.identity(waiting := jobs.load(path)) != jobs.identity(job):
        how = differences(tomllib.loads(jobs.resolved(waiting)), jobs.resolved(job))
        raise BadInput(f"{name} waits or runs in SLURM as another job ({how}), as {path} says: choose another --out FOLDER")


@contextmanager
def _alone(folder: Path, dry_run: bool) -> Iterator[None]:
    if dry_run:
        yield
        return
    with naming_path(folder, "; choose another --out FOLDER"):
        folder.mkdir(parents=True, exist_ok=True)
    with records.alone(folder):
        yield


def working_folder() -> Path:
    """The working folder, by the name that the user's shell has for it: other nodes may not know the one behind a link."""
    named = Path(os.environ.get("PWD", ""))
    return named if named.is_absolute() and named.is_dir() and named.samefile(Path.cwd()) else Path.cwd()


def _program(options: Options) -> tuple[str, ...]:
    """The words that call fedsim on a node. BadInput where a virtual environment has none."""
    folder = Path(options.venv).expanduser() if options.venv else Path(sys.prefix)
    command = folder / "bin" / "fedsim"
    if command.exists():
        return (str(command.absolute()),)
    if options.venv:
        raise BadInput(f"venv {options.venv}: there is no {command}")
    return (sys.executable, "-m", "fedsim")
