"""What a call would cost each client, before anyone trains."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fedsim.core import keys
from fedsim.devices.clock import Need
from fedsim.fleet.charging.pricing import ClientCosts
from fedsim.fleet.local_fleet import LocalFleet
from fedsim.fleet.messages import Call, Pack, PackResult, WorkOrder, smaller_batches
from fedsim.fleet.one_by_one import idle
from fedsim.fleet.packing import KeptStates, held

OWN = (keys.MASKS, keys.GATE, keys.GATE_STEPS)  # keys of what makes the model of a client its own


@dataclass(frozen=True)
class Preview:
    """The costs of a call for its clients; training may change what some of them send."""

    costs: list[ClientCosts]
    up: list[int]  # bytes
    arrived: dict[int, dict[str, int]]  # weights under the masks that a client has for itself

    def memory(self) -> np.ndarray:
        """(K,) bytes that each client needs."""
        return np.array([cost.memory for cost in self.costs], float)

    def needs(self, down: Sequence[int]) -> list[Need]:
        """What the clock reads, with the bytes that each is sent."""
        return needs(self.costs, down, self.up)


def needs(costs: Sequence[ClientCosts], down: Sequence[int], up: Sequence[int]) -> list[Need]:
    """What the clock reads of some clients."""
    rows = zip(costs, down, up, strict=True)
    return [Need(cost.dense_equivalent, cost.steps, int(to), int(back), cost.memory) for cost, to, back in rows]


def preview(fleet: LocalFleet, call: Call, halvings: int = 0) -> Preview:
    """The costs of the call. One client stands for all whose models and kept states are alike."""
    order = fleet.order(call)
    order = WorkOrder(smaller_batches(order.work, halvings), order.net, order.shared, order.r, order.n)
    answer = PackResult(order.sum())
    with torch.no_grad():
        for group in _alike(fleet, call):
            _add(answer, idle(order, _pack(fleet, call, group), fleet.site, totals=False), group)
    return Preview(fleet.account.prices.of(order, call.clients, answer), [answer.up[client] for client in call.clients], answer.arrived)


def _alike(fleet: LocalFleet, call: Call) -> list[list[int]]:
    """The clients in groups that cost alike but for their images: by whether they keep something; one by one where models are their own."""
    visited = [client for client in call.clients if client in fleet.kept]
    if call.own or (visited and any(key.startswith(OWN) for key in held(fleet.kept, visited[0]) or ())):
        return [[client] for client in call.clients]
    fresh = [client for client in call.clients if client not in fleet.kept]
    return [group for group in (fresh, visited) if group]


def _pack(fleet: LocalFleet, call: Call, group: list[int]) -> Pack:
    """The first client of the group."""
    first, calls = group[:1], [[0]] * (1 + len(call.work.feeds))
    return Pack(first, call.of(first).own, KeptStates(fleet.kept, first), calls)


def _add(answer: PackResult, found: PackResult, group: list[int]) -> None:
    """What the first client of the group came to, for all of it."""
    first = group[0]
    for name in ("each", "keep", "ones", "arrived", "open", "up"):
        rows = getattr(found, name)
        if first in rows:
            getattr(answer, name).update(dict.fromkeys(group, rows[first]))
