"""A kind of device, as a mix of devices names it: what it computes, holds, sends and draws from its battery."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from math import inf

from fedsim.devices.availability import DAY, Always, Availability, Chance, Diurnal
from fedsim.devices.sparse_time import SparseTime
from fedsim.errors import BadInput

POSITIVE = ("flops", "memory", "down", "up")
NOT_NEGATIVE = ("share", "overhead", "latency", "power", "power_radio", "power_idle", "spread")
DIURNAL = ("share", "period")


@dataclass(frozen=True)
class DeviceKind:
    """One kind of device. The fields are those of a mix file. BadInput names the field that cannot be.

    >>> phone = DeviceKind("phone", share=1.0, flops=1e10, memory=1e9, down=2e7, up=1e7)
    >>> phone.sparse_time.name
    'none'
    >>> DeviceKind("phone", share=1.0, flops=-1, memory=1e9, down=2e7, up=1e7)
    Traceback (most recent call last):
    fedsim.errors.BadInput: kind 'phone': flops = -1 must be above 0 (FLOP/s)
    """

    name: str
    share: float  # of the clients
    flops: float  # FLOP/s, sustained in dense float32 training of convolutions
    memory: float  # bytes that training may use
    down: float  # bit/s
    up: float  # bit/s
    overhead: float = 0.0  # seconds, fixed cost of a training step
    latency: float = 0.0  # seconds, before each transfer
    power: float = 0.0  # W while it computes
    power_radio: float = 0.0  # W while it sends or receives
    power_idle: float = 0.0  # W while it waits for the end of a round
    sparse: str | Mapping[str, float] = "none"  # none | ideal | measured | {"density" = share of the dense time}
    available: str | float | Mapping[str, float] = "always"  # always | probability per round | {share, period in seconds} | trace file
    fails: float = 0.0  # chance per round to leave in the middle of it
    spread: float = 0.0  # deviation of ln(flops), ln(down) and ln(up) between clients of the kind
    about: str = ""  # what it is, for people
    source: str = ""  # where its figures are from

    def __post_init__(self) -> None:
        where = f"kind {self.name!r}"
        for field in (*POSITIVE, *NOT_NEGATIVE):
            value = getattr(self, field)
            if not (0 < value < inf if field in POSITIVE else 0 <= value < inf):
                least = "above 0" if field in POSITIVE else "at least 0"
                raise BadInput(f"{where}: {field} = {value} must be {least} ({UNITS[field]})")
        if not 0 <= self.fails < 1:
            raise BadInput(f"{where}: fails = {self.fails} must be at least 0 and below 1 (chance per round)")
        try:
            self.sparse_time  # noqa: B018
            if not isinstance(self.available, str):
                self.availability  # noqa: B018
        except BadInput as error:
            raise BadInput(f"{where}: {error}") from None

    @property
    def sparse_time(self) -> SparseTime:
        """How its time falls with the density of a layer."""
        return SparseTime.of(self.sparse)

    @property
    def availability(self) -> Availability:
        """When its clients can be asked; a trace is read by `fedsim.devices.trace`."""
        if isinstance(self.available, Mapping):
            if unknown := sorted(self.available.keys() - set(DIURNAL)):
                raise BadInput(f"available has no field {unknown[0]!r}; a daily pattern has: {', '.join(DIURNAL)}")
            if "share" not in self.available:
                raise BadInput("available needs a share, such as {share = 0.4, period = 86400}")
            return Diurnal(self.available["share"], self.available.get("period", DAY))
        if isinstance(self.available, str):
            return Always()
        return Chance(self.available)


UNITS = {
    "share": "of the clients",
    "flops": "FLOP/s",
    "memory": "bytes",
    "down": "bit/s",
    "up": "bit/s",
    "overhead": "seconds per step",
    "latency": "seconds",
    "power": "W",
    "power_radio": "W",
    "power_idle": "W",
    "spread": "deviation of the logarithm",
}
FIELDS = tuple(field.name for field in fields(DeviceKind) if field.name != "name")
