"""The command line. Exit codes: 0 done, 1 fault, 2 bad input (one message, no traceback), 3 stopped by a signal or a time limit.

Nothing heavy is imported before a command needs it, so that help and a mistyped option answer at once.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console

from fedsim.errors import BadInput, ClientFault, Stopped

if TYPE_CHECKING:
    from fedsim.config.job import Job


RANK = ("OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK", "SLURM_PROCID")  # what launchers call a process's number
INTERRUPTED = 130  # what typer makes of Ctrl-C
PATIENCE = 10.0  # seconds that another rank leaves to rank 0 to say the same thing first

FORMER_BENCHES = {"adjust": "mask-adjustment", "record": "recording", "round": "engine-overhead", "gates": "compaction"}
BENCHES = """engine-overhead: against a bare PyTorch loop; ranks: two client ranks against one; scale: traffic and
seconds by ranks and cohort, projected to 1,024 ranks; sparse: layers and steps on kept weights alone against dense ones;
compaction: half of the channels by compaction against a hand-built network of these widths; cuda: programs on a GPU against
the eager loop; mask-adjustment: a round of FedTiny that adjusts against one that does not; recording: the share of recording;
population: a million clients against a thousand."""

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
    list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Lay a value over the job file; may be given again.")
]


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fedsim {version('fedsim')}")
        raise typer.Exit


@app.callback()
def fedsim(
    _: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and end.")] = False,
) -> None:
    pass


@app.command()
def run(
    job: JobFile,
    settings: Settings = None,
    out: Annotated[Path | None, typer.Option(metavar="RUN.h5", help="The run file; runs/NAME.h5 when not given.")] = None,
    resume: Annotated[
        Literal["auto", "never", "must"],
        typer.Option(help="auto: go on where a run of this job stopped; never: refuse an existing run file; must: refuse a new one."),
    ] = "auto",
) -> int:
    """Run a job, alone or under `mpirun -n RANKS` (rank 0 serves, the others train)."""
    loaded = _load(job, settings)
    if loaded.sweep:
        fixes = f"fix each swept field, {_fixes(loaded)}"
        raise BadInput(f"{job}: [sweep] makes {_count(loaded)} runs and `fedsim run` does one: `fedsim sweep {job}` does all, or {fixes}")
    from fedsim.simulation import launch

    with _told_of(job):
        return launch.main(loaded, out or Path("runs") / f"{loaded.name}.h5", resume)


@app.command()
def sweep(
    jobs: Annotated[list[Path], typer.Argument(metavar="JOB.toml...", help="Job files; the section sweep of each makes its runs.")],
    settings: Settings = None,
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Where the run files go, each by the name of its run.")] = Path("runs"),
    processes: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Runs at a time; as many as cores may be used when not given.")
    ] = None,
) -> int:
    """Do all runs of jobs on this machine, one a core, and compare them; called again, it goes on where it stopped."""
    loaded = [_load(job, settings) for job in jobs]
    from fedsim.simulation.sweep import sweep

    console = Console()
    code, files = sweep(loaded, out, processes, console)
    if code != 3 and files:
        try:
            text = _compared(files)
        except BadInput as error:
            text = f"no table: {error}"
        console.print(f"\n{text}", highlight=False, markup=False, soft_wrap=True)
    return code


@app.command()
def estimate(job: JobFile, settings: Settings = None) -> None:
    """Check a job and predict bytes, FLOPs and memory per client and round, without training any client."""
    loaded = _load(job, settings)
    from fedsim.simulation.estimate import estimate

    with _told_of(job):
        estimate(loaded, Console())


@app.command("methods")
def list_methods(name: Annotated[str | None, typer.Argument(help='One of them, or "package.module:Class".')] = None) -> None:
    """List the methods, or one with its paper, parameters and defaults."""
    from fedsim.cli import method_help

    method_help.show(name, Console())


@app.command()
def show(run: Annotated[Path, typer.Argument(metavar="RUN.h5", help="The run file; it may still be growing.")]) -> None:
    """Summarise a run file."""
    from fedsim.reporting.summary import show

    show(run, Console())


@app.command()
def export(
    run: Annotated[Path, typer.Argument(metavar="RUN.h5", help="The file of a finished run.")],
    to: Annotated[str, typer.Option(metavar="FORM", help="torch: a plain torch module, which loads without fedsim.")] = "torch",
    client: Annotated[int | None, typer.Option(metavar="K", help="The sub-network of this client.")] = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="RUN.pt, or RUN.clientK.pt, when not given.")] = None,
) -> None:
    """Write the network that a run ended with, or one client's smaller one, as other tools read it."""
    from fedsim.simulation.export import FORMS, export

    if to not in FORMS:
        raise BadInput(f"--to {to}: fedsim export writes {', '.join(FORMS)}")
    export(run, client, out, Console())


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN.h5...", help="Run files, or folders of them.")],
    csv: Annotated[bool, typer.Option("--csv", help="All figures as they are, comma-separated.")] = False,
) -> None:
    """Compare run files: a row for each job, seeds as mean and 95 % interval.

    The figures are in --csv as they are; there accuracy_last_10 is the mean over the last 10 evaluations, the untrained model left out.
    """
    runs = [file for run in runs for file in (sorted(run.glob("*.h5")) if run.is_dir() else [run])]
    if missing := [str(run) for run in runs if not run.is_file()]:
        raise BadInput(f"there is no run file {missing[0]}")
    if not runs:
        raise BadInput("no run files in there; fedsim compare takes RUN.h5 files, or folders that hold some")
    Console(soft_wrap=True).print(_compared(runs, csv), highlight=False, markup=False)


