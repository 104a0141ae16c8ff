"""The job's [devices] section."""

from __future__ import annotations

from dataclasses import dataclass

from fedsim.devices.sparse_time import NAMES
from fedsim.errors import BadInput

UNFIT = ("skip", "error", "fit")


@dataclass(frozen=True)
class DeviceSettings:
    """The section [devices]: which devices the clients have. Without a name there are none, and no clock."""

    name: str = ""  # a mix that comes with fedsim (`fedsim devices` lists them), or a TOML or CSV file
    clients: str = ""  # a CSV with a row for each client: client,kind, or client and fields of a kind
    capacity: str = ""  # capacity rows of FedScale as CSV or JSON: computation in ms for an image, communication in kbit/s
    reference_flops: float = 0.0  # FLOPs of one forward pass of the model that capacity was measured on, for an image
    sparse: str = ""  # none | ideal | measured: how time falls with density, for all kinds; "": as each kind says
    unfit: str = "skip"  # skip | error | fit: clients whose memory is too small are left out, end the run, or halve their batch

    def __post_init__(self) -> None:
        if self.unfit not in UNFIT:
            raise BadInput(f"[devices] unfit = {self.unfit!r} is not known. There are: {', '.join(UNFIT)}")
        if self.sparse and self.sparse not in NAMES:
            raise BadInput(f"[devices] sparse = {self.sparse!r} is not known. There are: {', '.join(NAMES)}; a table stands in a mix")
        if given := next((field for field in ("clients", "capacity", "sparse") if getattr(self, field) and not self.name), ""):
            raise BadInput(f"[devices] {given} needs a name: the mix whose kinds these clients are")
        if bool(self.capacity) != (self.reference_flops > 0):
            raise BadInput("[devices] capacity and reference_flops (above 0) belong together; give both or none")
