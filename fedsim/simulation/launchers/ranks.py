"""How many processes a launcher started, and whether they know of each other. Imports nothing heavy: it is asked first of all."""

from __future__ import annotations

import os

from fedsim.errors import LonelyRanks

LAUNCHED = ("OMPI_COMM_WORLD_SIZE", "PMIX_RANK", "PMI_RANK", "PMI_SIZE", "MPI_LOCALNRANKS")  # a launcher of MPI ranks sets one of them
RANK = ("OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK", "SLURM_PROCID")  # where launchers write the rank of a process
SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MPI_LOCALNRANKS", "SLURM_STEP_NUM_TASKS")  # the first that is set counts


def launched() -> bool:
    """Whether a launcher of MPI ranks started this process."""
    return any(name in os.environ for name in LAUNCHED)


def rank() -> int:
    """The rank of this process, before MPI has started; 0 in a single process."""
    return next((int(os.environ[name]) for name in RANK if os.environ.get(name, "").isdigit()), 0)


def refuse_lonely_tasks() -> None:
    """LonelyRanks where `srun` started several tasks without telling them of each other.

    A batch script is alone, although SLURM_NTASKS says how many tasks its job has: only a step of `srun` sets SLURM_STEP_NUM_TASKS.
    """
    tasks = _number("SLURM_STEP_NUM_TASKS")
    if tasks > 1 and "SLURM_PROCID" in os.environ and not launched():
        raise LonelyRanks(
            f"srun started {tasks} processes that do not know of each other: each would do the whole run. Start"
            f" `mpirun -n {tasks} fedsim run …` inside the allocation, or `srun --mpi=pmix …` where `srun --mpi=pmix -n 2 true` works"
            " and the MPI of mpi4py takes SLURM's PMIx. For several runs of their own, call `srun -n 1 fedsim run …` for each"
        )


def refuse_lonely_ranks(found: int) -> None:
    """LonelyRanks where the launcher started several ranks and MPI found one: `found`."""
    started = next((count for name in SIZES if (count := _number(name))), 1)
    if found == 1 and started > 1:
        raise LonelyRanks(
            f"the launcher started {started} processes, but MPI sees each of them alone, and each would do the whole run: the launcher"
            " belongs to another MPI than mpi4py. Take the mpirun of the MPI that mpi4py was built with"
            " (`python -m mpi4py --mpi-lib-version` names it; the extra fedsim[mpi] brings its own mpirun beside python)"
        )


def _number(name: str) -> int:
    value = os.environ.get(name, "")
    return int(value) if value.isdigit() else 0
