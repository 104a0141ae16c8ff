"""The process that launched this rank, as /proc tells, and whether it still lives."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

LAUNCHERS = ("mpirun", "mpiexec", "orterun", "prterun", "prte", "prted", "orted", "srun", "slurmstepd", "hydra_pmi_proxy")
SERVER = "PMIX_SERVER_URI"  # Open MPI sets several variables that begin so, with the address of the server in the launcher
LISTENS = "0A"  # the state of a socket in /proc/net/tcp


@dataclass(frozen=True)
class Launcher:
    """A process: number, name, and when it began, since the system uses numbers again."""

    process: int
    name: str
    began: str

    def lives(self) -> bool:
        try:
            _, state, began = _stat(self.process)
        except OSError:
            return False
        return began == self.began and state not in "ZX"


def nearest(process: int) -> Launcher | None:
    """The nearest process from this one upwards that launches ranks: a wrapper may stand between. None where there is none."""
    try:
        name = Path(f"/proc/{process}/comm").read_text().strip()
        above, _, began = _stat(process)
    except OSError:
        return None
    return Launcher(process, name, began) if name in LAUNCHERS else nearest(above)


def server_is_gone() -> bool:
    """Whether no process of this machine listens any more where the launcher's server did. False where that cannot be known."""
    endings = [value.rpartition(":")[2] for name, value in os.environ.items() if name.startswith(SERVER) and "tcp" in value]
    ports = {int(port) for port in endings if port.isdigit()}
    return bool(ports) and (listening := _listening()) is not None and not ports & listening


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
