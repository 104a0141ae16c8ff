"""The commands that look at run files. Those that need the extra `analysis` import it when they run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from fedsim.cli import run_files
from fedsim.errors import BadInput

NETWORKS = ("torch", "onnx", "safetensors")  # forms of the network
TABLES = ("csv", "parquet", "netcdf")  # forms of the columns
TO = (
    "torch: the network as a plain torch module, which can be loaded without fedsim. onnx, safetensors: the network for other tools."
    " csv, parquet, netcdf: all columns of the run."
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

    show(run, Console())


def watch(
    run: Annotated[Path, typer.Argument(metavar="RUN.h5 | FOLDER", help="The run file, or the folder of the runs of a sweep or an array.")],
    every: Annotated[float, typer.Option(min=0.1, metavar="SECONDS", help="Seconds between two looks at the files.")] = 2.0,
    wait: Annotated[bool, typer.Option("--wait", help="Wait for runs that have not begun, or that were stopped.")] = False,
    runs: Annotated[int, typer.Option(min=0, metavar="N", help="How many runs the folder will have. watch waits for them.")] = 0,
) -> int:
    """Watch runs in the terminal while they go on. It ends when they end; Ctrl-C ends it and leaves them alone."""
    with _analysis("watch"):
        from fedsim_analysis.watch.command import watch

        return watch(run, every, Console(), wait, runs)


def compare(
    runs: RunFiles,
    csv: Annotated[bool, typer.Option("--csv", help="Print all figures unrounded, as comma-separated values.")] = False,
) -> None:
    """Compare run files: a row for each job, with the mean and the 95 % interval over its seeds.

    In --csv, accuracy_last_10 is the mean over the last 10 evaluations, without the one of the untrained model.
    """
    Console(soft_wrap=True).print(compared(_each(runs, "compare"), csv), highlight=False, markup=False)


def compared(runs: list[Path], csv: bool = False) -> str:
    """The text that `fedsim compare` prints."""
    with _analysis("compare"):
        from fedsim_analysis import compare
        from fedsim_analysis.comparison import tell

        table = compare(runs)
        return table.to_csv(index=False).rstrip() if csv else tell(table)


def report(
    runs: RunFiles,
    out: Annotated[Path, typer.Option(metavar="PAGE.html", help="The page to write. Its figures are written to PAGE_figures.")] = Path(
        "report.html"
    ),
) -> None:
    """Write a report of runs: one page with curves, tables and figures that needs no network, and each figure as SVG and PDF."""
    with _analysis("report"):
        from fedsim_analysis.report.command import write

        _print(write(_each(runs, "report"), out))


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

    return export(run, number, out, Console())


def _each(runs: list[Path], command: str) -> list[Path]:
    found = [file for run in runs for file in run_files.found(run)]
    if not found:
        raise BadInput(f"there are no run files; fedsim {command} takes RUN.h5 files, or folders with such files")
    return found


def _print(lines: list[str]) -> None:
    for line in lines:
        Console(soft_wrap=True).print(line, highlight=False, markup=False)


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
