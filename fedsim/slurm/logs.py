"""The last line of a job's output that says something. The output is text of strangers: it is shown, never obeyed."""

from __future__ import annotations

import os
import re
from pathlib import Path

from fedsim_analysis.foreign_text import printable

READ = 16_384  # bytes at the end of the file
LONGEST = 300  # letters
FRAME = re.compile(r"[\W_]*")  # lines that only separate
NOISE = re.compile(
    r"slurmstepd: |srun: |prterun|mpirun|mpiexec|\* +\w|=+ |this process did not|exiting improperly|Killed$|Terminated$", re.I
)


def last_line(path: Path) -> str:
    """Of what fedsim says, if there is some, otherwise of what SLURM or the launcher says; empty where there is nothing."""
    lines = [line.strip() for line in _end(path).splitlines() if not FRAME.fullmatch(line.strip())]
    said = [line for line in lines if not NOISE.match(line)] or lines
    return printable(said[-1])[:LONGEST] if said else ""


def _end(path: Path) -> str:
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return ""
    with os.fdopen(handle, "rb") as file:
        if not path.is_file():
            return ""
        file.seek(max(os.fstat(handle).st_size - READ, 0))
        return file.read(READ).decode(errors="replace")
