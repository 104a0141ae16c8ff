"""`fedsim doctor`."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console


def add(app: typer.Typer) -> None:
    """Adds the command to the command line."""
    app.command()(doctor)


def doctor(
    run: Annotated[Path, typer.Argument(metavar="RUN.h5", help="The run file. The run may still be going on.")],
    mend: Annotated[
        bool, typer.Option("--mend", help="Mend what can be mended, on a copy. The file as it was stays as RUN.h5.before-mending.")
    ] = False,
) -> int:
    """Tell what is wrong with a run file, its checkpoints and what stands beside them, and mend it.

    Exit codes: 0 nothing is wrong, or all is mended; 1 damage remains; 2 there is no such file, or it is no run file.
    """
    from fedsim.storage.doctor.command import doctor

    since = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    return doctor(run, mend, Console(emoji=False), since, time.sleep)
