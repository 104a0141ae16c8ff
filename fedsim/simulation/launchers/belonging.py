"""Whether the launcher of this process and the MPI library of mpi4py belong together. Where not, each rank would do the whole run.

A launcher offers its ranks PMI (MPICH, Intel MPI, `srun --mpi=pmi2`) or PMIx (Open MPI, `srun --mpi=pmix`), and a library takes one of
them or both. A library that is offered what it does not take starts alone or ends its process, so this is asked before MPI starts.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from fedsim.errors import BadInput, LonelyRanks
from fedsim.fleet.mpi.mpi_library import Library, load, start
from fedsim.simulation.launchers import watch
from fedsim.simulation.launchers.parent import HYDRA, OPEN_MPI, Launcher, upwards, variables_of
from fedsim.simulation.launchers.ranks import in_terminal, number, rank, started

PMI, PMIX = "PMI", "PMIx"
OFFERS = {PMIX: ("PMIX_NAMESPACE",), PMI: ("PMI_FD", "PMI_PORT", "PMI_RANK", "PMI_SIZE")}  # variables of a rank, any of them
STARTERS = ("mpirun", "mpiexec", "mpiexec.hydra", "orterun", "prterun")  # what a user calls; the others are their daemons
STEPS = ("srun", "slurmstepd")
LIBRARIES = ("libmpi.so.40", "libmpi.so.12", "libmpi.so")  # of Open MPI; of MPICH and Intel MPI; often a link or a text that names one
FOLDERS = ("lib", "lib64", "lib/release", "lib/x86_64-linux-gnu", "lib/aarch64-linux-gnu")


def started_library() -> Library:
    """The library of mpi4py, loaded and started. BadInput where there is none, LonelyRanks where it is not the launcher's."""
    refuse_many_launchers()
    try:
        library = load()
    except ImportError as error:
        raise BadInput(f"{_who()} started this process, but mpi4py is missing here ({error}); pip install 'fedsim[mpi]'") from error
    except RuntimeError as error:
        raise BadInput(_no_library(error)) from error
    refuse_foreign(library)
    with watch.expecting_no_end(ended_while_it_started(library)):
        start()
    return library


def _no_library(error: Exception) -> str:
    found = _libraries_of(next(upwards(os.getppid()), None))
    ways = f"set MPI4PY_LIBMPI={found[0]}" if found else "load the site's MPI (`module load …`), or set MPI4PY_LIBMPI to its libmpi.so"
    return f"mpi4py finds no MPI library ({' '.join(str(error).split())}); {ways}, or pip install 'fedsim[mpi]', which brings one"


def offered() -> set[str]:
    """By which protocols the launcher tells this process of the other ranks."""
    return {protocol for protocol, names in OFFERS.items() if any(name in os.environ for name in names)}


def taken(library: Library) -> set[str]:
    """The protocols by which the library can hear of other ranks, as far as is known; all, where it is not."""
    if library.vendor == "Open MPI":
        return {PMIX} if library.version >= (5,) else {PMI, PMIX}
    if library.vendor == "Intel MPI":
        chosen = os.environ.get("I_MPI_PMI", "") + os.environ.get("I_MPI_PMI_LIBRARY", "")
        return {PMI, PMIX} if "pmix" in chosen.lower() else {PMI}
    if library.vendor == "MPICH":
        return {PMI, PMIX} if "pmix" in library.about.lower() else {PMI}
    return {PMI, PMIX}


def refuse_foreign(library: Library) -> None:
    """LonelyRanks where the library cannot hear of the other ranks; also where its plugins would be those of another Open MPI."""
    prefix = os.environ.get("OPAL_PREFIX", "")
    of_another = library.vendor == "Open MPI" and prefix and library.path and not _inside(library.path, prefix)
    if of_another or (offered() and not offered() & taken(library)):
        raise LonelyRanks(
            f"{_who()} started {_processes()}, but mpi4py takes {library.place}, to which it does not belong. {_advice(library)}"
        )


