"""The command that batch scripts end in. It imports nothing heavy before the ranks have been started."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

LIMIT = 100  # restarts

OUT = "The run file to write."
RANKS = "Ranks to start. Default: the tasks of the job (SLURM_NTASKS), or 1."
LAUNCHER = (
    "mpirun: that of the variable MPIRUN, beside this Python or on PATH. srun: `srun --mpi=pmix`. none: one process. Default: mpirun for"
    " several ranks, none for one."
)
RESTARTS = "How often SLURM may be asked to start this job again; 0: never."
OPTIONS = "Options of mpirun or srun, after --."


def add(app: typer.Typer) -> None:
    """Adds the command to the command line."""
    app.command()(batch)


def batch(
    job: Annotated[Path, typer.Argument(metavar="JOB.toml", help="The job file.")],
    out: Annotated[Path, typer.Option(metavar="RUN.h5", help=OUT)],
    options: Annotated[list[str] | None, typer.Argument(metavar="[-- LAUNCHER OPTIONS]", help=OPTIONS)] = None,
    ranks: Annotated[int | None, typer.Option(min=1, metavar="N", help=RANKS)] = None,
    launcher: Annotated[Literal["mpirun", "srun", "none"] | None, typer.Option(help=LAUNCHER)] = None,
    restarts: Annotated[int, typer.Option(min=0, metavar="N", help=RESTARTS)] = LIMIT,
) -> int:
    """What the scripts of `slurm/` and of `fedsim submit` end in: starts the ranks of a run inside an allocation.

    A signal that warns of the end (preemption, the time limit) stops the run after its running packs, and the job is requeued; it then goes
    on from its last complete round. Exit codes are those of `fedsim run`. Without SLURM it runs the ranks on this machine.
    """
    from fedsim.slurm.batch import command
    from fedsim.slurm.batch.launcher import Start

    return command.main(job, out, Start(launcher, ranks, tuple(options or ())), restarts)
