"""What the clients of a round are charged: FLOPs, bytes up and down, memory. Rank 0 keeps it, from plain numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from zlib import crc32

import numpy as np
from torch import Tensor

from fedsim.core import keys
from fedsim.core.keys import SCAFFOLD_CONTROL
from fedsim.core.tree import Tree, under
from fedsim.core.types import Feed
from fedsim.costs import communication, profile
from fedsim.fleet.charging.pricing import ClientCosts, WorkPrices
from fedsim.fleet.client_images import Population, count_of
from fedsim.fleet.messages import PackResult, WorkOrder
from fedsim.fleet.received_masks import ReceivedMasks

__all__ = ["ClientCosts", "CostAccount"]


class CostAccount:
    """The bills of the round in progress."""

    def __init__(self, model_profile: profile.ModelProfile, population: Population, local: Feed, slots: int, pack: int = 1) -> None:
        self.model_profile, self.population = model_profile, population
        self.prices = WorkPrices(model_profile, population, local, slots, pack)
        self.deployed = 0  # FLOPs of this round that belong to no training: what clients do to get the model that they use
        self.bills: dict[int, ClientCosts] = {}
        self.received = ReceivedMasks()
        self._sent: dict[str, list[tuple[Tensor, Tensor | None, set[int]]]] = {}  # key -> tensors of this round, their masks, who has them
        self._own: dict[int, dict[str, int]] = {}  # client -> key -> checksum of what it was sent for itself in this round

    @property
    def executed(self) -> int:
        """Bytes, the most that a rank holds in a step of this round."""
        return max((bill.executed for bill in self.bills.values()), default=0)

    def open(self) -> None:
        self.bills = {}
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
    ) -> list[ClientCosts]:
        """Adds one run of a work to the bills, and returns what it costs each client; one that deploys a model counts by itself.

        down: (K,) bytes that each client was sent for it, where `deliver` was asked before. foreseen: costs of each client and the bytes
        that it sends, where these were found before it trained; they hold where training has changed neither.
        """
        if order.work.deployment_only:
            feeds = [(feed, count_of(self.population, feed, client)) for client in clients for feed in order.work.feeds]
            self.deployed += sum(self.prices.flops_of(feed, count, [order.net.used(order.shared)]) for feed, count in feeds)
            return [ClientCosts() for _ in clients]
        if down is None:
            down = self.deliver(order, clients, sent, answer.arrived)
        if foreseen and not (answer.ones or answer.open) and all(foreseen[client][1] == answer.up[client] for client in clients):
            costs = [foreseen[client][0] for client in clients]
        else:
            costs = self.prices.of(order, clients, answer)
        trains = any(feed.cost == "train" for feed in order.work.feeds)
        for client, run, size in zip(clients, costs, down.tolist(), strict=True):
            bill = self.bills.setdefault(client, ClientCosts())
            bill.bytes_down += size
            bill.bytes_up += answer.up[client]
            bill.add(run)
            if trains:
                bill.loss = answer.loss[client]
        return costs

    def deliver(self, order: WorkOrder, clients: Sequence[int], sent: Tree, arrived: dict[int, dict[str, int]]) -> np.ndarray:
        """(K,) bytes that reach each client, which holds them from now on; `arrived` counts the masks it has for itself."""
        own = [self._down_own(client, {key: value[i] for key, value in sent.items()}, order.shared) for i, client in enumerate(clients)]
        return self._down(order.shared, clients, arrived) + np.array(own, dtype=np.int64)

    def _down(self, shared: Tree, clients: Sequence[int], arrived: dict[int, dict[str, int]]) -> np.ndarray:
        """(K,) bytes of the broadcast that each client does not hold yet; `arrived` counts the masks it has for itself."""
        sizes = np.zeros(len(clients), dtype=np.int64)
        held = under(shared, keys.MASKS)
        for head in communication.heads({key: value for key, value in shared.items() if key not in held}, held):
            mask = keys.mask_of(head.key)
            holders = self._holders(head.key, shared[head.key], shared.get(mask))
            prices = [head.size] * len(clients)
            if arrived and head.key.startswith((keys.WEIGHTS, keys.OPTIMISER, keys.BUFFERS)):
                prices = [_own_price(arrived.get(client, {}), mask, head.size) for client in clients]
            sizes += np.array([0 if client in holders else price for client, price in zip(clients, prices, strict=True)])
            holders.update(clients)
        if held:
            self.received.version(held)
            controls = bool(under(shared, SCAFFOLD_CONTROL))
            sizes += np.array([self.received.price(client, controls) for client in clients])
        return sizes

    def _holders(self, key: str, value: Tensor, mask: Tensor | None) -> set[int]:
        """Who received this very tensor under this very mask in this round."""
        for before, under_mask, holders in self._sent.setdefault(key, []):
            if before is value and under_mask is mask:
                return holders
        self._sent[key].append((value, mask, set()))
        return self._sent[key][-1][2]

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


def _own_price(arrived: dict[str, int], mask: str, size: int) -> int:
    """Bytes of a weight under a mask of the client's own."""
    name = mask.removeprefix(keys.MASKS)
    return profile.VALUE_BYTES * arrived[name] if name in arrived else size
