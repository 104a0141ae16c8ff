"""The MPI library that mpi4py has loaded: what it is, where it lies, and its start, which ends the process where it fails."""

from __future__ import annotations

import re
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

FILE = re.compile(r"libmpi(ch|_abi|_cray|_gnu\w*|_intel\w*)?\.so")
MAPS = Path("/proc/self/maps")
SUSPICION = "suspicious MPI execution environment"  # a warning of mpi4py on every rank; fedsim refuses such a run, or it is none


@dataclass(frozen=True)
class Library:
    """An MPI library."""

    vendor: str  # as mpi4py names it: "Open MPI", "MPICH", "Intel MPI" …
    version: tuple[int, ...]
    about: str = ""  # what it says of itself
    path: str = ""  # its file; empty where that cannot be known

    def __str__(self) -> str:
        return f"{self.vendor} {'.'.join(map(str, self.version))}"

    @property
    def place(self) -> str:
        """Its name, and where it lies."""
        return f"{self} ({self.path})" if self.path else str(self)


def load() -> Library:
    """Loads mpi4py and its library without starting MPI.

    ImportError where there is no mpi4py, RuntimeError where it finds no library.
    """
    import mpi4py

    mpi4py.rc.initialize, mpi4py.rc.finalize = False, True  # `start` does the first; the process does the second at its end
    with _unsuspicious():
        from mpi4py import MPI
    vendor, version = MPI.get_vendor()
    return Library(vendor, version, MPI.Get_library_version().rstrip("\0\n "), _path())


def start() -> None:
    """Starts MPI, unless somebody has."""
    from mpi4py import MPI

    if not MPI.Is_initialized():
        with _unsuspicious():
            MPI.Init_thread(MPI.THREAD_MULTIPLE)


@contextmanager
def _unsuspicious() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", SUSPICION, RuntimeWarning)
        yield


def _path() -> str:
    """The file that the loader took; empty where the system does not tell."""
    if not MAPS.exists():
        return ""
    names = (line.split(maxsplit=5)[-1] for line in MAPS.read_text().splitlines())
    return next((name for name in names if FILE.match(Path(name).name)), "")
