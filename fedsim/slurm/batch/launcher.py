"""The command that starts the ranks of a run: mpirun, srun, or one process without a launcher."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fedsim.errors import BadInput

Launcher = Literal["mpirun", "srun", "none"]
FREE = {"PRTE_MCA_hwloc_default_binding_policy": "none", "OMPI_MCA_hwloc_base_binding_policy": "none"}  # Open MPI 5; up to 4
SESSIONS = ("PRTE_MCA_prte_tmpdir_base", "OMPI_MCA_orte_tmpdir_base")  # where Open MPI 5 keeps its session; up to 4
BLOCKING = ("env", "--block-signal=USR1")  # keeps a signal for a rank until its Python can hear it; coreutils 8.31 or later


@dataclass(frozen=True)
class Start:
    """What is started: the launcher, None where it is left to the number of ranks; the ranks; options for the launcher itself."""

    launcher: Launcher | None = None
    ranks: int | None = None
    options: Sequence[str] = ()

    def counted(self, environment: Mapping[str, str]) -> tuple[Launcher, int]:
        """The launcher and the number of ranks. BadInput where they do not fit together."""
        ranks = self.ranks or (1 if self.launcher == "none" else _tasks(environment))
        launcher = self.launcher or ("mpirun" if ranks > 1 else "none")
        if launcher == "none" and ranks > 1:
            raise BadInput(f"--launcher none starts one process, and --ranks {ranks} are {ranks}: say --launcher mpirun or srun")
        if stray := next((option for option in self.options[:1] if not option.startswith("-")), None):
            raise BadInput(f"fedsim batch takes one job file, and {stray!r} is too much; options of the launcher come after --")
        if launcher == "none" and self.options:
            raise BadInput(f"--launcher none has no launcher that would take {' '.join(self.options)}: say --launcher mpirun or srun")
        return launcher, ranks

    def command(self, job: Path, out: Path, environment: Mapping[str, str]) -> list[str]:
        """The whole command. BadInput where the launcher is not there."""
        launcher, ranks = self.counted(environment)
        return [*_launch(launcher, ranks, environment), *self.options, *_blocking(), *fedsim(), "run", str(job), "--out", str(out)]


def fedsim() -> list[str]:
    """The console script beside this Python: unlike `python -m` it does not look for modules in the working folder first."""
    script = Path(sys.executable).with_name("fedsim")
    return [str(script)] if script.exists() else [sys.executable, "-m", "fedsim"]


def environment_of_ranks(given: Mapping[str, str], note: Path) -> dict[str, str]:
    """The variables of the ranks; they write `note` when a signal or the time limit of the job stops them.

    On one node Open MPI keeps its session beside `note`: in a common folder it would not start beside the session of a killed launcher
    that had the same process number (`findings/openmpi_does_not_start_beside_what_a_killed_one_left.sh`).
    """
    more = {"FEDSIM_STOP_NOTE": str(note)}
    if not os.getuid():  # a container; Open MPI refuses root without these two
        more |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    defaults = {"OMP_NUM_THREADS": "1"}  # ranks, not threads, fill the cores
    if _cpus_of_a_task(given) > 1:  # Open MPI would bind a rank with all its threads to one core
        defaults |= FREE
    if given.get("SLURM_JOB_NUM_NODES", "1") == "1":
        defaults |= dict.fromkeys(SESSIONS, str(note.parent))
    return defaults | dict(given) | more


def _launch(launcher: Launcher, ranks: int, environment: Mapping[str, str]) -> list[str]:
    if launcher == "none":
        return []
    if launcher == "srun":
        if shutil.which("srun") is None:
            raise BadInput("--launcher srun: there is no srun on PATH; outside of SLURM say --launcher mpirun")
        # Of two --mpi the last counts, so that `-- --mpi=pmi2` replaces it. Without --kill-on-bad-exit ranks wait for one that was killed.
        # Since SLURM 22.05 srun does not take --cpus-per-task from its job.
        cpus = _cpus_of_a_task(environment)
        return ["srun", "--mpi=pmix", "--kill-on-bad-exit=1", "-n", str(ranks), *([f"--cpus-per-task={cpus}"] if cpus > 1 else [])]
    return [_mpirun(environment), "-n", str(ranks)]


def _mpirun(environment: Mapping[str, str]) -> str:
    """The mpirun that MPIRUN names, that of the extra fedsim[mpi] beside this Python, or that of the site on PATH, in this order."""
    beside = Path(sys.executable).with_name("mpirun")
    found = environment.get("MPIRUN") or (str(beside) if beside.exists() else "mpirun")
    if path := shutil.which(found):
        return path
    raise BadInput(
        f"there is no {found} to start several ranks with: load the MPI of the site (`module load openmpi`), install the extra fedsim[mpi],"
        " or set MPIRUN to the path of an mpirun; `--launcher srun` starts ranks without it"
    )


def _tasks(environment: Mapping[str, str]) -> int:
    """The tasks of the job, 1 outside of SLURM. BadInput for several nodes without a number of tasks."""
    if (tasks := environment.get("SLURM_NTASKS", "")).isdigit() and int(tasks):
        return int(tasks)
    nodes = environment.get("SLURM_JOB_NUM_NODES", "1")
    if nodes != "1":
        raise BadInput(f"this job has {nodes} nodes and does not say how many ranks: give --ranks, or #SBATCH --ntasks")
    return 1


def _cpus_of_a_task(environment: Mapping[str, str]) -> int:
    cpus = environment.get("SLURM_CPUS_PER_TASK", "")
    return int(cpus) if cpus.isdigit() else 1


def _blocking() -> tuple[str, ...]:
    """What keeps signals for a rank; nothing where `env` cannot: there a signal in its first moments ends the rank."""
    try:
        asked = subprocess.run([*BLOCKING, "true"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
    except OSError:
        return ()
    return () if asked.returncode else BLOCKING
