"""A mix of devices: its kinds, and which of them each client is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from fedsim.devices import draws
from fedsim.devices.availability import Availability
from fedsim.devices.draws import Floats, Ints
from fedsim.devices.kind import DeviceKind
from fedsim.errors import BadInput

WHOLE = 1e-6  # by which shares may miss a sum of 1
SPREAD = ("flops", "down", "up")  # fields that vary between the clients of a kind
FIXED = ("overhead", "memory", "latency", "power", "power_radio", "power_idle", "fails")


@dataclass(frozen=True, eq=False)
class ClientDevices:
    """The devices of some clients: a number per client in each field, in the units of `DeviceKind`."""

    kind: Ints  # (K,) number of the kind
    flops: Floats
    down: Floats
    up: Floats
    overhead: Floats
    memory: Floats
    latency: Floats
    power: Floats
    power_radio: Floats
    power_idle: Floats
    fails: Floats

    def __len__(self) -> int:
        return len(self.kind)

    def take(self, rows: NDArray[np.int64] | NDArray[np.bool_]) -> ClientDevices:
        """Those of some rows."""
        return ClientDevices(**{name: values[rows] for name, values in vars(self).items()})


@dataclass(frozen=True, eq=False)
class DeviceMix:
    """Kinds of devices, and who has which: drawn by the shares, or fixed for each client.

    kinds: their shares sum to 1. rows: (N,) number of the kind of each client, where a file fixes it. own: a field -> (N,) values of each
    client, which take the place of the kind's; pool: a field -> (R,) values of recorded devices, of which each client has one by its key.
    registered: N, where a file has a row for each client. BadInput where the shares do not sum to 1.
    """

    name: str
    kinds: tuple[DeviceKind, ...]
    about: str = ""
    rows: Ints | None = None
    own: Mapping[str, Floats] = field(default_factory=dict)
    pool: Mapping[str, Floats] = field(default_factory=dict)
    registered: int | None = None
    traces: Mapping[str, Availability] = field(default_factory=dict)  # by the name of their file
    digests: Mapping[str, str] = field(default_factory=dict)  # SHA-256 of the files that say something of single devices

    def __post_init__(self) -> None:
        whole = sum(kind.share for kind in self.kinds)
        if self.rows is None and abs(whole - 1) > WHOLE:
            shares = ", ".join(f"{kind.name} {kind.share:g}" for kind in self.kinds)
            raise BadInput(f"{self.name}: the shares of its kinds sum to {whole:g} ({shares}); they must sum to 1")

    def check(self, clients: int) -> None:
        """BadInput where a file has rows for another number of clients than there are."""
        if self.registered not in (None, clients):
            raise BadInput(f"[devices] clients has {self.registered:,} clients, and the job has {clients:,}; each needs a row")

    @property
    def names(self) -> list[str]:
        """Of the kinds."""
        return [kind.name for kind in self.kinds]

    def number(self, name: str) -> int:
        """The number of a kind; BadInput lists the kinds."""
        if name not in self.names:
            raise BadInput(f"{self.name} has no kind {name!r}. There are: {', '.join(self.names)}")
        return self.names.index(name)

    def kind_of(self, seed: int, clients: Sequence[int] | Ints) -> Ints:
        """(K,) the kind of each client: a function of the seed and the client, or what the file fixes."""
        asked = np.asarray(clients, dtype=np.int64)
        if self.rows is not None:
            return self.rows[asked]
        bounds = np.cumsum([kind.share for kind in self.kinds])[:-1]
        return np.searchsorted(bounds, draws.uniform(seed, "kind", asked), side="right").astype(np.int64)

    def of(self, seed: int, clients: Sequence[int] | Ints) -> ClientDevices:
        """The devices of these clients, each with the deviation of its own."""
        asked = np.asarray(clients, dtype=np.int64)
        kind = self.kind_of(seed, asked)
        table = {name: np.array([getattr(each, name) for each in self.kinds], float) for name in (*SPREAD, *FIXED, "spread")}
        values = {name: table[name][kind] for name in FIXED}
        deviation = table["spread"][kind]
        for name in SPREAD:
            factor = np.exp(deviation * draws.normal(seed, name, asked)) if deviation.any() else 1.0
            values[name] = table[name][kind] * factor
        if self.pool:
            recorded = len(self.pool["flops"])
            row = np.minimum((draws.uniform(seed, "capacity", asked) * recorded).astype(np.int64), recorded - 1)
            values |= {name: each[row] for name, each in self.pool.items()}
        values |= {name: each[asked] for name, each in self.own.items()}
        return ClientDevices(kind=kind, **values)

    def available(self, seed: int, clients: Sequence[int] | Ints, r: int, seconds: float) -> NDArray[np.bool_]:
        """(K,) who of these clients can be asked in round `r`, `seconds` after the start by the virtual clock."""
        asked = np.asarray(clients, dtype=np.int64)
        kind, found = self.kind_of(seed, asked), np.ones(len(asked), dtype=bool)
        for number, each in enumerate(self.kinds):
            mine = kind == number
            if mine.any():
                found[mine] = self._availability(each).at(seed, asked[mine], r, seconds)
        return found

    def _availability(self, kind: DeviceKind) -> Availability:
        return self.traces[kind.available] if isinstance(kind.available, str) and kind.available in self.traces else kind.availability
