"""`fedsim submit`: runs become jobs of SLURM, and `--status` tells what became of them."""

from __future__ import annotations

import shlex
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from fedsim_analysis.foreign_text import printable
from rich.console import Console

from fedsim.errors import BadInput

if TYPE_CHECKING:
    from fedsim.slurm.submission import Submission

UNKNOWN = {"ignore_unknown_options": True, "help_option_names": ["-h", "--help"]}  # they come among the job files, and are named there
FEW = 20  # runs that are left out, and get a line each
STATUS = "Tell what became of the runs that were submitted into this folder."
DRY = "Print the text that would be submitted; write and submit nothing."
WARNING = (
    "How long before the end of --time SLURM warns the run, which stops and is requeued. A pack of clients should take less. Default: 60."
)
VENV = "The virtual environment of the job. Default: the one of this command."
SCRATCH = "A folder on the disk of the node, such as '$TMPDIR', where files are written first: execution.scratch of the job."
RESUBMIT = (
    "With --status: submit again what failed, stopped or was lost, with the options of its last submission; options that are given now win."
)
ARRAY = "Which runs, counted from 0, and how many at the same time, in SLURM's words: 0-9%4. %4 alone: all runs, four at a time."


def add(app: typer.Typer) -> None:
    """Adds the command to the command line."""
    app.command(context_settings=UNKNOWN)(submit)


def submit(
    jobs: Annotated[
        list[str] | None,
        typer.Argument(metavar="JOB.toml...", help=r"Job files. Each run of the section \[sweep] becomes a task of an array."),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Replace a value of each job file. Can be given several times."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Folder of the run files. Each has the name of its run. Default: runs.")
    ] = None,
    nodes: Annotated[int | None, typer.Option(metavar="N", help="Nodes of a run. Default: 1.")] = None,
    ranks: Annotated[
        int | None,
        typer.Option(metavar="N", help="Ranks of a run; rank 0 serves, the others train. Default: 3, or one for each GPU and one more."),
    ] = None,
    gpus: Annotated[int | None, typer.Option(metavar="N", help="GPUs of a run, on all its nodes together. Default: 0.")] = None,
    ranks_per_gpu: Annotated[int | None, typer.Option(metavar="N", help="Ranks that share a GPU. Default: 1.")] = None,
    threads: Annotated[int | None, typer.Option(metavar="N", help="Threads of a rank. Default: execution.threads of the job.")] = None,
    memory: Annotated[str | None, typer.Option(metavar="SIZE", help="Memory of each node, such as 8G.")] = None,
    time: Annotated[
        str | None, typer.Option(metavar="T", help="Longest time, in minutes or as SLURM writes it: 90, 1:30:00, 2-12.")
    ] = None,
    partition: Annotated[str | None, typer.Option(metavar="P", help="Partition.")] = None,
    account: Annotated[str | None, typer.Option(metavar="A", help="Account.")] = None,
    qos: Annotated[str | None, typer.Option(metavar="Q", help="Quality of service.")] = None,
    array: Annotated[str | None, typer.Option(metavar="SPEC", help=ARRAY)] = None,
    restarts: Annotated[int | None, typer.Option(metavar="N", help="How often a run may be requeued. Default: 100.")] = None,
    launcher: Annotated[str | None, typer.Option(metavar="mpirun|srun|none", help="What starts the ranks; none: one process.")] = None,
    modules: Annotated[str | None, typer.Option(metavar='"…"', help="What `module load` loads in the job.")] = None,
    sbatch: Annotated[str | None, typer.Option(metavar='"…"', help="Any other options of sbatch, such as '--constraint=icelake'.")] = None,
    warning: Annotated[int | None, typer.Option(metavar="SECONDS", help=WARNING)] = None,
    venv: Annotated[str | None, typer.Option(metavar="FOLDER", help=VENV)] = None,
    scratch: Annotated[str | None, typer.Option(metavar="FOLDER", help=SCRATCH)] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help=DRY)] = False,
    status: Annotated[Path | None, typer.Option(metavar="FOLDER", help=STATUS)] = None,
    resubmit: Annotated[bool, typer.Option("--resubmit", help=RESUBMIT)] = False,
) -> int:
    """Submit the runs of some jobs to SLURM, and print the text that is submitted. A sweep becomes a job array.

    Defaults of a site stand in ~/.config/fedsim/slurm.toml, under the names of these options.

    Exit codes of --status: 0 all runs are done; 1 some failed or were lost; 2 some cannot be read; 3 some wait, run or were stopped.
    """
    given = {
        "nodes": nodes, "ranks": ranks, "gpus": gpus, "ranks_per_gpu": ranks_per_gpu, "threads": threads, "memory": memory, "time": time,
        "partition": partition, "account": account, "qos": qos, "array": array, "restarts": restarts, "launcher": launcher,
        "modules": modules, "sbatch": sbatch, "warning": warning, "venv": venv, "scratch": scratch,
    }  # fmt: skip
    given = {name: value for name, value in given.items() if value is not None}
    files = _files(jobs or [])
    if status is not None:
        _refuse_beside_status(files, settings, out, given, resubmit)
        return _status(status, given, resubmit, dry_run)
    if resubmit:
        raise BadInput("--resubmit goes with --status FOLDER")
    if not files:
        raise BadInput("fedsim submit takes JOB.toml files, or --status FOLDER")
    return _submit(files, settings or [], out or Path("runs"), given, dry_run)