def _compared(runs: list[Path], csv: bool = False) -> str:
    """The table of `fedsim compare`."""
    try:
        from fedsim_analysis import compare
        from fedsim_analysis.compare import tell
    except ImportError as error:
        raise BadInput(f"fedsim compare needs the extra `analysis` ({error}); pip install 'fedsim[analysis]'") from error
    try:
        table = compare(runs)
    except (OSError, ValueError, KeyError) as error:
        raise BadInput(str(error)) from error
    return table.to_csv(index=False).rstrip() if csv else tell(table)


@app.command()
def bench(
    name: Annotated[
        str,
        typer.Argument(help=BENCHES),
    ] = "engine-overhead",
    job: Annotated[list[Path] | None, typer.Option("--job", metavar="JOB.toml", help="A job to measure; may be given again.")] = None,
    settings: Settings = None,
) -> int | None:
    """Measure speed and memory, as ratios to a reference in the same run."""
    known = _benches()
    if name not in known:
        hint = f" It is called {FORMER_BENCHES[name]!r} now." if name in FORMER_BENCHES else ""
        raise BadInput(f"fedsim bench {name}: there is no such measurement.{hint} There are: {', '.join(known)}")
    return import_module(f"fedsim.bench.{name.replace('-', '_')}").main([_load(each, settings) for each in job or ()], Console())


def _load(path: Path, settings: list[str] | None) -> Job:
    from fedsim.config import job

    return job.load(path, settings or ())


@contextmanager
def _told_of(path: Path) -> Iterator[None]:
    """What data, model or run file refuse is told with the job's file before it, as the job's own faults are."""
    try:
        yield
    except BadInput as error:
        raise BadInput(f"{path}: {error}") from error


def _count(job: Job) -> int:
    from fedsim.config.job import runs

    return len(runs(job))


def _fixes(job: Job) -> str:
    return "for example " + " ".join(f"--set {key}={values[0]}" for key, values in job.sweep.items())


def _benches() -> list[str]:
    from pkgutil import iter_modules

    from fedsim import bench

    return sorted(module.name.replace("_", "-") for module in iter_modules(bench.__path__))


def _rank() -> int:
    """This process's number under a launcher, before MPI has started; 0 when alone."""
    return next((int(os.environ[name]) for name in RANK if os.environ.get(name, "").isdigit()), 0)


def _say(message: str) -> None:
    """Rank 0 speaks; another rank met the same fault, waits to be ended with rank 0, and speaks only if it was alone with it."""
    if rank := _rank():
        time.sleep(PATIENCE)
        message = f"[rank {rank}] {message}"
    sys.stderr.write(f"{message}\n")
    sys.stderr.flush()


def _usage(error: typer.TyperException) -> int:
    """A mistyped command line: what was wrong, and the usage of the command."""
    show = getattr(error, "show", None)
    if show is None or _rank():
        _say(str(error))
    else:
        show()
    return 2


def _outcome() -> int:
    """Runs the command line; the exit code."""
    try:
        if (code := app(standalone_mode=False) or 0) == INTERRUPTED:
            raise KeyboardInterrupt
        return code
    except typer.TyperException as error:
        return _usage(error)
    except BadInput as error:
        _say(str(error))
        return 2
    except ClientFault as error:
        _say(str(error))
        return 1
    except (Stopped, KeyboardInterrupt) as stop:
        _say(str(stop) or "stopped")
        return 3


def main() -> None:
    """The console script."""
    sys.path.append(str(Path.cwd()))  # a job may name a user's own method or model by "package.module:name"
    sys.exit(_outcome())


if __name__ == "__main__":
    main()
