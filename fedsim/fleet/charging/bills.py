"""The bills of a round. Clients that are charged alike share one, so that a cohort of many thousands costs rank 0 little."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from math import isnan

import numpy as np
from numpy.typing import NDArray

from fedsim.fleet.charging.pricing import ClientCosts, Ints, distinct

Floats = NDArray[np.float64]


class Bills(Mapping[int, ClientCosts]):
    """Client -> what it is charged, in the order of the clients. What is read of a client is a copy."""

    def __init__(self) -> None:
        self.clients: Ints = np.empty(0, np.int64)  # (K,) sorted
        self.loss: Floats = np.empty(0)  # (K,)
        self._kinds: list[ClientCosts] = []  # distinct bills, without the loss; some may have no client any more
        self._kind: Ints = np.empty(0, np.int64)  # (K,) the place of each client's bill among them

    def add(self, clients: Ints | Sequence[int], runs: Sequence[ClientCosts], run: Ints, down: Ints, up: Ints, loss: Floats | None) -> None:
        """Adds one run of a work: `runs[run[i]]` is what it costs clients[i], sorted, beside its bytes; loss: (K,) of a run that trains."""
        rows = self._rows(clients)
        first, kind = distinct(self._kind[rows], run, down, up)
        begin = len(self._kinds)
        for i in first.tolist():
            bill = replace(self._kinds[self._kind[rows[i]]])
            bill.bytes_down += int(down[i])
            bill.bytes_up += int(up[i])
            bill.add(runs[run[i]])
            self._kinds.append(bill)
        self._kind[rows] = begin + kind
        if loss is not None:
            self.loss[rows] = loss

    def apart(self, client: int) -> ClientCosts:
        """The bill of one client, which no other shares from now on, to be changed."""
        row = self._rows([client])[0]
        self._kinds.append(replace(self._kinds[self._kind[row]]))
        self._kind[row] = len(self._kinds) - 1
        return self._kinds[-1]

    def counted(self) -> list[tuple[ClientCosts, int]]:
        """Every distinct bill, without the loss, and how many clients have it."""
        counts = np.bincount(self._kind, minlength=len(self._kinds)).tolist()
        return [(bill, count) for bill, count in zip(self._kinds, counts, strict=True) if count]

    def total(self, name: str) -> int:
        """The sum of a figure over all clients."""
        return sum(getattr(bill, name) * count for bill, count in self.counted())

    def most(self, name: str) -> int:
        """The largest value of a figure; 0 where there is no client."""
        return max((getattr(bill, name) for bill, _ in self.counted()), default=0)

    def column(self, name: str) -> Floats:
        """(K,) a figure of every client."""
        if name == "loss":
            return self.loss
        return np.array([getattr(bill, name) for bill in self._kinds], float)[self._kind]

    def largest(self) -> ClientCosts:
        """The bill of the client that needs the most memory, the first of equals."""
        return self._kinds[self._kind[self.column("memory").argmax()]] if len(self) else ClientCosts()

    def __getitem__(self, client: int) -> ClientCosts:
        row = self._row(client)
        bill, loss = replace(self._kinds[self._kind[row]]), float(self.loss[row])
        return bill if isnan(loss) else replace(bill, loss=loss)

    def __iter__(self) -> Iterator[int]:
        return iter(self.clients.tolist())

    def __len__(self) -> int:
        return len(self.clients)

    def _row(self, client: int) -> int:
        row = int(self.clients.searchsorted(client))
        if row == len(self.clients) or self.clients[row] != client:
            raise KeyError(client)
        return row

    def _rows(self, clients: Ints | Sequence[int]) -> Ints:
        """(K,) the places of sorted clients; those without a bill get an empty one."""
        wanted = np.asarray(clients, np.int64)
        if len(wanted) == len(self.clients) and (wanted == self.clients).all():
            return np.arange(len(wanted))
        if len(new := np.setdiff1d(wanted, self.clients, assume_unique=True)):
            order = np.argsort(every := np.concatenate([self.clients, new]), kind="stable")
            self.clients = every[order]
            self.loss = np.concatenate([self.loss, np.full(len(new), np.nan)])[order]
            self._kind = np.concatenate([self._kind, np.full(len(new), len(self._kinds))])[order]
            self._kinds.append(ClientCosts())
        return self.clients.searchsorted(wanted)
