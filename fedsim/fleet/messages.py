"""What passes inside a fleet: an order for the cohort, a pack of clients, and the answer of a pack."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from fedsim.core.exact_sum import OutOfRange, Sum, Unit
from fedsim.core.tree import Tree
from fedsim.errors import CannotWrite, ClientFault
from fedsim.federated.protocol import Work
from fedsim.fleet.batches import Ready
from fedsim.fleet.client_images import Population
from fedsim.nn.net import Net

NO_BYTES = -1  # of a client whose report is not charged
Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class WorkerContext:
    """Where work is done: the same on every rank, but for the rank."""

    net: Net
    population: Population
    seed: int
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    channels_last: bool = False
    rank: int = 0
    stopped: Callable[[], bool] = lambda: False  # asked between packs
    ready: Ready = field(default_factory=Ready, compare=False)


@dataclass(frozen=True)
class Call:
    """What a method asks of a fleet: a work for the sorted clients of a cohort."""

    work: Work
    clients: list[int]
    shared: Tree
    own: Tree  # (K, …)
    net: Net

    def of(self, clients: Sequence[int]) -> Call:
        """The same for some of its clients, sorted; without rows of their own it may be for others."""
        if not self.own:
            return replace(self, clients=list(clients))
        assert np.isin(clients, self.clients).all(), "clients have rows in this call alone"
        rows = torch.from_numpy(np.searchsorted(self.clients, clients))
        return replace(self, clients=list(clients), own={key: value[rows.to(value.device)] for key, value in self.own.items()})


@dataclass(frozen=True)
class WorkOrder:
    """One run of a work, the same for every pack of the cohort."""

    work: Work
    net: Net
    shared: Tree
    r: int
    n: int  # images of the cohort
    units: dict[str, Unit] = field(default_factory=dict, compare=False)  # of the sums, found when they are first asked for
    sums: Callable[[Tree, int, dict[str, Unit]], Sum] = field(default=Sum, compare=False)  # what totals are added in

    def sum(self) -> Sum:
        """An empty sum of this order."""
        return self.sums(self.shared, self.n, self.units)


@dataclass(frozen=True)
class Pack:
    """Clients that are worked on together on one rank, in the order of the sorted cohort."""

    clients: list[int]
    own: Tree  # (K, …)
    kept: Sequence[Tree | None]  # None: never visited
    calls: list[list[int]]  # of the work, then of each feed's split: earlier uses by each client in this round


@dataclass(frozen=True)
class Columns:
    """A number for each of many clients, as arrays."""

    clients: Ints  # (K,) sorted
    loss: Floats  # (K,)
    up: Ints  # (K,) bytes, or NO_BYTES

    @classmethod
    def of(cls, clients: Ints, loss: Floats, up: Ints) -> Columns:
        """Of clients in any order."""
        order = np.argsort(clients, kind="stable")
        return cls(clients[order], loss[order], up[order])

    def joined(self, other: Columns) -> Columns:
        """Of the clients of both."""
        return Columns.of(*(np.concatenate([getattr(each, name) for each in (self, other)]) for name in ("clients", "loss", "up")))

    def rows(self, column: NDArray[Any], clients: Ints) -> NDArray[Any]:
        """The column for some of the clients, sorted."""
        return column if len(clients) == len(column) else column[np.searchsorted(self.clients, clients)]


@dataclass
class PackResult:
    """What comes back of some packs."""

    total: Sum
    clients: list[int] = field(default_factory=list)  # who has answered
    each: dict[int, Tree] = field(default_factory=dict)  # by client, of those that report something for themselves
    keep: dict[int, Tree] = field(default_factory=dict)  # of those that keep something
    loss: dict[int, float] = field(default_factory=dict)  # mean over the client's steps
    ones: dict[int, dict[str, int]] = field(default_factory=dict)  # kept weights, where a client has masks of its own
    arrived: dict[int, dict[str, int]] = field(default_factory=dict)  # the same, when its work began
    open: dict[int, list[list[int]]] = field(default_factory=dict)  # channels of every group under hard gates, step after step
    up: dict[int, int] = field(default_factory=dict)  # bytes of the report
    columns: Columns | None = None  # losses and bytes of many clients, in place of those two

    def losses(self, clients: Ints) -> Floats:
        """(K,) of sorted clients, NaN where none is known."""
        if self.columns:
            return self.columns.rows(self.columns.loss, clients)
        return np.array([self.loss.get(client, np.nan) for client in clients.tolist()], np.float64)

    def sent_back(self, clients: Ints) -> Ints:
        """(K,) bytes of the report of each of some sorted clients, NO_BYTES where none is charged."""
        if self.columns:
            return self.columns.rows(self.columns.up, clients)
        return np.array([self.up.get(client, NO_BYTES) for client in clients.tolist()], np.int64)

    def merge(self, other: PackResult) -> None:
        self.total.merge(other.total)
        self.clients += other.clients
        if self.columns and other.columns:
            self.columns = self.columns.joined(other.columns)
        elif self.columns or other.columns:
            raise ValueError("an answer in columns and one by client cannot be merged")
        for name in ("each", "keep", "loss", "ones", "arrived", "open", "up"):
            getattr(self, name).update(getattr(other, name))


def merged(answer: PackResult, more: PackResult) -> PackResult:
    """Both in one."""
    answer.merge(more)
    return answer


def smaller_batches(work: Work, halvings: int) -> Work:
    """The work with the batches of all its feeds halved so often; at least one image stays."""
    if not halvings:
        return work
    feeds = tuple(replace(feed, batch=max(1, feed.batch >> halvings)) for feed in work.feeds)
    return cast(Work, replace(cast(Any, work), feeds=feeds))


@dataclass
class ErrorContext:
    """Where in a client's work we are, for the message of an error."""

    order: WorkOrder
    site: WorkerContext
    clients: Sequence[int]
    stage: str = "init_state"

    @contextmanager
    def reporting(self) -> Iterator[None]:
        """Raises any error inside as a ClientFault that names the rank, the clients, the round and the step."""
        try:
            yield
        except CannotWrite:  # what a client keeps cannot be read any more, which is no fault of its work
            raise
        except (Exception, SystemExit) as error:
            raise self._fault(error) from error

    def _fault(self, error: BaseException) -> ClientFault:
        who = self._who([error.client] if isinstance(error, OutOfRange) else self.clients)
        work = type(self.order.work).__name__
        reason = f"{type(error).__name__}: {error.what if isinstance(error, OutOfRange) else error}"
        if "vmap" in reason and "data-dependent" in reason:
            reason = f"a Work may not branch on a tensor's value (torch.where chooses); the packed fleet says {reason}"
        return ClientFault(f"[rank {self.site.rank}, {who}, round {self.order.r}, {work}.{self.stage}] {reason}")

    def _who(self, clients: Sequence[int]) -> str:
        """The clients by their numbers; those beyond the population stand for parts of the global test set."""
        first = self.site.population.clients
        if all(client >= first for client in clients):
            return f"the global test set, images of part{_several([client - first for client in clients])}"
        return f"client{_several(clients)}"


def _several(numbers: Sequence[int]) -> str:
    return f" {numbers[0]}" if len(numbers) == 1 else f"s {', '.join(map(str, numbers))}"
