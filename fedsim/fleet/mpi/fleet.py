"""Ranks: rank 0 asks, the others answer. The only room that knows MPI.

An order is a header and what each rank's packs are; it goes from rank to rank along a binomial tree, and so does the shared tree, as one
buffer. What clients have of their own or keep goes to their rank alone. Packs are dealt once, whole, to ranks. Answers join along the
same tree: a few numbers for each client, and the totals, int64 partial sums as one flat buffer, which are added in pairs. So a run of a
work costs rank 0 two small messages and two of the model's size each time the ranks double. Only clients that report, own or keep much
cost it a message a rank. Nothing is pickled. A rank that waits asks and sleeps, so that it burns no core.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

import numpy as np
from mpi4py import MPI

from fedsim.core import serialization
from fedsim.core.exact_sum import Sum
from fedsim.core.trace import span
from fedsim.core.tree import Tree
from fedsim.errors import ClientFault, Stopped
from fedsim.fleet.accounting import CostAccount
from fedsim.fleet.local_fleet import LocalFleet
from fedsim.fleet.messages import PackResult, WorkerContext, WorkOrder
from fedsim.fleet.mpi.communicator import FAULT_TAG, OWN_TAG, REPLY_TAG, ROWS_TAG, STOP_TAG, Communicator
from fedsim.fleet.mpi.device_transfer import bytes_of
from fedsim.fleet.mpi.parts import parts_of
from fedsim.fleet.mpi.reply import Reply
from fedsim.fleet.mpi.schedule import children, deal
from fedsim.fleet.mpi.tree_buffer import flat, layout
from fedsim.fleet.packing import Ints, Packs, whole_steps
from fedsim.storage.places.beside import Task


class MPIFleet(LocalFleet):
    """Rank 0's side: deals packs to the other ranks, and collects what they answer."""

    name = "mpi"

    def __init__(
        self, site: WorkerContext, account: CostAccount, packs: int, link: Communicator, kept: MutableMapping[int, Tree] | None = None
    ) -> None:
        super().__init__(site, account, packs, link.clock, kept)
        self.link = link
        self._task: tuple[Task, Task | None] | None = None  # to be begun when the other ranks are at work

    def later(self, task: Task, then: Task | None = None) -> None:
        """As of every fleet, but it begins when the next order is sent: Python runs one thread at a time, and nobody works until then."""
        self._begin_task()
        self._task = task, then

    def drain(self) -> None:
        self._begin_task()
        super().drain()

    def _begin_task(self) -> None:
        if self._task is not None:
            (task, then), self._task = self._task, None
            super().later(task, then)

    def _carried_out(self, order: WorkOrder, packs: Packs) -> PackResult:
        begin, before = self.link.clock(), self.link.moved
        ranks = min(self.link.comm.size - 1, len(packs))
        with span("send"):
            self._send(order, packs, ranks)
        self._begin_task()
        sent, shared = self.link.clock(), self.link.moved
        with span("collect replies"):
            replies, stopping = self._collect(ranks)
        computed, collected = self.link.clock(), self.link.moved
        with span("reduce"):
            answer = self._joined(order, replies, ranks, stopping)
        self.timing["broadcast"] += sent - begin
        self.timing["compute"] += computed - sent
        self.timing["reduce"] += self.link.clock() - computed
        self.moved["broadcast"] += shared - before
        self.moved["reduce"] += self.link.moved - collected
        self.traffic = {"rank_bytes": self.link.moved, "rank0_bytes": self.link.bytes, "rank0_messages": self.link.messages}
        return answer

    def _send(self, order: WorkOrder, packs: Packs, ranks: int) -> None:
        header, hands = self.dealt(order, packs, ranks)
        private = {} if packs.plain else {rank: rows for rank, hand in enumerate(hands, 1) if (rows := _private(packs, hand)) is not None}
        self.link.send_order(header, parts_of(packs, hands))  # after the rows, which a disk may not give
        self.link.broadcast(self.link.transfer.outgoing(bytes_of(order.shared)), self.link.transfer)
        self.link.send(private, OWN_TAG)

    def dealt(self, order: WorkOrder, packs: Packs, ranks: int) -> tuple[dict[str, Any], list[Ints]]:
        """What all ranks are told of an order, and which packs each gets."""
        weights = np.add.reduceat(whole_steps(order, self.site, packs.ids), packs.cuts[:-1])
        work, tensors = serialization.dump(order.work)
        if tensors:
            raise TypeError(
                f"{type(order.work).__name__} holds a tensor; a Work is a dataclass of plain numbers, tensors go into shared or own"
            )
        header = {"do": "run", "work": work, "r": order.r, "n": order.n, "shared": layout(order.shared), "ranks": ranks}
        header["kept"] = {group: index.tolist() for group, index in order.net.kept.items()}
        return header, deal(weights, ranks)

    def _collect(self, ranks: int) -> tuple[list[tuple[int, Reply]], bool]:
        """The replies of the ranks that answer to rank 0, and through which all others do, and whether the run is to stop."""
        waiting, replies, stopping, status = set(children(0, ranks)), dict[int, Reply](), False, MPI.Status()

        def arrived() -> int:
            return status.Get_source() if self.link.comm.Iprobe(source=MPI.ANY_SOURCE, tag=REPLY_TAG, status=status) else 0

        def asked() -> None:
            nonlocal stopping
            if self.link.comm.Iprobe(source=MPI.ANY_SOURCE, tag=FAULT_TAG, status=status):
                raise ClientFault(self.link.receive(status.Get_source(), FAULT_TAG).tobytes().decode())
            if (self._beside.failed or self.site.stopped()) and not stopping:
                stopping = True
                self.link.send({rank: np.zeros(1, np.uint8) for rank in range(1, ranks + 1)}, STOP_TAG)
                self.link.stops += 1

        asked()
        while len(replies) < len(waiting):
            rank = self.link.until(arrived, asked, waiting - replies.keys(), REPLY_TAG)
            replies[rank] = Reply.read(self.link.receive(rank, REPLY_TAG))
        return [(rank, replies[rank]) for rank in sorted(replies)], stopping

    def _joined(self, order: WorkOrder, replies: list[tuple[int, Reply]], ranks: int, stopping: bool) -> PackResult:
        """One answer of all. Raises Stopped where a rank has not come to its end, or was to stop: everything under way is taken first."""
        (_, whole), *others = replies
        whose = [rank for rank, reply in replies if reply.complete]
        for _, other in others:
            whole.join(other, 0)
        self.link.others += whole.passed
        answer = PackResult(Sum(order.shared, order.n))
        with span("read replies"):
            whole.put_into(answer, lambda rank: self.link.receive(rank, ROWS_TAG))
        stopping |= whole.totals is None
        total = self.link.add(np.zeros(0, np.int64) if whole.complete and not stopping else None, whose)
        if stopping and self._beside.failed:
            self.drain()
        if stopping:
            raise Stopped
        if total is None or whole.totals is None:
            raise ValueError(whole.unlike)
        self.link.others += total.nbytes * (ranks - len(whose))
        answer.total.take(whole.totals, self.link.transfer.incoming(total), len(answer.clients))
        return answer


def _private(packs: Packs, hand: Ints) -> np.ndarray | None:
    """What the clients of a rank have of their own and what they keep, as one buffer; None where that is nothing."""
    mine = [packs[i] for i in hand.tolist()]
    trees = [tree for pack in mine for tree in (pack.own, *(kept for kept in pack.kept if kept)) if tree]
    return np.concatenate([flat(tree) for tree in trees]) if trees else None
