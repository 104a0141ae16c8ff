"""Ranks: rank 0 asks, the others answer. The only room that knows MPI.

An order is a header (JSON bytes) and the shared tree as one buffer, both handed on from rank to rank along a binomial tree, and to
each rank what is its clients' own or kept. Packs are dealt once, whole, to ranks. Every rank answers with a header and one buffer of
rows; the totals, int64 partial sums as one flat buffer, are added in pairs along the same tree. So a run of a work costs rank 0 four
small messages a rank and three of the model's size each time the ranks double, whatever the cohort. Nothing is pickled. A rank that
waits asks and sleeps, so that it burns no core.
"""

from __future__ import annotations

import json
from collections.abc import MutableMapping
from typing import Any

import numpy as np
import torch
from mpi4py import MPI

from fedsim.core import serialization
from fedsim.core.exact_sum import Sum
from fedsim.core.trace import span
from fedsim.core.tree import Tree
from fedsim.errors import ClientFault, Stopped
from fedsim.fleet.accounting import CostAccount
from fedsim.fleet.local_fleet import LocalFleet
from fedsim.fleet.messages import Pack, PackResult, WorkerContext, WorkOrder
from fedsim.fleet.mpi.communicator import GO_TAG, OWN_TAG, REPLY_TAG, ROWS_TAG, STOP_TAG, Communicator
from fedsim.fleet.mpi.device_transfer import bytes_of
from fedsim.fleet.mpi.schedule import deal
from fedsim.fleet.mpi.tree_buffer import flat, layout, size_of, unflat
from fedsim.fleet.packing import steps

Layout = dict[str, list[int]]  # of totals: key -> shape, limbs first


class MPIFleet(LocalFleet):
    """Rank 0's side: deals packs to the other ranks, and collects what they answer."""

    name = "mpi"

    def __init__(
        self, site: WorkerContext, account: CostAccount, packs: int, link: Communicator, kept: MutableMapping[int, Tree] | None = None
    ) -> None:
        super().__init__(site, account, packs, link.clock, kept)
        self.link = link

    def _carried_out(self, order: WorkOrder, packs: list[Pack]) -> PackResult:
        begin, before = self.link.clock(), self.link.moved
        ranks = min(self.link.comm.size - 1, len(packs))
        with span("send"):
            self._send(order, packs, ranks)
        sent, shared = self.link.clock(), self.link.moved
        with span("collect replies"):
            answer, shapes = self._collect(order, ranks)
        computed, collected = self.link.clock(), self.link.moved
        with span("reduce"):
            self._reduce(answer, shapes, ranks)
        self.timing["broadcast"] += sent - begin
        self.timing["compute"] += computed - sent
        self.timing["reduce"] += self.link.clock() - computed
        self.moved["broadcast"] += shared - before
        self.moved["reduce"] += self.link.moved - collected
        self.traffic = {"rank_bytes": self.link.moved, "rank0_bytes": self.link.bytes, "rank0_messages": self.link.messages}
        return answer

    def _send(self, order: WorkOrder, packs: list[Pack], ranks: int) -> None:
        weights = [sum(sum(steps(order, self.site, client)) for client in pack.clients) for pack in packs]
        hands = deal(packs, weights, ranks)
        work, tensors = serialization.dump(order.work)
        if tensors:
            raise TypeError(
                f"{type(order.work).__name__} holds a tensor; a Work is a dataclass of plain numbers, tensors go into shared or own"
            )
        header = {"do": "run", "work": work, "r": order.r, "n": order.n, "shared": layout(order.shared), "ranks": ranks}
        header["kept"] = {group: index.tolist() for group, index in order.net.kept.items()}
        header["packs"] = [[_header(packs[index]) for index in hand] for hand in hands]
        private = {rank + 1: _private([packs[i] for i in hand]) for rank, hand in enumerate(hands)}  # first: a disk may not give it
        self.link.send_order(header)
        self.link.broadcast(self.link.transfer.outgoing(bytes_of(order.shared)))
        self.link.send(private, OWN_TAG)

    def _collect(self, order: WorkOrder, ranks: int) -> tuple[PackResult, Layout]:
        answer, stopping = PackResult(Sum(order.shared, order.n)), False
        shapes: Layout | None = None
        status = MPI.Status()

        def arrived() -> bool:
            return self.link.comm.Iprobe(source=MPI.ANY_SOURCE, tag=REPLY_TAG, status=status)

        def stop() -> None:
            nonlocal stopping
            if (self._beside.failed or self.site.stopped()) and not stopping:
                stopping = True
                self.link.send({rank: np.zeros(1, np.uint8) for rank in range(1, ranks + 1)}, STOP_TAG)

        stop()
        waiting = set(range(1, ranks + 1))
        while waiting:
            self.link.until(arrived, stop, waiting)
            header = self.hear(status.Get_source(), answer)
            waiting.discard(status.Get_source())
            stopping |= header["stopped"]
            shapes = _alike(shapes, header["total"]) if header["clients"] else shapes
        go = np.array([0 if stopping else 1], dtype=np.uint8)
        self.link.send(dict.fromkeys(range(1, ranks + 1), go), GO_TAG)
        if stopping:
            if self._beside.failed:
                self.drain()
            raise Stopped
        return answer, shapes or {}

    def hear(self, rank: int, answer: PackResult) -> dict[str, Any]:
        """The header of a rank's reply, whose rows are added to the answer."""
        header: dict[str, Any] = json.loads(self.link.receive(rank, REPLY_TAG).tobytes())
        if "fault" in header:
            raise ClientFault(header["fault"])
        with span("read a reply", rank=rank):
            _take(answer, header, self.link.receive(rank, ROWS_TAG))
        return header

    def _reduce(self, answer: PackResult, shapes: Layout, ranks: int) -> None:
        size = sum(int(np.prod(shape)) for shape in shapes.values())
        transfer = self.link.transfer
        whole = self.link.reduce(transfer.outgoing(torch.zeros(size, dtype=torch.int64, device=self.site.device)), ranks)
        answer.total.take(shapes, transfer.incoming(whole), len(answer.each))


def _alike(shapes: Layout | None, more: Layout) -> Layout:
    """The layout of the totals of all ranks; ValueError where those of two ranks cannot be added."""
    if shapes is not None and shapes != more:
        key = min(key for key in {*shapes, *more} if shapes.get(key) != more.get(key))
        both = " and ".join(sorted("nothing" if each is None else str(tuple(each[1:])) for each in (shapes.get(key), more.get(key))))
        raise ValueError(f"total {key!r} is {both} for two clients; all clients must report the same keys and shapes")
    return more


def _header(pack: Pack) -> dict[str, Any]:
    kept = [None if kept is None else layout(kept) for kept in pack.kept]
    return {"clients": pack.clients, "calls": pack.calls, "own": layout(pack.own), "kept": kept}


def _private(packs: list[Pack]) -> np.ndarray:
    parts = [flat(tree) for pack in packs for tree in (pack.own, *(kept or {} for kept in pack.kept))]
    return np.concatenate(parts)


def _take(answer: PackResult, header: dict[str, Any], rows: np.ndarray) -> None:
    """Adds a rank's rows to the answer."""
    begin = 0
    for client, each, keep in zip(header["clients"], header["each"], header["keep"], strict=True):
        for where, held in ((answer.each, each), (answer.keep, keep)):
            end = begin + size_of(held)
            where[client] = unflat(held, rows[begin:end])
            begin = end
    for name in ("loss", "ones", "arrived", "open", "up"):
        getattr(answer, name).update({int(client): value for client, value in header[name].items()})
