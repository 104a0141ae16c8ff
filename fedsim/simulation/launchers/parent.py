"""The process that launched this rank, as /proc tells, and whether it still lives."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from fedsim.simulation.launchers.ranks import here

OPEN_MPI = ("mpirun", "orterun", "prterun", "prte", "prted", "orted")
HYDRA = ("mpiexec.hydra", "mpiexec.gforker", "hydra_pmi_proxy", "hydra_bstrap_pr", "pmi_proxy")  # MPICH and Intel MPI; 15 signs of a name
LAUNCHERS = (*OPEN_MPI, *HYDRA, "mpiexec", "srun", "slurmstepd", "palsd")
SERVER = "PMIX_SERVER_URI"  # Open MPI sets several variables that begin so, with the address of the server in the launcher
LISTENS = "0A"  # the state of a socket in /proc/net/tcp


@dataclass(frozen=True)
class Launcher:
    """A process: number, name, and when it began, since the system uses numbers again."""

    process: int
    name: str
    began: str

    @property
    def path(self) -> Path | None:
        """Its program; None where the system does not tell."""
        try:
            return Path(f"/proc/{self.process}/exe").readlink()
        except OSError:
            return None

    def lives(self) -> bool:
        try:
            _, state, began = _stat(self.process)
        except OSError:
            return False
        return began == self.began and state not in "ZX"


def nearest(process: int) -> Launcher | None:
    """The nearest process from this one upwards that launches ranks: a wrapper may stand between. None where there is none."""
    return next(upwards(process), None)


def upwards(process: int) -> Iterator[Launcher]:
    """All processes from this one upwards that launch ranks, the nearest first."""
    while process:
        try:
            name = Path(f"/proc/{process}/comm").read_text().strip()
            above, _, began = _stat(process)
        except OSError:
            return
        if name in LAUNCHERS:
            yield Launcher(process, name, began)
        process = above


def variables_of(process: int) -> dict[str, str]:
    """The environment that a process was started with; empty where the system does not tell."""
    try:
        text = Path(f"/proc/{process}/environ").read_bytes().decode(errors="replace")
    except OSError:
        return {}
    return {name: value for name, _, value in (entry.partition("=") for entry in text.split("\0"))}


def lacks_ranks(launcher: Launcher) -> bool:
    """Whether fewer processes of the launcher live than it has started here. Open MPI ends the others by itself and is never asked."""
    if launcher.name not in (*HYDRA, "slurmstepd"):
        return False
    states = [state for entry in Path("/proc").glob("[0-9]*") for above, state in _parents(int(entry.name)) if above == launcher.process]
    return sum(state not in "ZX" for state in states) < here()


def _parents(process: int) -> Iterator[tuple[int, str]]:
    """The parent of a process, and its state; nothing of one that has ended."""
    with suppress(OSError):
        above, state, _ = _stat(process)
        yield above, state


def server_is_gone() -> bool:
    """Whether no process of this machine listens any more where the launcher's server did. False where that cannot be known."""
    endings = [value.rpartition(":")[2] for name, value in os.environ.items() if name.startswith(SERVER) and "tcp" in value]
    ports = {int(port) for port in endings if port.isdigit()}
    return bool(ports) and (listening := _listening()) is not None and not ports & listening


def is_stopped(process: int) -> bool:
    """Whether a signal holds the process."""
    try:
        return _stat(process)[1] in "Tt"
    except OSError:
        return False


def _stat(process: int) -> tuple[int, str, str]:
    """The parent of a process, its state, and when it began."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return int(fields[1]), fields[0], fields[19]


def _listening() -> set[int] | None:
    """The TCP ports on which a process of this machine listens; None where the system does not tell."""
    rows: list[list[str]] | None = None
    for table in ("tcp", "tcp6"):
        with suppress(OSError):
            rows = (rows or []) + [line.split() for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]]
    return None if rows is None else {int(row[1].rpartition(":")[2], 16) for row in rows if row[3] == LISTENS}
