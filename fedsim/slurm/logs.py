"""The last line of a job's output that says something. The output is text of strangers: it is shown, never obeyed."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

from fedsim_analysis.foreign_text import printable

READ = 16_384  # bytes at the end of the file
LONGEST = 300  # letters
RULE = re.compile(r"-{20,}")  # Open MPI puts what it says between two of these
FRAME = re.compile(r"[\W_]*")  # lines that only separate
NOISE = re.compile(r"(slurmstepd|srun)\S*: |prterun|mpirun|mpiexec|=+ |YOUR APPLICATION TERMINATED|(\S+ )?(Killed|Terminated)$")


def last_line(path: Path) -> str:
    """Of what fedsim says, if there is some, otherwise of what SLURM or the launcher says; empty where there is nothing."""
    lines = [line.strip() for line in _end(path).splitlines()]
    said = next(_own(lines), "") or next((line for line in reversed(lines) if not FRAME.fullmatch(line)), "")
    return printable(said)[:LONGEST]


def _own(lines: Sequence[str]) -> Iterator[str]:
    """From the last to the first, without what the launcher and SLURM say."""
    inside = False
    for line in reversed(lines):
        if RULE.fullmatch(line):
            inside = not inside
        elif not (inside or FRAME.fullmatch(line) or NOISE.match(line)):
            yield line


def _end(path: Path) -> str:
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return ""
    try:
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode):
            return ""
        end = os.pread(handle, READ, max(found.st_size - READ, 0)).replace(b"\0", b"")  # Open MPI ends its messages with one
        return end.decode(errors="replace")
    finally:
        os.close(handle)
