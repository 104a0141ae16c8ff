"""Where ranks stand: two of one place differ in what their launcher gave each of them alone, so one may be forked from the other."""

from __future__ import annotations

import os
from pathlib import Path

from fedsim.simulation.launchers.parent import OPEN_MPI, nearest, variables_of
from fedsim.simulation.launchers.ranks import number

PER_RANK = ("OMPI_", "PMIX_", "PRTE_")  # how the variables begin that Open MPI sets for each rank
LINKS = ("exe", "root", "cwd")
TEXTS = ("cmdline", "cgroup", "limits", "personality", "oom_score_adj", "attr/current")
OF_STATUS = (
    *("Uid", "Gid", "Groups", "Umask", "NoNewPrivs", "Seccomp", "Mems_allowed_list"),
    *("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"),
)
LONGEST = 107  # bytes of the name of a socket
OF_STAT = {"launcher": 1, "session": 3, "priority": 15, "nice": 16, "policy": 38}  # fields after the name


def ranks_here() -> int:
    """How many ranks this launcher has on this machine, where one may be forked for another; 0 where none may.

    Only Open MPI is known to take a process that another one forked: it knows a rank by its variables. The launcher must be the parent:
    a debugger or profiler in between would see a stand-in.
    """
    launcher, parent = nearest(os.getppid()), os.getppid()
    usable = hasattr(os, "pidfd_open") and launcher is not None and launcher.process == parent and launcher.name in OPEN_MPI
    return number(os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE", "")) if usable and not _traced() else 0


def is_first() -> bool:
    """Whether this is the first rank of its node."""
    return os.environ.get("OMPI_COMM_WORLD_LOCAL_RANK") == "0"


def address() -> str:
    """Where the first rank of this node listens: a socket without a file, of this user, launcher and job."""
    launcher = nearest(os.getppid())
    mark = f"{launcher.process}-{launcher.began}" if launcher else ""
    return f"\0fedsim-{os.getuid()}-{mark}-{os.environ.get('PMIX_NAMESPACE', '')}"[:LONGEST]


def of(process: int) -> dict[str, object]:
    """What must be alike of two ranks. OSError where the process has ended or is another user's."""
    home = Path(f"/proc/{process}")
    found: dict[str, object] = {name: str((home / name).readlink()) for name in LINKS}
    found |= {f"namespace {each.name}": str(each.readlink()) for each in (home / "ns").iterdir()}
    found |= {name: _text(home / name) for name in TEXTS}
    status = dict(line.split(":\t", 1) for line in (home / "status").read_text().splitlines() if ":\t" in line)
    found |= {name: status.get(name) for name in OF_STATUS}
    fields = (home / "stat").read_text().rpartition(")")[2].split()
    found |= {name: fields[place] for name, place in OF_STAT.items()}
    found["processors"] = len(os.sched_getaffinity(process))  # which ones may differ
    found["memory policy"] = _memory_policy(home)
    found["variables"] = {name: value for name, value in variables_of(process).items() if not name.startswith(PER_RANK)}
    return found | {f"file {number}": _kind(home, number) for number in (1, 2)}


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:  # this kernel has no such file
        return ""


def _memory_policy(home: Path) -> str:
    """How memory is placed on the nodes of a machine (`numactl`)."""
    try:
        with (home / "numa_maps").open() as lines:
            return lines.readline().split()[1]
    except (OSError, IndexError):
        return ""


def _kind(home: Path, number: int) -> str:
    """A pipe, a terminal or a file: Python buffers its output accordingly."""
    try:
        name = str((home / "fd" / str(number)).readlink())
    except OSError:
        return "closed"
    return "terminal" if name.startswith(("/dev/pts/", "/dev/tty")) else name.partition(":")[0]


def _traced() -> bool:
    """Whether a debugger holds this process."""
    return "TracerPid:\t0\n" not in Path("/proc/self/status").read_text()