def _files(words: list[str]) -> list[Path]:
    """The job files; BadInput for an option that there is not among them, with all that there are."""
    from fedsim.slurm.options import refuse_unknown

    if unknown := [word.partition("=")[0] for word in words if word.startswith("-") and word != "-"]:
        refuse_unknown({unknown[0]: None}, _called)
    return [Path(word) for word in words]


def _called(name: str) -> str:
    return name if name.startswith("-") else f"--{name.replace('_', '-')}"


def _refuse_beside_status(files: list[Path], settings: list[str] | None, out: Path | None, given: dict[str, Any], resubmit: bool) -> None:
    if files:
        raise BadInput(f"{files[0]}: --status FOLDER takes no job files; it knows which runs were submitted")
    if settings:
        raise BadInput("--set changes a job; --status FOLDER knows the jobs as they were submitted")
    if out is not None:
        raise BadInput(f"--out {out}: --status FOLDER names the folder itself")
    if given and not resubmit:
        raise BadInput(f"{_called(next(iter(given)))} is for a submission; --status FOLDER --resubmit submits again")


def _submit(files: list[Path], settings: list[str], out: Path, given: dict[str, Any], dry_run: bool) -> int:
    from fedsim.slurm import site
    from fedsim.slurm.options import options_of

    options = options_of(site.defaults(), given, called=_called)
    from fedsim.config import job_file

    tables = [(job_file.table_of(file, settings), str(file)) for file in files]
    from fedsim.config import job
    from fedsim.slurm.submission import PartlyRefused, submit

    loaded = [job.check(table, where) for table, where in tables]
    try:
        submission = submit(loaded, out, options, dry_run)
    except PartlyRefused as error:
        _tell(error.submission, dry_run)
        return _fault(error)
    _tell(submission, dry_run)
    return 0


def _status(folder: Path, given: dict[str, Any], resubmit: bool, dry_run: bool) -> int:
    from fedsim.slurm.status import status

    found = status(folder)
    if not (resubmit and dry_run):
        for line in found.lines():
            _print(line)
    if not resubmit:
        if found.again:
            _print(f"`fedsim submit --status {shlex.quote(str(folder))} --resubmit` submits {_runs(len(found.again))} again")
        return found.code
    return _resubmit(found, given, dry_run)


def _resubmit(found: Any, given: dict[str, Any], dry_run: bool) -> int:
    from fedsim.slurm import site
    from fedsim.slurm.resubmission import resubmit
    from fedsim.slurm.submission import PartlyRefused

    if not found.again and not found.silent:
        _note("nothing has failed, stopped or been lost: nothing is submitted again")
        return 0
    try:
        submission = resubmit(found, given, site.defaults(), dry_run)
    except PartlyRefused as error:
        _tell(error.submission, dry_run)
        return _fault(error)
    _tell(submission, dry_run)
    return 0


def _tell(submission: Submission, dry_run: bool) -> None:
    """Prints the texts, and then what became of them; of a dry run the texts alone go to the standard output."""
    if submission.texts:
        sys.stdout.write("\n".join(submission.texts))
        sys.stdout.flush()
    if len(submission.skipped) <= FEW:
        for name, why in submission.skipped.items():
            _note(f"{name} is left out: {why}")
    else:
        kinds = Counter(" ".join(why.split()[:2]) for why in submission.skipped.values())
        _note(f"{_runs(len(submission.skipped))} are left out: {', '.join(f'{count:,}: {kind}' for kind, count in kinds.items())}")
    for part in submission.parts:
        _note(f"{'would be submitted' if dry_run else f'job {part.job}'}: {_runs(len(part.runs))}, {part.path}")
    if submission.parts and not dry_run:
        _note(f"`fedsim submit --status {shlex.quote(str(submission.folder))}` tells how they fare")
    if not submission.parts:
        _note("nothing is left to submit")


def _runs(count: int) -> str:
    return f"{count:,} run{'s' * (count != 1)}"


def _fault(error: Exception) -> int:
    _note(str(error))
    return 1


def _note(line: str) -> None:
    sys.stderr.write(f"{printable(line, kept=chr(10))}\n")
    sys.stderr.flush()


def _print(line: str) -> None:
    Console(soft_wrap=True, emoji=False).print(line, highlight=False, markup=False)