def refuse_lonely_ranks(found: int, library: Library) -> None:
    """LonelyRanks where the launcher started several ranks and MPI found one: `found`."""
    if found == 1 and started() > 1:
        raise LonelyRanks(
            f"{_who()} started {_processes()}, but {library.place} sees each of them alone, and each would do the whole run."
            f" {_advice(library)}"
        )


def refuse_many_launchers() -> None:
    """LonelyRanks where `srun` started several launchers, each of which started ranks of its own."""
    starter = next((each for each in upwards(os.getppid()) if each.name in STARTERS), None)
    step = variables_of(starter.process) if starter else {}
    tasks = number(step.get("SLURM_STEP_NUM_TASKS", ""))
    if starter is None or tasks < 2 or in_terminal(step):
        return
    if step.get("SLURM_PROCID", "0") != "0":
        raise SystemExit(2)  # the first of the launchers has a rank 0 too, which says it
    raise LonelyRanks(
        f"srun started `{starter.name}` {tasks} times, and each of them would do the whole run: call {starter.name} once, inside the"
        " allocation and without srun; it reads the nodes from SLURM"
    )


def ended_while_it_started(library: Library) -> str:
    """The message about a rank whose process ended in the start of MPI."""
    return (
        f"rank {rank()} ended while {library.place} started; {_who()} had started {_processes()}. What MPI wrote above may say why."
        f" If the two do not belong together: {_advice(library)}"
    )


def _processes() -> str:
    return f"{started()} process{'es' * (started() > 1)}"


def _who() -> str:
    """The launcher in words: its path, or the call of srun."""
    launcher = next(iter(upwards(os.getppid())), None)
    if launcher is None:
        return "the launcher"
    if launcher.name in STEPS:
        return f"srun --mpi={os.environ.get('SLURM_MPI_TYPE', 'none')}"
    return str(_starter(launcher) or launcher.name)


def _starter(launcher: Launcher) -> Path | None:
    """The program that a user calls, in the folder of the launcher."""
    folder = launcher.path.parent if launcher.path else None
    return next((folder / name for name in ("mpirun", "mpiexec") if folder and (folder / name).exists()), None)


def _advice(library: Library) -> str:
    """What to do, with the paths that are there."""
    launcher = next(iter(upwards(os.getppid())), None)
    if launcher and launcher.name in STEPS:
        flag = "pmix" if library.vendor == "Open MPI" else "pmi2"
        other = "pmi2` with MPICH or Intel MPI" if flag == "pmix" else "pmix` with an Open MPI"
        return (
            f"Start `mpirun -n {started()} fedsim run …` of this library inside the allocation, or `srun --mpi={flag} …` where"
            f" `srun --mpi={flag} -n 2 true` works, or `srun --mpi={other} that the variable MPI4PY_LIBMPI names"
        )
    own, others = _own_starter(library), _libraries_of(launcher)
    start_other = f"start with {own}" if own else "start with the mpirun or mpiexec of the MPI that mpi4py takes"
    take_other = f"set MPI4PY_LIBMPI={others[0]}" if others else "name the libmpi of the launcher in the variable MPI4PY_LIBMPI"
    return f"Either {start_other}, or {take_other}, and mpi4py takes the library of this launcher"


def _own_starter(library: Library) -> Path | None:
    """The launcher that lies beside the library."""
    if not library.path:
        return None
    above = Path(library.path).resolve().parents
    return _first(folder / "bin" / name for folder in above[1:4] for name in ("mpirun", "mpiexec"))


def _libraries_of(launcher: Launcher | None) -> list[Path]:
    """The libraries beside the launcher."""
    if launcher is None or launcher.path is None:
        return []
    root, foreign = launcher.path.parents[1], {OPEN_MPI: "libmpi.so.12", HYDRA: "libmpi.so.40"}
    names = [name for name in LIBRARIES if not any(launcher.name in kind and name == other for kind, other in foreign.items())]
    return [path for folder in FOLDERS for name in names if (path := root / folder / name).exists()]


def _first(paths: Iterable[Path]) -> Path | None:
    return next((path for path in paths if path.exists()), None)


def _inside(path: str, folder: str) -> bool:
    return Path(folder).resolve() in Path(path).resolve().parents
