"""The command line. Exit codes: 0 done, 1 error, 2 bad input (one message, no traceback), 3 stopped by a signal or a time limit.

A command imports what it needs when it runs, so that help texts and usage errors come at once.
"""

from __future__ import annotations

import shlex
import signal
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console

from fedsim.cli import batch, checked_model, data, devices, doctor, field_help, results, submission
from fedsim.cli.output import code_of_lost_output, print_what_can_be_printed
from fedsim.errors import BadInput, ClientFault, LonelyRanks, MethodFault, Stopped, naming_job
from fedsim.simulation.launchers import forking, ranks

if TYPE_CHECKING:
    from fedsim.config.job import Job


INTERRUPTED = 130  # the exit code that typer gives Ctrl-C
MESSAGE_PATIENCE = 10.0  # seconds that another rank waits for rank 0 to write the same message

FORMER_BENCHES = {"adjust": "mask-adjustment", "record": "recording", "round": "engine-overhead", "gates": "compaction"}
BENCHES = {
    "engine-overhead": "seconds of a round, over those of a bare PyTorch loop that does the same steps",
    "sparse": "sparse layers and whole training steps, over dense ones",
    "activations": "layers and training steps with activation pruning, over plain ones",
    "memory": "memory of one training step: dense, FedTiny and FedMef",
    "mask-adjustment": "seconds of a round of FedTiny that adjusts its masks, over one that does not",
    "extrusion": "how much loss FedMef's extrusion avoids when weights are pruned",
    "compaction": "half of the channels by compaction, over a hand-built network of these widths",
    "adp": "inference of networks with dynamic gates, over dense ones",
    "cuda": "CUDA graphs, over one kernel launch after the other",
    "ranks": "rounds per second of two client ranks, over those of one",
    "scale": "traffic and seconds by ranks and cohort, projected to 1,024 ranks",
    "start": "seconds to the first round on three ranks, CPU seconds of an estimate, memory of a client rank, over `import torch`",
    "population": "a million clients, over a thousand",
    "clock": "seconds of a round of a thousand clients with devices, over those without",
    "recording": "seconds of writing the run file and the checkpoint, over those of the round",
    "looking": "seconds and memory of the commands that read run files, on a large run and on many",
    "watching": "seconds of a round that is watched, over those of one that is not, and the part of a core that watching takes",
}
FILES = ("recording", "looking", "watching", "start")  # whose code is in fedsim/bench/files
BENCH_HELP = "\n\n".join(["Which measurement:", *(f"{name}: {what}" for name, what in BENCHES.items())])

app = typer.Typer(
    name="fedsim",
    help="Simulates federated network pruning: jobs in TOML, MPI ranks as federated devices, one HDF5 file per run.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
JobFile = Annotated[Path, typer.Argument(metavar="JOB.toml", help="The job file.")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Replace a value of the job file. Can be given several times."),
]


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"fedsim {version('fedsim')}")
        raise typer.Exit


@app.callback()
def fedsim(
    _: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")] = False,
) -> None:
    pass


@app.command()
def run(
    job: JobFile,
    settings: Settings = None,
    out: Annotated[
        Path | None, typer.Option(metavar="RUN.h5", help="The run file to write. Default: runs/NAME.h5, with the name of the job.")
    ] = None,
    resume: Annotated[
        Literal["auto", "never", "must"],
        typer.Option(
            help="auto: continue a stopped run of this job, or start one; never: refuse an existing run file; must: refuse a new one."
        ),
    ] = "auto",
    trace: Annotated[
        Path | None,
        typer.Option(metavar="FILE.json", help="Write what every rank did when, for ui.perfetto.dev or chrome://tracing."),
    ] = None,
    extend: Annotated[
        Path | None,
        typer.Option(metavar="FIRST.h5", help="A finished run of this job with fewer rounds, from which the new run file goes on."),
    ] = None,
) -> int:
    """Run a job, in one process or under `mpirun -n RANKS` (rank 0 is the server, the others train clients)."""
    ranks.refuse_lonely_tasks()
    loaded = _load(job, settings, forking.share)
    if loaded.sweep:
        fixes = f"fix each swept field, {_example_of_one_run(loaded)}"
        raise BadInput(
            f"{job}: [sweep] makes {_count(loaded)} runs and `fedsim run` does one: `fedsim sweep {shlex.quote(str(job))}` does all,"
            f" `fedsim submit` does them through SLURM, or {fixes}"
        )
    from fedsim.simulation import launch

    with naming_job(job):
        return launch.main(loaded, out or Path("runs") / loaded.file, resume, job, trace, extend)


@app.command()
def warm() -> int:
    """Compile all kernels for this processor ahead of the first run, as when the image of a cluster is made. It takes a minute or two."""
    from fedsim.simulation.planning.warm import warm

    return warm(Console(emoji=False))


@app.command()
def sweep(
    jobs: Annotated[
        list[Path], typer.Argument(metavar="JOB.toml...", help=r"Job files. The section \[sweep] of a job says which runs it makes.")
    ],
    settings: Settings = None,
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Folder of the run files. Each has the name of its run.")] = Path("runs"),
    processes: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="How many runs at the same time. Default: one for each core.")
    ] = None,
) -> int:
    """Do all runs of some jobs on this machine, one on each core, and compare them. Called again, it continues where it stopped."""
    loaded = [_load(job, settings) for job in jobs]
    from fedsim.simulation.sweep import sweep

    console = Console(emoji=False)
    code, files = sweep(loaded, out, processes, console)
    if code != 3 and files:
        try:
            text = results.compared(files)
        except BadInput as error:
            text = f"no table: {error}"
        console.print(f"\n{text}", highlight=False, markup=False, soft_wrap=True)
    return code


