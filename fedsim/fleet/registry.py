"""The fleets by name."""

from __future__ import annotations

from fedsim.fleet.cuda_graph.fleet import CudaGraphFleet
from fedsim.fleet.packed import PackedFleet
from fedsim.fleet.serial import SerialFleet

FLEETS = {"serial": SerialFleet, "packed": PackedFleet, "cuda_graph": CudaGraphFleet}
STACKED = ("packed", "cuda_graph")  # fleets that train the clients of a pack at once
