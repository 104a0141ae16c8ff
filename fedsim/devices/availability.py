"""When a client can be asked: always, with a chance in each round, at its hours of the day, or as a trace says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fedsim.devices import draws
from fedsim.devices.draws import Floats, Ints
from fedsim.errors import BadInput

DAY = 86_400.0  # seconds


class Availability(Protocol):
    """Who can be asked in a round."""

    def at(self, seed: int, clients: Ints, r: int, seconds: float) -> NDArray[np.bool_]:
        """(K,) for each client, in round `r`, `seconds` after the start by the virtual clock."""
        ...


@dataclass(frozen=True)
class Always:
    """Every client in every round."""

    def at(self, seed: int, clients: Ints, r: int, seconds: float) -> NDArray[np.bool_]:
        return np.ones(len(clients), dtype=bool)


@dataclass(frozen=True)
class Chance:
    """Each client with this probability in each round, independently."""

    probability: float  # in (0, 1]

    def __post_init__(self) -> None:
        if not 0 < self.probability <= 1:
            raise BadInput(f"available = {self.probability}: a probability per round is above 0 and at most 1")

    def at(self, seed: int, clients: Ints, r: int, seconds: float) -> NDArray[np.bool_]:
        return draws.uniform(seed, "available", clients, r) < self.probability


@dataclass(frozen=True)
class Diurnal:
    """Each client for a share of every period, which begins at a time of its own: (t / period + phase) mod 1 < share.

    >>> night = Diurnal(share=0.5, period=100.0)
    >>> clients = np.arange(4)
    >>> bool((night.at(0, clients, 1, 0.0) == ~night.at(0, clients, 1, 50.0)).all())  # half a period later the others
    True
    """

    share: float  # of the period, in (0, 1]
    period: float = DAY  # seconds of the virtual clock

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise BadInput(f"available has share = {self.share}: a share of the period is above 0 and at most 1")
        if not 0 < self.period < float("inf"):
            raise BadInput(f"available has period = {self.period}: a period is a number of seconds above 0")

    def at(self, seed: int, clients: Ints, r: int, seconds: float) -> NDArray[np.bool_]:
        phase = draws.uniform(seed, "phase", clients)
        return (seconds / self.period + phase) % 1.0 < self.share


@dataclass(frozen=True, eq=False)
class Trace:
    """Spans of time of recorded devices, one after the other for ever. Client k is as the device k modulo their number.

    `starts` are the beginnings of each device's spans in seconds, `ends` their ends, both rising; device d has the spans
    `first[d]` to `first[d + 1]`. The whole trace lasts `length` seconds.
    """

    first: Ints  # (D + 1,)
    starts: Floats  # (S,)
    ends: Floats  # (S,)
    length: float
    digest: str = ""  # SHA-256 of the file

    @property
    def devices(self) -> int:
        return len(self.first) - 1

    def at(self, seed: int, clients: Ints, r: int, seconds: float) -> NDArray[np.bool_]:
        now = seconds % self.length
        open_at = np.zeros(self.devices, dtype=bool)
        owner = np.repeat(np.arange(self.devices), np.diff(self.first))
        open_at[owner[(self.starts <= now) & (now < self.ends)]] = True
        return open_at[np.asarray(clients) % self.devices]
