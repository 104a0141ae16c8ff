"""One process of a node imports torch, and forks the other ranks from itself before MPI starts.

The first rank of a node listens (`first.py`). Each other rank hands over its variables and open files and stays as a stand-in
(`stand_in.py`): the launcher knows it alone, so it hands signals on and ends as the forked rank ends. Where one cannot take the place of
the other (`place.py`), a rank starts by itself.
"""

import os
import sys

from fedsim.simulation.launchers.forking import place

NEEDED = ("fedsim.simulation.launch",)


def begin() -> None:
    """Listens in the first rank of a node, and has it fork the others. Returns where a rank is to start, by itself or forked later."""
    if "OMPI_COMM_WORLD_LOCAL_SIZE" not in os.environ or place.ranks_here() < 2 or "mpi4py" in sys.modules:  # MPI may have started
        return
    if place.is_first():
        from fedsim.simulation.launchers.forking import first

        first.listen()
    else:
        from fedsim.simulation.launchers.forking import stand_in

        stand_in.stand_in()


def share() -> None:
    """In the first rank: imports what all ranks need and forks those that asked; it returns in each of them. Elsewhere it does nothing."""
    if first := sys.modules.get(f"{__name__}.first"):
        first.share(NEEDED)


def tell(code: object) -> None:
    """In a forked rank: tells its stand-in the exit code. Elsewhere it does nothing."""
    if first := sys.modules.get(f"{__name__}.first"):
        first.tell(code)
