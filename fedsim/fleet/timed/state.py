"""What a checkpoint keeps of the virtual clock, and what one round leaves in the run file."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fedsim.core.tree import Tree
from fedsim.devices.draws import Floats

ANSWERED, LATE, FAILED, UNFIT, UNAVAILABLE = range(5)  # `status` of a client in a round
STATUS = ("answered", "late", "failed", "unfit", "unavailable")


@dataclass
class Flight:
    """A client that trains while others do, in the buffered mode."""

    client: int
    version: int  # of the server's model that it was sent
    begun: float  # seconds of the virtual clock
    ends: float
    fails: bool = False
    joules: float = 0.0
    halvings: int = 0  # of its batch
    down: int = 0  # bytes that it was sent
    up: int = 0  # bytes that it sends in the end; 0 where it fails
    flops: int = 0  # of training until its end
    extra_flops: int = 0
    memory: dict[str, int] = field(default_factory=dict)  # bytes, by term


@dataclass
class Version:
    """A model of the server that clients still train from."""

    work: Any
    shared: Tree


@dataclass
class ClockState:
    """The virtual clock between two rounds."""

    seconds: float = 0.0  # since the start
    flights: list[Flight] = field(default_factory=list)
    versions: dict[int, Version] = field(default_factory=dict)
    sends: int = 0  # how often models were sent in the buffered mode: the number of the next draw
    need: int = 0  # bytes: who has less was unfit for each exchange of the last round in which clients got rows of their own; 0: none

    def copy(self) -> ClockState:
        """What stands here now, whatever happens next. Trees are not changed in place."""
        return ClockState(self.seconds, list(self.flights), dict(self.versions), self.sends, self.need)


@dataclass
class RoundLog:
    """What happened to the clients of one round."""

    began: float = 0.0  # seconds of the virtual clock
    seconds: dict[int, float] = field(default_factory=dict)  # of each client, over all exchanges
    joules: dict[int, float] = field(default_factory=dict)
    status: dict[int, int] = field(default_factory=dict)  # in the last cohort that was asked
    earlier: dict[int, int] = field(default_factory=dict)  # in cohorts of this round before it, too few of which answered
    counts: Counter[int] = field(default_factory=Counter)  # of these
    batches: dict[int, int] = field(default_factory=dict)  # halvings of the batch, where the memory is too small for it
    staleness: list[int] = field(default_factory=list)  # of each answer in the buffered mode
    spans: dict[int, tuple[float, float]] = field(default_factory=dict)  # client -> seconds of the clock at which it began and ended

    def add(self, client: int, seconds: float, joules: float, status: int, begun: float) -> None:
        """One exchange of a client, begun at this second of the clock; its status is that of the last one."""
        self.seconds[client] = self.seconds.get(client, 0.0) + seconds
        self.joules[client] = self.joules.get(client, 0.0) + joules
        self.status[client] = status
        self.spans[client] = (self.spans.get(client, (begun, begun))[0], begun + seconds)

    def exchanged(self, clients: list[int], seconds: Floats, joules: Floats, status: np.ndarray, begun: float) -> None:
        """One exchange of several clients, `begun` for all at this second of the clock."""
        if not self.seconds.keys().isdisjoint(clients):  # an earlier exchange of the round
            for row in zip(clients, seconds.tolist(), joules.tolist(), status.tolist(), strict=True):
                self.add(*row, begun)
            return
        lasted = seconds.tolist()
        self.seconds.update(zip(clients, lasted, strict=True))
        self.joules.update(zip(clients, joules.tolist(), strict=True))
        self.status.update(zip(clients, status.tolist(), strict=True))
        self.spans.update((client, (begun, begun + each)) for client, each in zip(clients, lasted, strict=True))

    def again(self) -> None:
        """The round begins again with another cohort."""
        self.counts.update(self.status.values())
        self.earlier, self.status, self.staleness = {**self.earlier, **self.status}, {}, []

    def missed(self, clients: list[int], status: int) -> None:
        """Clients that were not asked, and why."""
        for client in clients:
            self.seconds.setdefault(client, 0.0)
            self.joules.setdefault(client, 0.0)
            self.status.setdefault(client, status)

    def count(self, status: int) -> int:
        """Clients with this status, over all cohorts of the round."""
        return self.counts[status] + sum(found == status for found in self.status.values())

    def gone(self) -> set[int]:
        """Clients of the last cohort that take no further part."""
        return {client for client, status in self.status.items() if status in (LATE, FAILED, UNFIT)}

    def values(self, now: float) -> dict[str, float]:
        """Columns of /rounds; `now`: seconds of the clock at the end of the round."""
        values: dict[str, float] = {"clock": now, "round_time": now - self.began, "energy": sum(self.joules.values())}
        names = {"late": LATE, "failed": FAILED, "unfit": UNFIT, "unavailable": UNAVAILABLE}
        values |= {name: self.count(status) for name, status in names.items()}
        return values | ({"staleness": float(np.mean(self.staleness))} if self.staleness else {})

    def columns(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Columns of /clients: (ids, values)."""
        ids = np.array(sorted({**self.earlier, **self.status}), dtype=np.int64)
        if not len(ids):
            return {}
        begun = [(client, self.spans[client]) for client in ids.tolist() if client in self.spans]
        found = {name: (ids, np.array([held[k] for k in ids.tolist()], float)) for name, held in self._held().items()}
        if begun:
            who, spans = np.array([client for client, _ in begun]), np.array([span for _, span in begun])
            found |= {"begun": (who, spans[:, 0] - self.began), "ended": (who, spans[:, 1] - self.began)}
        if self.batches:
            halved = np.array(sorted(self.batches), dtype=np.int64)
            found["batch_halvings"] = halved, np.array([self.batches[k] for k in halved.tolist()], float)
        return found

    def _held(self) -> dict[str, dict[int, float]]:
        return {"seconds": self.seconds, "joules": self.joules, "status": {k: float(v) for k, v in {**self.earlier, **self.status}.items()}}
