"""The fleets by name, and the one place that makes a fleet."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from typing import TYPE_CHECKING

from fedsim.core.tree import Tree
from fedsim.fleet.accounting import CostAccount
from fedsim.fleet.cuda_graph.fleet import CudaGraphFleet
from fedsim.fleet.local_fleet import LocalFleet
from fedsim.fleet.messages import WorkerContext
from fedsim.fleet.packed import PackedFleet
from fedsim.fleet.plan import Plan
from fedsim.fleet.serial import SerialFleet

if TYPE_CHECKING:
    from fedsim.fleet.mpi.communicator import Communicator

FLEETS: dict[str, type[LocalFleet]] = {"serial": SerialFleet, "packed": PackedFleet, "cuda_graph": CudaGraphFleet}


def make_fleet(
    plan: Plan,
    context: WorkerContext,
    account: CostAccount,
    clock: Callable[[], float],
    kept: MutableMapping[int, Tree] | None = None,
    communicator: Communicator | None = None,
    cuda_aware_mpi: str = "auto",
) -> LocalFleet:
    """The plan's fleet in this process; with a communicator rank 0's side of it, and the other ranks are sent the plan.

    clock: seconds; kept: the clients' kept states where a run goes on; cuda_aware_mpi: auto | on | off. Applies the plan to the context.
    """
    context = plan.apply(context)
    if communicator is None:
        return FLEETS[plan.fleet](context, account, plan.packs, clock, kept)
    from fedsim.fleet.mpi.device_transfer import DeviceTransfer  # here, since one process needs no mpi4py
    from fedsim.fleet.mpi.fleet import MPIFleet

    communicator.send_order({"do": "plan", "plan": plan.text(), "cuda_aware_mpi": cuda_aware_mpi})
    communicator.transfer = DeviceTransfer.of(context.device, cuda_aware_mpi)
    return MPIFleet(context, account, plan.packs, communicator, kept)
