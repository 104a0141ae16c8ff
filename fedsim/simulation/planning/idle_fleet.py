"""Fleets whose clients begin and end their work but take no step: what a run costs, without what it gives."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from fedsim.core import keys
from fedsim.core.exact_sum import Sum
from fedsim.core.tree import Tree
from fedsim.fleet.local_fleet import LocalFleet
from fedsim.fleet.messages import Call, Pack, PackResult, WorkerContext, WorkOrder
from fedsim.fleet.one_by_one import idle
from fedsim.fleet.packing import KeptStates
from fedsim.simulation.experiment import Experiment


class IdleFleet(LocalFleet):
    """Clients that take no step."""

    name = "idle"

    @staticmethod
    def carry_out(order: WorkOrder, pack: Pack, site: WorkerContext) -> PackResult:
        return idle(order, pack, site)


class FloatSum(Sum):
    """Totals in float64, which nobody reads to the last bit; no kernel is compiled or loaded for them."""

    def add(self, rows: Tree, clients: Sequence[int], n: Sequence[int]) -> None:
        for key, values in rows.items():
            self.parts[key] = self.parts[key] + values.sum(0) if key in self.parts else values.sum(0)

    def value(self) -> Tree:
        return self.parts


class OneForAllFleet(IdleFleet):
    """Clients that take no step, of which one does the work for all that are alike but for their images.

    A total is so many times what this client adds to it: means are right, numbers of images are not.
    """

    name = "one for all"

    @staticmethod
    def carry_out(order: WorkOrder, pack: Pack, site: WorkerContext) -> PackResult:
        whole = PackResult(order.sum())
        for rows in _alike(pack):
            whole.merge(_of_alike(order, pack, rows, site))
        return whole

    def order(self, call: Call) -> WorkOrder:
        return replace(super().order(call), sums=FloatSum)

    def idle_first(self, call: Call) -> PackResult:
        """What the first client of a call comes to; no total is summed."""
        first = call.of(call.clients[:1])
        kept = KeptStates(self.kept, first.clients)
        with torch.no_grad():
            return idle(self.order(call), Pack(first.clients, {}, kept, [[0]] * (1 + len(call.work.feeds))), self.site, totals=False)

    def charge_again(self, call: Call, known: PackResult) -> None:
        """Charges the clients of a call what an earlier client of the same call came to."""
        order, first = self.order(call), known.clients[0]
        answer = PackResult(order.sum())
        _spread(known, answer, first, call.clients)
        self.account.charge(order, call.clients, {}, answer)


def idle_fleet(parts: Experiment) -> IdleFleet:
    """A fleet for the job whose clients take no step."""
    return IdleFleet(parts.site, parts.account(), 1, time.perf_counter)


def _alike(pack: Pack) -> Iterator[list[int]]:
    """The rows of a pack in groups of clients that hold the same but for their images: one by one where something is a client's own."""
    if pack.own:
        yield from ([i] for i in range(len(pack.clients)))
        return
    groups: dict[object, list[int]] = {}
    for i in range(len(pack.clients)):
        groups.setdefault(_form(pack.kept[i]), []).append(i)
    yield from groups.values()


def _form(kept: Tree | None) -> object:
    return None if kept is None else tuple((key, kept[key].shape, kept[key].dtype) for key in sorted(kept))


def _of_alike(order: WorkOrder, pack: Pack, rows: list[int], site: WorkerContext) -> PackResult:
    """The answer of the clients in some rows, by the first of them where its costs are those of all."""
    found = idle(order, _some(pack, rows[:1]), site)
    if len(rows) == 1:
        return found
    first = found.clients[0]
    if found.ones or found.open or order.work.compact or keys.SELECTED in found.each.get(first, {}):
        found.merge(idle(order, _some(pack, rows[1:]), site))
        return found
    found.total.parts = {key: part * len(rows) for key, part in found.total.parts.items()}
    answer = PackResult(found.total)
    _spread(found, answer, first, [pack.clients[i] for i in rows])
    return answer


def _some(pack: Pack, rows: list[int]) -> Pack:
    kept = pack.kept
    mine: list[Tree | None] | KeptStates = [kept[i] for i in rows]
    own = {key: value[rows] for key, value in pack.own.items()}
    return Pack([pack.clients[i] for i in rows], own, mine, [[calls[i] for i in rows] for calls in pack.calls])


def _spread(found: PackResult, answer: PackResult, first: int, clients: list[int]) -> None:
    """Gives all clients what the first one reports, keeps and sends."""
    answer.clients += clients
    answer.loss.update(dict.fromkeys(clients, float("nan")))
    for name in ("each", "keep", "up", "arrived"):
        if first in (rows := getattr(found, name)):
            getattr(answer, name).update(dict.fromkeys(clients, rows[first]))