@app.command()
def estimate(job: JobFile, settings: Settings = None) -> None:
    """Check a job, and predict bytes, FLOPs and memory of a client and a round. No client is trained."""
    loaded = _load(job, settings)
    from fedsim.simulation.estimate import estimate

    with naming_job(job):
        estimate(loaded, Console(emoji=False))


@app.command()
def check(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=checked_model.MODEL)],
    settings: Settings = None,
    shape: Annotated[str | None, typer.Option(metavar="C,H,W", help=checked_model.SHAPE)] = None,
    classes: Annotated[int | None, typer.Option(min=2, metavar="N", help=checked_model.CLASSES)] = None,
) -> int:
    """Check whether fedsim can train a model. Each way to compute it is compared with the plain torch module."""
    if ":" in model and not Path(model).is_file():
        sizes = checked_model.sizes_of(model, shape or "3,32,32", settings)
        from fedsim.simulation.checking.command import check_factory

        return check_factory(model, sizes, classes or 10, Console(emoji=False))
    checked_model.refuse_for_jobs(model, shape, classes)
    loaded = _load(Path(model), settings)
    from fedsim.simulation.checking.command import check_job

    with naming_job(model):
        return check_job(loaded, Console(emoji=False))


@app.command("methods")
def list_methods(name: Annotated[str | None, typer.Argument(help='The name of a method, or "package.module:Class".')] = None) -> None:
    """List the methods; or show one with its paper, its parameters and their defaults."""
    from fedsim.cli import method_help

    method_help.show(name, Console(emoji=False))


results.add(app)
batch.add(app)
submission.add(app)
doctor.add(app)
data.add(app)
devices.add(app)
field_help.add(app)


@app.command()
def bench(
    name: Annotated[
        str,
        typer.Argument(help=BENCH_HELP),
    ] = "engine-overhead",
    job: Annotated[
        list[Path] | None, typer.Option("--job", metavar="JOB.toml", help="The job to measure. Can be given several times.")
    ] = None,
    settings: Settings = None,
) -> int | None:
    """Measure speed and memory, as ratios to a reference that is measured beside it."""
    if name not in BENCHES:
        hint = f" (it is called {FORMER_BENCHES[name]!r} now)" if name in FORMER_BENCHES else ""
        raise BadInput(f"fedsim bench {name}: there is no such measurement{hint}. There are: {', '.join(sorted(BENCHES))}")
    loaded = [_load(each, settings) for each in job or ()]
    package = "fedsim.bench.files" if name in FILES else "fedsim.bench"
    return import_module(f"{package}.{name.replace('-', '_')}").main(loaded, Console(emoji=False))


def _load(path: Path, settings: list[str] | None, before: Callable[[], None] = lambda: None) -> Job:
    """The job of a file. What is wrong with the path, the TOML or a --set is reported before anything heavy is imported.

    before: is called between the two.
    """
    from fedsim.config import job_file

    table = job_file.table_of(path, settings or ())
    before()
    from fedsim.config import job

    return job.check(table, str(path))


def _count(job: Job) -> int:
    from fedsim.config.job import runs

    return len(runs(job))


def _example_of_one_run(job: Job) -> str:
    return "for example " + " ".join(f"--set {key}={values[0]}" for key, values in job.sweep.items())


def _report_error(message: str) -> None:
    """Writes an error message. Most errors meet every rank: the others wait, so that rank 0 writes it alone and ends them."""
    if rank := ranks.rank():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # by which mpirun ends them
        time.sleep(MESSAGE_PATIENCE)
        message = f"[rank {rank}] {message}"
    sys.stderr.write(f"{message}\n")
    sys.stderr.flush()


def _usage(error: typer.TyperException) -> int:
    """Writes what is wrong with the command line, and the usage of the command; the exit code."""
    show = getattr(error, "show", None)
    if show is None or ranks.rank():
        _report_error(str(error))
    else:
        show()
    return 2


def _outcome() -> int:
    """Runs the command line and returns the exit code."""
    try:
        if (code := app(standalone_mode=False) or 0) == INTERRUPTED:
            raise KeyboardInterrupt
        return code
    except typer.TyperException as error:
        return _usage(error)
    except LonelyRanks as error:
        if not ranks.rank():
            _report_error(str(error))
        return 2
    except BadInput as error:
        _report_error(str(error))
        return 2
    except MethodFault as fault:
        _report_error(fault.full_message)
        return 1
    except ClientFault as error:
        _report_error(str(error))
        return 1
    except (Stopped, KeyboardInterrupt) as stop:
        _report_error(str(stop) or "stopped")
        return 3


def main() -> None:
    """The console script."""
    from fedsim.config.method_source import look_here_too

    print_what_can_be_printed()
    look_here_too()
    sys.exit(_outcome() or code_of_lost_output())


if __name__ == "__main__":
    main()
