"""The job's [devices] section."""

from __future__ import annotations

from dataclasses import dataclass

from fedsim.errors import BadInput

UNFIT = ("skip", "error", "fit")


@dataclass(frozen=True)
class DeviceSettings:
    """The section [devices]: which devices the clients have. Without a name there are none, and no clock."""

    name: str = ""  # a mix that comes with fedsim (`fedsim devices` lists them), or a TOML file
    clients: str = ""  # a CSV with a row for each client: client,kind, or client and fields of a kind
    capacity: str = ""  # capacity rows of FedScale as CSV or JSON: computation in ms for an image, communication in kbit/s
    reference_flops: float = 0.0  # FLOPs of one forward pass of the model that capacity was measured on, for an image
    unfit: str = "skip"  # skip | error | fit: clients whose memory is too small are left out, end the run, or halve their batch

    def __post_init__(self) -> None:
        if self.unfit not in UNFIT:
            raise BadInput(f"[devices] unfit = {self.unfit!r} is not known. There are: {', '.join(UNFIT)}")
        if (self.clients or self.capacity) and not self.name:
            given = "clients" if self.clients else "capacity"
            raise BadInput(f"[devices] {given} needs a name: the mix whose kinds these clients are")
        if bool(self.capacity) != (self.reference_flops > 0):
            raise BadInput("[devices] capacity and reference_flops (above 0) belong together; give both or none")
