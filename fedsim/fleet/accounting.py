"""What the clients of a round are charged: FLOPs, bytes up and down, memory. Rank 0 keeps it, from plain numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from zlib import crc32

import numpy as np
from torch import Tensor

from fedsim.core import keys
from fedsim.core.keys import SCAFFOLD_CONTROL
from fedsim.core.tree import Tree, under
from fedsim.core.types import Feed
from fedsim.costs import communication, profile
from fedsim.fleet.charging.bills import Bills
from fedsim.fleet.charging.pricing import ClientCosts, Ints, WorkPrices
from fedsim.fleet.client_images import Population, counts_of
from fedsim.fleet.messages import NO_BYTES, PackResult, WorkOrder
from fedsim.fleet.received_masks import ReceivedMasks

__all__ = ["Charged", "ClientCosts", "CostAccount"]


NOBODY: Ints = np.empty(0, np.int64)
Sent = tuple[Tensor, Tensor | None, Ints]  # a tensor of the round in progress, its mask, and who has it


@dataclass(frozen=True)
class Charged:
    """What a run of a work costs its clients, without what travels."""

    runs: list[ClientCosts]  # that differ
    run: Ints  # (K,) which of them each client is charged

    def each(self) -> list[ClientCosts]:
        """(K,) of every client; clients alike share one object: it is to be read, and added to others."""
        return [self.runs[i] for i in self.run.tolist()]


class CostAccount:
    """The bills of the round in progress."""

    def __init__(self, model_profile: profile.ModelProfile, population: Population, local: Feed, slots: int, pack: int = 1) -> None:
        self.model_profile, self.population = model_profile, population
        self.prices = WorkPrices(model_profile, population, local, slots, pack)
        self.deployed = 0  # FLOPs of this round that belong to no training: what clients do to get the model that they use
        self.bills = Bills()
        self.received = ReceivedMasks()
        self._sent: dict[str, list[Sent]] = {}  # by key
        self._own: dict[int, dict[str, int]] = {}  # client -> key -> checksum of what it was sent for itself in this round

    @property
    def executed(self) -> int:
        """Bytes, the most that a rank holds in a step of this round."""
        return self.bills.most("executed")

    def open(self) -> None:
        self.bills = Bills()
        self.deployed = 0
        self._sent = {}
        self._own = {}

    def charge(
        self,
        order: WorkOrder,
        clients: Sequence[int],
        sent: Tree,
        answer: PackResult,
        down: np.ndarray | None = None,
        foreseen: Mapping[int, tuple[ClientCosts, int]] | None = None,
    ) -> Charged:
        """Adds one run of a work to the bills, and returns what it costs each client; one that deploys a model counts by itself.

        down: (K,) bytes that each client was sent for it, where `deliver` was asked before. foreseen: costs of each client and the bytes
        that it sends, where these were found before it trained; they hold where training has changed neither.
        """
        if order.work.deployment_only:
            used = [order.net.used(order.shared)]
            for feed in order.work.feeds:
                counts, times = np.unique(counts_of(self.population, feed, clients), return_counts=True)
                each = zip(counts.tolist(), times.tolist(), strict=True)
                self.deployed += sum(self.prices.flops_of(feed, count, used) * many for count, many in each)
            return Charged([ClientCosts()], np.zeros(len(clients), np.int64))
        ids = np.asarray(clients, np.int64)
        if down is None:
            down = self.deliver(order, ids, sent, answer.arrived)
        up = answer.sent_back(ids)
        if (up == NO_BYTES).any():
            raise ValueError(f"the report of client {ids[up == NO_BYTES][0]} has no price: a fleet notes it by charge_report")
        same = foreseen and [foreseen[client][1] for client in clients] == up.tolist() and not (answer.ones or answer.open)
        if foreseen and same:
            runs, run = _shared([foreseen[client][0] for client in clients])
        else:
            runs, run = self.prices.distinct(order, ids, answer)
        trains = any(feed.cost == "train" for feed in order.work.feeds)
        self.bills.add(ids, runs, run, down, up, answer.losses(ids) if trains else None)
        return Charged(runs, run)

    def deliver(self, order: WorkOrder, clients: Ints | Sequence[int], sent: Tree, arrived: dict[int, dict[str, int]]) -> np.ndarray:
        """(K,) bytes that reach each client, which holds them from now on; `arrived` counts the masks it has for itself."""
        ids = np.asarray(clients, np.int64)
        down = self._down(order.shared, ids, arrived)
        if sent:
            rows = [{key: value[i] for key, value in sent.items()} for i in range(len(ids))]
            down += np.array([self._down_own(client, row, order.shared) for client, row in zip(ids.tolist(), rows, strict=True)], np.int64)
        return down

    def _down(self, shared: Tree, clients: Ints, arrived: dict[int, dict[str, int]]) -> np.ndarray:
        """(K,) bytes of the broadcast that each client does not hold yet; `arrived` counts the masks it has for itself."""
        sizes = np.zeros(len(clients), dtype=np.int64)
        held, reached = under(shared, keys.MASKS), _Reached(clients)
        for head in communication.heads({key: value for key, value in shared.items() if key not in held}, held):
            mask = keys.mask_of(head.key)
            new = reached.of(self._sent.setdefault(head.key, []), shared[head.key], shared.get(mask))
            if arrived and head.key.startswith((keys.WEIGHTS, keys.OPTIMISER, keys.BUFFERS)):
                sizes += new * np.array([_own_price(arrived.get(client, {}), mask, head.size) for client in clients.tolist()])
            else:
                sizes += new * head.size
        if held:
            self.received.version(held)
            controls = bool(under(shared, SCAFFOLD_CONTROL))
            sizes += self.received.prices(clients, controls)
        return sizes

    def _down_own(self, client: int, row: Tree, shared: Tree) -> int:
        """Bytes of what is sent to this client alone, but for what it received in this round already, and masks it has had before."""
        if not row:
            return 0
        marks = {key: crc32(value.cpu().contiguous().numpy().tobytes()) for key, value in row.items()}
        had = self._own.setdefault(client, {}) | self.received.own.get(client, {})
        new = {key: value for key, value in row.items() if had.get(key) != marks[key]}
        self._own[client].update(marks)
        if lasting := {key: mark for key, mark in marks.items() if key.startswith(keys.MASKS)}:
            self.received.own[client] = self.received.own.get(client, {}) | lasting
        return communication.length(new, shared | row)


class _Reached:
    """Some clients that are sent tensors now. Most tensors have the same holders, which are joined with these clients once."""

    def __init__(self, clients: Ints) -> None:
        self.clients = clients  # (K,) sorted
        self._joined: dict[int, tuple[Ints, Ints, Ints]] = {}  # by the identity of holders: these, those with the clients, who is new

    def of(self, sent: list[Sent], value: Tensor, mask: Tensor | None) -> Ints:
        """(K,) 1 for each client that has not received this very tensor under this very mask in this round, and holds it from now on."""
        place = next((i for i, (before, under_mask, _) in enumerate(sent) if before is value and under_mask is mask), None)
        old = NOBODY if place is None else sent[place][2]
        if id(old) not in self._joined:
            holders = np.union1d(old, self.clients) if len(old) else self.clients
            self._joined[id(old)] = old, holders, 1 - np.isin(self.clients, old).astype(np.int64)
        _, holders, new = self._joined[id(old)]
        if place is None:
            sent.append((value, mask, holders))
        else:
            sent[place] = value, mask, holders
        return new


def _shared(costs: Sequence[ClientCosts]) -> tuple[list[ClientCosts], Ints]:
    """The different objects among them, and (K,) which of them each is."""
    runs = {id(cost): cost for cost in costs}
    places = {mark: i for i, mark in enumerate(runs)}
    return list(runs.values()), np.array([places[id(cost)] for cost in costs], np.int64)


def _own_price(arrived: dict[str, int], mask: str, size: int) -> int:
    """Bytes of a weight under a mask of the client's own."""
    name = mask.removeprefix(keys.MASKS)
    return profile.VALUE_BYTES * arrived[name] if name in arrived else size
