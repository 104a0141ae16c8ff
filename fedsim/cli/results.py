"""The commands that look at run files. Those that need the extra `analysis` import it when they run."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from fedsim.cli import run_files
from fedsim.errors import BadInput

NETWORKS = ("torch", "onnx", "safetensors")  # forms of the network
TABLES = ("csv", "parquet", "netcdf", "mat")  # forms of the columns
TO = (
    "torch: the network as a plain torch module, which can be loaded without fedsim. onnx, safetensors: the network for other tools."
    " csv, parquet, netcdf, mat (for MATLAB and Octave): all columns of the run."
)

BUDGET = "Budget for accuracy at equal {}, such as {}. Default: what the cheapest row takes."

SORT = "Sort by this field of the job, or with - before it from the largest on (--sort=-density); given: as the files. Default: by all."
MEMORY = "Limit for accuracy at equal memory of a client, such as 500kB. Default: the smallest in which each method has a row that fits."
WHICH = (
    "overview; metrics: a table for each metric, with paired differences; equal: accuracy at equal bytes, FLOPs and memory, and with"
    " devices at equal time and energy; target: cost of a target accuracy; all. Can be given several times. Default: what the other"
    " options are about, or overview."
)

FIGURE = (
    "Write a leaderboard as a figure, .pdf, .svg or .png, and print no table: accuracy over density, FLOPs, bytes and memory, a line for"
    " each method. --metric chooses the accuracy: accuracy, accuracy_last_10, clients or lowest."
)

RunFile = Annotated[Path, typer.Argument(metavar="RUN.h5", help="The run file. The run may still be going on.")]
RunFiles = Annotated[list[Path], typer.Argument(metavar="RUN.h5...", help="Run files, or folders of run files.")]


def add(app: typer.Typer) -> None:
    """Adds the commands to the command line."""
    for command in (show, watch, compare, report, export):
        app.command()(command)


def show(run: RunFile) -> None:
    """Show a summary of a run file."""
    run_files.check(run)
    from fedsim.reporting.summary import show

    show(run, Console(emoji=False))


def watch(
    run: Annotated[Path, typer.Argument(metavar="RUN.h5 | FOLDER", help="The run file, or the folder of the runs of a sweep or an array.")],
    every: Annotated[
        float,
        typer.Option(
            min=0.1, metavar="SECONDS", help="Seconds between two looks; more where a look takes long, so that the runs lose less than 1 %."
        ),
    ] = 2.0,
    wait: Annotated[bool, typer.Option("--wait", help="Wait for runs that have not begun, or that were stopped.")] = False,
    runs: Annotated[int, typer.Option(min=0, metavar="N", help="How many runs the folder will have. watch waits for them.")] = 0,
) -> int:
    """Watch runs in the terminal while they go on. It ends when they end; Ctrl-C ends it and leaves them alone."""
    with _analysis("watch"):
        from fedsim_analysis.watch.command import watch

        return watch(run, every, Console(emoji=False), wait, runs)


def compare(
    runs: RunFiles,
    form: Annotated[str, typer.Option(metavar="FORM", help="terminal, markdown, latex (for the package booktabs) or csv.")] = "terminal",
    tables: Annotated[
        list[str] | None,
        typer.Option("--table", metavar="TABLE", help=WHICH),
    ] = None,
    metrics: Annotated[
        list[str] | None,
        typer.Option("--metric", metavar="NAME", help="A table of this metric: a name such as accuracy, or a column as train_loss:min."),
    ] = None,
    baseline: Annotated[
        str | None,
        typer.Option(metavar="FIELD=VALUE", help="The row that others are held against. Default: a dense method, or the first row."),
    ] = None,
    sort: Annotated[str | None, typer.Option(metavar="FIELD", help=SORT)] = None,
    score: Annotated[str, typer.Option(metavar="COLUMN", help="What counts as accuracy at equal cost and for the target.")] = "accuracy",
    target: Annotated[
        float | None, typer.Option(metavar="SHARE", help="Target accuracy. Default: 95 % of the best mean accuracy of the last model.")
    ] = None,
    at_bytes: Annotated[str | None, typer.Option(metavar="BYTES", help=BUDGET.format("bytes", "20MB"))] = None,
    at_flops: Annotated[str | None, typer.Option(metavar="FLOPS", help=BUDGET.format("FLOPs", "3TFLOP"))] = None,
    at_clock: Annotated[str | None, typer.Option(metavar="SECONDS", help=BUDGET.format("time of the devices", "600s"))] = None,
    at_energy: Annotated[str | None, typer.Option(metavar="JOULES", help=BUDGET.format("energy of the devices", "3kJ"))] = None,
    at_memory: Annotated[str | None, typer.Option(metavar="BYTES", help=MEMORY)] = None,
    figure: Annotated[Path | None, typer.Option(metavar="FILE", help=FIGURE)] = None,
    csv: Annotated[bool, typer.Option("--csv", help="Print the overview unrounded: --form csv --table overview.")] = False,
) -> None:
    """Compare run files. A row is a job, with the mean and the 95 % interval over its seeds. --table all has paired differences too.

    In --csv, accuracy_last_10 is the mean over the last 10 evaluations, without the one of the untrained model.
    """
    if figure is not None:
        others = {"--table": tables, "--baseline": baseline, "--sort": sort, "--target": target, "--at-bytes": at_bytes}
        others |= {"--at-clock": at_clock, "--at-energy": at_energy}
        others |= {"--at-flops": at_flops, "--at-memory": at_memory, "--csv": csv, "--form": form, "--score": score}
        _print(_leaderboard(runs, figure, metrics or ["accuracy"], others))
        return
    found = _each(runs, "compare")
    with _analysis("compare"):
        from fedsim_analysis.comparison import command

        given = {"bytes": at_bytes, "flops": at_flops, "clock": at_clock, "energy": at_energy, "memory": at_memory}
        budgets = {name: command.amount(text, f"--at-{name}") for name, text in given.items() if text is not None}
        meant = {"metrics": bool(metrics or baseline), "equal": bool(budgets), "target": target is not None}
        chosen = tables or [name for name, is_meant in meant.items() if is_meant] or ["overview"]
        text = command.text(
            found,
            "csv" if csv else form,
            tables=["overview"] if csv else command.TABLES if "all" in chosen else chosen,
            metrics=metrics,
            baseline=baseline,
            sort=sort,
            target=target,
            budgets=budgets,
            score=score,
            width=Console().width if sys.stdout.isatty() else None,
        )
    _print([text])


def _leaderboard(runs: list[Path], figure: Path, metrics: list[str], of_tables: Mapping[str, object]) -> list[str]:
    """Writes the figure, and returns what is said about it. of_tables: options that must be as they are by default."""
    default = {"--csv": False, "--form": "terminal", "--score": "accuracy"}
    if given := [name for name, value in of_tables.items() if value != default.get(name)]:
        raise BadInput(f"{given[0]} is for tables; --figure draws a leaderboard and prints none")
    if len(metrics) > 1:
        raise BadInput(f"--metric {metrics[1]}: a figure has one accuracy; give --metric once, and call fedsim compare for each figure")
    with _analysis("compare"):
        from fedsim_analysis.plots import leaderboards

        leaderboards.check_place(figure)
        return leaderboards.write(_each(runs, "compare"), figure, metrics[0])


def compared(runs: list[Path]) -> str:
    """The overview that `fedsim compare` begins with."""
    with _analysis("compare"):
        from fedsim_analysis.comparison import command

        return command.text(runs, tables=["overview"])


def report(
    runs: RunFiles,
    out: Annotated[Path, typer.Option(metavar="PAGE.html", help="The page to write. Its figures are written to PAGE_figures.")] = Path(
        "report.html"
    ),
) -> None:
    """Write a report of runs: one page with curves, tables and figures that needs no network, and each figure as SVG and PDF."""
    found = _each(runs, "report")
    with _analysis("report"):
        from fedsim_analysis.report.command import write

        _print(write(found, out))


def export(
    run: Annotated[Path, typer.Argument(metavar="RUN.h5", help="The run file; of a finished run for a network.")],
    to: Annotated[str, typer.Option(metavar="FORM", help=TO)] = "torch",
    client: Annotated[
        str | None,
        typer.Option(metavar="K", help="The client whose sub-network is written: its name in your own file, or its number if it has none."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The file or folder to write. Default: beside RUN.h5, with an ending for the form.")
    ] = None,
) -> None:
    """Write the final network of a run, the smaller one of one client, or all columns, in a form that other tools read."""
    if to not in NETWORKS + TABLES:
        raise BadInput(f"--to {to}: fedsim export writes {', '.join(NETWORKS + TABLES)}")
    run_files.check(run)
    if to in TABLES:
        if client is not None:
            raise BadInput(f"--client is for a network ({', '.join(NETWORKS)}); --to {to} writes the columns of all clients")
        with _analysis("export"):
            from fedsim_analysis.export.command import write

            return _print(write(run, to, out))
    number = None if client is None else run_files.client(run, client)
    from fedsim.simulation.export import export

    return export(run, number, out, Console(emoji=False), to)


def _each(runs: list[Path], command: str) -> list[Path]:
    found = {run: run_files.found(run) for run in runs}
    for run, files in found.items():
        if not files:
            raise BadInput(f"there is no run file in the folder {run}; fedsim {command} takes RUN.h5 files, or folders with such files")
    return [file for run in runs for file in found[run]]


def _print(lines: list[str]) -> None:
    for line in lines:
        Console(soft_wrap=True, emoji=False).print(line, highlight=False, markup=False)


@contextmanager
def _analysis(command: str) -> Iterator[None]:
    """Reports as BadInput what the analysis finds wrong with files and options, and that it is not installed."""
    try:
        yield
    except ImportError as error:
        raise BadInput(f"fedsim {command} needs the extra `analysis` ({error}); pip install 'fedsim[analysis]'") from error
    except OSError as error:
        raise BadInput(f"{error.filename}: {error.strerror}" if error.errno else str(error)) from error
    except (ValueError, KeyError) as error:
        raise BadInput(str(error)) from error
