"""How many processes a launcher started, and which of them this is. Imports nothing heavy: it is asked first of all."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

from fedsim.errors import LonelyRanks

LAUNCHED = ("OMPI_COMM_WORLD_SIZE", "PMIX_RANK", "PMI_RANK", "PMI_SIZE", "MPI_LOCALNRANKS")  # a launcher of MPI ranks sets one of them
RANK = ("OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK", "SLURM_PROCID")  # where launchers write the rank of a process
SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MPI_LOCALNRANKS", "SLURM_STEP_NUM_TASKS")  # the first that is set counts

TASKS = re.compile(r"(\d+)(?:\(x(\d+)\))?")  # as SLURM counts the tasks of nodes: 3,2(x4)


def launched() -> bool:
    """Whether a launcher of MPI ranks started this process."""
    return any(name in os.environ for name in LAUNCHED)


def rank() -> int:
    """The rank of this process, before MPI has started; 0 in a single process."""
    return next((int(os.environ[name]) for name in RANK if os.environ.get(name, "").isdigit()), 0)


def started() -> int:
    """How many processes the launcher started, as it says; 1 where it says nothing."""
    return next((count for name in SIZES if (count := number(os.environ.get(name, "")))), 1)


def here() -> int:
    """How many of them it started on this machine, as it says; 0 where it says nothing."""
    tasks = [
        number(count) for count, times in TASKS.findall(os.environ.get("SLURM_STEP_TASKS_PER_NODE", "")) for _ in range(int(times or 1))
    ]
    node = number(os.environ.get("SLURM_NODEID", ""))
    return number(os.environ.get("MPI_LOCALNRANKS", "")) or (tasks[node] if node < len(tasks) else 0)


def refuse_lonely_tasks() -> None:
    """LonelyRanks where `srun` started several tasks without telling them of each other.

    A batch script is alone, although SLURM_NTASKS says how many tasks its job has: only a step of `srun` sets SLURM_STEP_NUM_TASKS.
    """
    tasks = number(os.environ.get("SLURM_STEP_NUM_TASKS", ""))
    if tasks > 1 and "SLURM_PROCID" in os.environ and not launched() and not in_terminal(os.environ):
        raise LonelyRanks(
            f"srun started {tasks} processes that do not know of each other: each would do the whole run. Start"
            f" `mpirun -n {tasks} fedsim run …` inside the allocation, or `srun --mpi=pmix …` where `srun --mpi=pmix -n 2 true` works"
            " and mpi4py takes an Open MPI, or `srun --mpi=pmi2 …` where it takes MPICH or Intel MPI. For several runs of their own,"
            " call `srun -n 1 fedsim run …` for each"
        )


def in_terminal(variables: Mapping[str, str]) -> bool:
    """Whether a process belongs to a shell of `srun --pty`: of several tasks the first alone has a terminal, and the user in it."""
    return "SLURM_PTY_PORT" in variables


def number(text: str) -> int:
    """The whole number that a variable holds; 0 where it holds none."""
    return int(text) if text.isdigit() else 0
