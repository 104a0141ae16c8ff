"""What a script or a notebook does with fedsim; `import fedsim` offers it lazily."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from fedsim.config import job as jobs
from fedsim.config.job import Job
from fedsim.errors import BadInput, Stopped
from fedsim.simulation import estimate as estimation
from fedsim.simulation import export, launch
from fedsim.simulation import sweep as sweeping
from fedsim.simulation.finished_round import Callback, FinishedRound
from fedsim.storage.reader import RunReader

Source = str | Path | Mapping[str, Any] | Job


def load_job(job: Source, set: Mapping[str, Any] | None = None) -> Job:
    """The validated job: of a TOML file, of a table as such a file would hold it, or a job as it is.

    set: {"section.field": value}, laid over it. Raises BadInput, which lists every error.
    """
    if isinstance(job, Job):
        table, where = dict(job.given), job.name
    elif isinstance(job, Mapping):
        table, where = dict(job), "job"
    else:
        table, where = jobs.table_of(Path(job)), str(job)
    for field, value in (set or {}).items():
        jobs.put(table, field, value)
    return jobs.check(table, where)


def run(
    job: Source,
    *,
    set: Mapping[str, Any] | None = None,
    out: str | Path | None = None,
    resume: str = "auto",
    callback: Callback | None = None,
    progress: bool = True,
) -> RunReader:
    """Runs a job as `fedsim run` does, and returns its run file, opened for reading.

    job, set: as for `load_job`. out: the run file, runs/NAME.h5 by default. resume: "auto" continues a run of this job, "never" refuses an
    existing run file, "must" refuses a new one. callback: called on rank 0 with each FinishedRound; it may stop the run early.
    progress: whether lines or a bar are printed. Under `mpirun python script.py` every rank calls this function, rank 0 serves, the
    others train, and all return when the run is done.

    Raises BadInput for a job that cannot be run, ClientFault for an exception in a client's work, Stopped for a signal or a time limit.
    """
    if resume not in ("auto", "never", "must"):
        raise BadInput(f"resume = {resume!r} is not known. There are: auto, never, must")
    loaded = load_job(job, set)
    if loaded.sweep:
        raise BadInput(f"{loaded.name}: [sweep] makes {len(jobs.runs(loaded))} runs; fedsim.sweep does all of them")
    path = Path(out) if out else Path("runs") / f"{loaded.name}.h5"
    seen: list[FinishedRound] = []

    def follow(finished: FinishedRound) -> None:
        seen[:] = [finished]
        if callback:
            callback(finished)

    threads = torch.get_num_threads()
    try:
        observer = launch.Observer(None if progress else Console(quiet=True), follow)
        launch.run(loaded, path, resume, launch.connect(), observer)
    except Stopped:
        if not (seen and seen[-1].stopped):
            raise
    finally:
        torch.set_num_threads(threads)
    return RunReader(path)


def sweep(
    job_files: Source | Sequence[Source],
    *,
    set: Mapping[str, Any] | None = None,
    out: str | Path = "runs",
    processes: int | None = None,
    progress: bool = True,
) -> list[RunReader]:
    """All runs of the [sweep] of one or more jobs, one a core, in processes of their own; their run files, opened.

    A script that calls this keeps its own work under `if __name__ == "__main__":`, since the processes import it.
    Raises BadInput before any run begins, and RuntimeError, which says why, if a run has failed.
    """
    many = [job_files] if isinstance(job_files, str | Path | Mapping | Job) else list(job_files)
    code, files = sweeping.sweep([load_job(job, set) for job in many], Path(out), processes, Console(quiet=not progress))
    if code == 3:
        raise Stopped(f"stopped; {out} holds the runs so far, and the same call goes on from there")
    if code:
        raise RuntimeError(f"some runs failed; the error output says why. {len(files)} run files are in {out}")
    return [RunReader(file) for file in files]


def estimate(job: Source, *, set: Mapping[str, Any] | None = None, progress: bool = True) -> list[dict[str, float]]:
    """What the job will cost, round by round from round 0, without training: a row of numbers as in /rounds of a run file.

    progress: whether the tables of `fedsim estimate` are printed. Raises BadInput.
    """
    return estimation.estimate(load_job(job, set), Console(quiet=not progress))


def open_run(path: str | Path) -> RunReader:
    """A run file, opened for reading, also while it grows. Raises BadInput where there is none."""
    return RunReader(path)


def export_module(path: str | Path, client: int | None = None) -> nn.Module:
    """The final network of a finished run as a plain torch module in evaluation mode, or the sub-network of a client.

    Raises BadInput where there is none.
    """
    return export.module_of(path, client)
