"""How the server deals with devices that are slow, small or away: the fields of [cohort] and [devices] that a clock reads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil, inf

from fedsim.core.types import Feed
from fedsim.devices.draws import Ints
from fedsim.devices.mix import ClientDevices, DeviceMix

# (clients that can be asked, how many are wanted, the round, their devices) -> the wanted ones
Select = Callable[[Ints, int, int, ClientDevices], object]


@dataclass(frozen=True)
class Rules:
    """The server's ways, as the job says."""

    mix: DeviceMix
    seed: int
    mode: str = "sync"  # sync | deadline | oversample | buffered
    deadline: float = inf  # seconds that the server waits for answers, in each exchange of a round
    least: int = 1  # answers; a round with fewer is repeated
    extra: float = 0.0  # share of clients that are asked beyond the cohort
    select: str = "uniform"  # uniform | available | fastest | fits | own
    own_select: Select | None = None
    unfit: str = "skip"  # skip | error | fit
    concurrency: int = 0  # clients that train at any time
    buffer: int = 0  # answers of one server step
    max_staleness: int = 0  # server steps
    local: Feed = Feed("train", epochs=1)  # noqa: RUF009 -- of local training; frozen
    flops: int = 0  # of training the dense model on one image
    size: int = 0  # bytes of the dense model

    def asked(self, k: int) -> int:
        """How many are asked for a cohort of `k`."""
        return ceil(k * (1 + self.extra) - 1e-9)
