"""What a script or a notebook does with fedsim. `import fedsim` offers these functions, and imports this module when one is first used."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fedsim.config import job as jobs
from fedsim.config import job_file
from fedsim.config.job import Job
from fedsim.config.method_source import look_here_too
from fedsim.errors import BadInput, Stopped, naming_job
from fedsim.simulation import estimate as estimation
from fedsim.simulation import export, launch
from fedsim.simulation import sweep as sweeping
from fedsim.simulation.finished_round import Callback
from fedsim.simulation.launchers import agreement
from fedsim.simulation.progress import output
from fedsim.storage.reader import RunReader

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fedsim.slurm.submission import Submission

JobPath = str | os.PathLike[str]
Source = JobPath | Mapping[str, Any] | Job
RESUME = ("auto", "never", "must")


def load_job(job: Source, set: Mapping[str, Any] | None = None) -> Job:
    """Reads and validates a job. Nothing is computed, and neither `job` nor `set` is changed.

    Arguments:
        job: the path of a TOML file; or a dict of what such a file holds; or a `Job`, to replace some of its values.
        set: {"section.field": value}, values to replace, as `--set` does on the command line. A field that is set here is not
            swept. Numbers of numpy and torch count as Python's own.

    Returns:
        The job, frozen. `job.train.lr` is a value; `job.given` is the table that it was made of, without defaults.

    Raises:
        BadInput: the job is wrong. The message has one line for each error, and is the message of the command line.

    >>> job = load_job({"rounds": 3, "method": {"name": "fedtiny"}}, set={"method.density": 0.05})
    >>> job.rounds, job.method.use.density, job.train.lr
    (3, 0.05, 0.05)
    """
    look_here_too()
    table = _table_of(job)
    for field, value in _settings(set).items():
        job_file.set_field(table, field, value)
    return jobs.check(table, _origin(job))


def run(
    job: Source,
    *,
    set: Mapping[str, Any] | None = None,
    out: JobPath | None = None,
    resume: str = "auto",
    callback: Callback | None = None,
    progress: bool = True,
    trace: JobPath | None = None,
    extend: JobPath | None = None,
) -> RunReader:
    """Runs a job as `fedsim run` does. A run that was stopped is continued; a finished run is left as it is.

    Under `mpirun -n R python script.py` every rank calls this function with the same arguments. Rank 0 is the server, the others
    train clients, and the function returns on all of them when the run has ended.

    Arguments:
        job, set: as for `load_job`. The job makes one run: with a [sweep] use `fedsim.sweep`.
        out: the run file to write; runs/NAME.h5 by default, with the name of the job.
        resume: "auto" continues a run of this job or starts one; "never" refuses an existing run file; "must" refuses a new one.
        callback: is called with a `FinishedRound` after each round, round 0 included, on rank 0 only. It may call
            `finished.stop()`, which ends the run after this round: the function returns as usual, and the same call continues the
            run. An exception of the callback ends the run, under mpirun on all ranks.
        progress: whether progress is printed: a bar in a terminal, about 60 lines at most elsewhere and in notebooks.
        trace: a file for what every rank did when, which ui.perfetto.dev and chrome://tracing show; by default none.
        extend: a finished run of this job with fewer rounds, from which the new run file goes on; by default none.

    Returns:
        The run file, opened for reading, on every rank. `attributes["finished"]` says whether the run has done all its rounds. Only
        rank 0 writes the file: another rank reads it only where it sees the same disk.

    Raises:
        BadInput: the job cannot be run; on every rank, with the message of the command line. No run file is left behind.
        ClientFault: an exception in the work of a client; the message names client, round and step. Under mpirun the message is
            printed and all ranks end with exit code 1.
        MethodFault: an exception in the method on the server, or a wrong value that it returned; the message names the method, its file
            and the verb. Under mpirun as ClientFault.
        Stopped: a signal, `execution.time_limit` or a full disk ended the run; on every rank. The same call continues it.

    >>> data = {"name": "fake", "image_size": 8, "channels": 1, "classes": 4, "train_images": 120, "test_images": 40}
    >>> small = {"rounds": 2, "data": data, "partition": {"clients": 4}, "model": {"width": 4}, "execution": {"plan": "reference"}}
    >>> finished = run(small | {"method": {"name": "fedavg"}}, out="small.h5", progress=False)
    >>> finished.rounds, len(finished.column("accuracy")), finished.attributes["finished"]
    (2, 3, True)
    """
    communicator = launch.connect()
    if communicator:
        agreement.end_all_ranks_with_this_one(communicator)
    with agreement.ending_all_ranks(communicator):
        loaded = agreement.agreed(communicator, lambda: _one_run(job, set, resume))
    path = Path(out) if out else Path("runs") / loaded.file
    observer = launch.Observer(output(quiet=True) if not progress else None, callback, trace=Path(trace) if trace else None)
    with _threads_kept(), naming_job(_origin(job)):
        launch.run(loaded, path, resume, communicator, observer, Path(extend) if extend else None)
    return RunReader(path, check=not (communicator and communicator.rank))


def sweep(
    job_files: Source | Sequence[Source],
    *,
    set: Mapping[str, Any] | None = None,
    out: JobPath = "runs",
    processes: int | None = None,
    progress: bool = True,
) -> list[RunReader]:
    """Does all runs of the [sweep] of one or more jobs, each in a process of its own. Called again, it does what is missing.

    The processes do not import the script that calls this, so it needs no `if __name__ == "__main__":`. The exception is a job
    whose method or model stands in the script itself ("__main__:Name").

    Arguments:
        job_files: a job as for `load_job`, or a list of jobs with different names.
        set: as for `load_job`, for every job; {"sweep.seed": [0, 1, 2]} sweeps a field.
        out: the folder of the run files. Each has the name of its run.
        processes: how many runs at the same time, at least 1; by default one for each core.
        progress: whether a line for each finished run is printed.

    Returns:
        The run files, opened for reading, in the order of the runs: the last field of [sweep] varies fastest.

    Raises:
        BadInput: a job is wrong, or its file holds another job, before any run begins; or it is called under mpirun.
        RuntimeError: some runs failed. The message names each and says why. The other runs are done.
        Stopped: a signal or a full disk ended the sweep. The same call continues it.

    >>> data = {"name": "fake", "image_size": 8, "channels": 1, "classes": 4, "train_images": 120, "test_images": 40}
    >>> small = {"rounds": 1, "data": data, "partition": {"clients": 4}, "model": {"width": 4}, "execution": {"plan": "reference"}}
    >>> runs = sweep(small | {"method": {"name": "fedavg"}}, set={"sweep.seed": [0, 1]}, out="swept", processes=1, progress=False)
    >>> [run.path.name for run in runs]
    ['job-seed0.h5', 'job-seed1.h5']
    """
    if processes is not None and processes < 1:
        raise BadInput(f"processes = {processes}: should be a whole number, at least 1, or None for one on each core")
    many = [load_job(job, set) for job in _many(job_files, "fedsim.sweep")]
    said: list[str] = []
    code, files = sweeping.sweep(many, Path(out), processes, output(quiet=not progress), said.append)
    if code == 3:
        raise Stopped("\n".join(said))
    if code:
        raise RuntimeError("\n".join(said))
    return [RunReader(file) for file in files]


def submit(
    job_files: Source | Sequence[Source],
    *,
    set: Mapping[str, Any] | None = None,
    out: JobPath = "runs",
    dry_run: bool = False,
    **options: Any,
) -> Submission:
    """Submits a run, or all runs of the [sweep] of one or more jobs, to SLURM, as `fedsim submit` does. It does not wait for them.

    One run is one job of SLURM; several are a job array, or as many as the site's MaxArraySize asks for. Called again, it submits what is
    missing: runs that are finished, wait or run are left out. The jobs run in the present working folder.

    Arguments:
        job_files: a job as for `load_job`, or a list of jobs with different names.
        set: as for `load_job`, for every job; {"sweep.seed": [0, 1, 2]} sweeps a field.
        out: the folder of the run files. Each has the name of its run.
        dry_run: only makes the texts; nothing is written or submitted, and no SLURM is needed.
        options: nodes, ranks (of a run, rank 0 included), gpus, ranks_per_gpu, threads, memory (of each node, "8G"), time (minutes, or
            "1:30:00"), partition, account, qos, array ("0-9%4"), restarts, launcher, modules, sbatch (any other options of sbatch),
            warning (seconds), venv, scratch. Defaults: those of `~/.config/fedsim/slurm.toml`, then those of `fedsim submit`.

    Returns:
        The Submission: `job_ids`, `run_files`, `texts`, and `skipped`, which says why runs were left out.

    Raises:
        BadInput: a job or an option is wrong, or its file holds another job, or SLURM refused everything. Nothing was submitted.
        RuntimeError: SLURM took some jobs and refused another. `submission` of the error has those that it took.

    >>> data = {"name": "fake", "image_size": 8, "channels": 1, "classes": 4, "train_images": 120, "test_images": 40}
    >>> small = {"rounds": 1, "data": data, "partition": {"clients": 4}, "model": {"width": 4}, "method": {"name": "fedavg"}}
    >>> submission = submit(small, set={"sweep.seed": [0, 1]}, out="submitted", ranks=2, time=30, dry_run=True)
    >>> [file.name for file in submission.run_files], "#SBATCH --array=0-1" in submission.texts[0]
    (['job-seed0.h5', 'job-seed1.h5'], True)
    """
    from fedsim.slurm import site, submission
    from fedsim.slurm.options import options_of

    settled = options_of(site.defaults(), options)
    return submission.submit([load_job(job, set) for job in _many(job_files, "fedsim.submit")], Path(out), settled, dry_run)


def estimate(job: Source, *, set: Mapping[str, Any] | None = None, progress: bool = True) -> list[dict[str, float]]:
    """Predicts what a job will cost. No client is trained, but the data set must be there.

    Arguments:
        job, set: as for `load_job`.
        progress: whether the table of `fedsim estimate` is printed.

    Returns:
        A dict for each round from round 0, with the columns of /rounds of a run file that need no training, all clients of the cohort
        together: bytes_up and bytes_down in bytes, train_flops and the server's server_flops in FLOP, max_client_memory in bytes of
        the largest client, density between 0 and 1. Where the prediction takes longer than 20 s, the list ends early: later rounds
        are like its last.

    Raises:
        BadInput: the job, or its data or model, cannot be used.

    >>> job = {"rounds": 2, "data": {"name": "fake", "train_images": 200, "test_images": 50}, "method": {"name": "fedavg"}}
    >>> rounds = estimate(job, set={"partition.clients": 4}, progress=False)
    >>> [row["bytes_up"] > 0 for row in rounds], rounds[2]["density"]
    ([False, True, True], 1.0)
    """
    loaded = load_job(job, set)
    with naming_job(_origin(job)):
        return estimation.estimate(loaded, output(quiet=not progress))


def open_run(path: JobPath) -> RunReader:
    """Opens a run file for reading, also while the run still goes on: each read sees the rounds that are complete by then.

    Arguments:
        path: the run file.

    Returns:
        Its reader: `column("accuracy")` is an array with a value for each round, NaN where it was not measured; `names()` lists the
        columns and `about("rounds", name)` their units.

    Raises:
        BadInput: there is no such file, it is no run file, or a newer fedsim wrote it.

    >>> open_run("nowhere.h5")
    Traceback (most recent call last):
    fedsim.errors.BadInput: there is no run file nowhere.h5
    """
    return RunReader(Path(path))


def export_module(path: JobPath, client: int | None = None) -> nn.Module:
    """The final network of a finished run as a plain torch module, which works without fedsim.

    Arguments:
        path: the run file. The data set of its job must be where the job says.
        client: the number of a client, for the smaller network of that client; only methods with gates give clients their own.

    Returns:
        The module in evaluation mode. Its input is (n, C, H, W) float32, normalised as in training; its output (n, classes) logits.
        Pruned weights are exactly 0; channels that were cut are not there.

    Raises:
        BadInput: there is no such run file, the run has not finished, or the client has no network of its own.

    >>> data = {"name": "fake", "image_size": 8, "channels": 1, "classes": 4, "train_images": 120, "test_images": 40}
    >>> small = {"rounds": 1, "data": data, "partition": {"clients": 4}, "model": {"width": 4}, "execution": {"plan": "reference"}}
    >>> finished = run(small | {"method": {"name": "fedavg"}}, out="exported.h5", progress=False)
    >>> export_module("exported.h5")(torch.zeros(5, 1, 8, 8)).shape
    torch.Size([5, 4])
    """
    return export.module_of(Path(path), client)


def _many(job_files: Source | Sequence[Source], function: str) -> list[Source]:
    many = [job_files] if isinstance(job_files, str | os.PathLike | Mapping | Job) else list(job_files)
    if not many:
        raise BadInput(f"{function} needs at least one job")
    return many


def _one_run(job: Source, set: Mapping[str, Any] | None, resume: str) -> Job:
    """The job, which makes one run."""
    if resume not in RESUME:
        raise BadInput(f"resume = {resume!r} is not known. There are: {', '.join(RESUME)}")
    loaded = load_job(job, set)
    if loaded.sweep:
        fixed = {field: values[0] for field, values in loaded.sweep.items()}
        more = f"fedsim.sweep does all, or fix each swept field, for example set={fixed}"
        raise BadInput(f"{_origin(job)}: [sweep] makes {len(jobs.runs(loaded))} runs and fedsim.run does one: {more}")
    return loaded


def _origin(job: Source) -> str:
    """How messages name the job: by its file, or by its name where it has no file."""
    if isinstance(job, Job):
        return job.name
    return "job" if isinstance(job, Mapping) else str(job)


def _table_of(job: Source) -> dict[str, Any]:
    """A table of the job that nobody else holds."""
    if isinstance(job, Job):
        return job.given
    if isinstance(job, Mapping):
        table: dict[str, Any] = _plain(job)
        return table
    if isinstance(job, str | os.PathLike):
        return job_file.table_of(Path(job))
    raise BadInput(f"a job is the path of a TOML file, a dict or a fedsim.Job, not {job!r}")


def _settings(set: Mapping[str, Any] | None) -> dict[str, Any]:
    if set is not None and not isinstance(set, Mapping):
        raise BadInput(f'set = {set!r}: should be a dict, for example {{"train.lr": 0.1}}')
    return {str(field).strip(): _plain(value) for field, value in (set or {}).items()}


def _plain(value: Any) -> Any:
    """A copy in the types of a TOML file; numbers and arrays of numpy and torch become Python's own."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return value.tolist() if hasattr(value, "tolist") else value


@contextmanager
def _threads_kept() -> Iterator[None]:
    """torch computes in as many threads afterwards as before."""
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
