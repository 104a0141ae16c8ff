"""Ranks: rank 0 asks, the others answer. The only room that knows MPI.

An order is a header (JSON bytes) and the shared tree as one buffer, both handed on from rank to rank along a binomial tree, and to
each rank what is its clients' own or kept. Packs are dealt once, whole, to ranks. Every rank answers with a header and one buffer of
rows; the totals, int64 partial sums as one flat buffer, are added in pairs along the same tree. So a run of a work costs rank 0 four
small messages a rank and three of the model's size each time the ranks double, whatever the cohort. Nothing is pickled. A rank that
waits asks and sleeps, so that it burns no core.
"""

from __future__ import annotations

import json
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from mpi4py import MPI

from fedsim import plain
from fedsim.exact import Sum
from fedsim.fault import ClientFault, Stopped
from fedsim.fleet import graphed, packed, serial
from fedsim.fleet.account import Account
from fedsim.fleet.flat import flat, layout, size_of, unflat
from fedsim.fleet.hands import branches, deal
from fedsim.fleet.local import Answers, LocalFleet, in_turn
from fedsim.fleet.order import Answer, Order, Pack, Site, steps
from fedsim.fleet.passage import Buffer, Passage, bytes_of, seen_as
from fedsim.kernels.choice import read
from fedsim.precision import settle
from fedsim.tree import Tree

OWN, REPLY, ROWS, GO, STOP, TOTAL, SHARED = range(1, 8)  # tags
HOST = Passage()
SHORT, LONG = 50e-6, 2e-3  # seconds between two looks at a request
TEXT = 4096  # bytes of an error that is told at the start

ENGINES: dict[str, Answers] = {"serial": in_turn(serial.carry_out), "packed": in_turn(packed.carry_out), "graphed": graphed.answers}


@dataclass
class Link:
    """A communicator whose waiting does not burn a core."""

    comm: MPI.Intracomm
    clock: Callable[[], float]
    sleep: Callable[[float], None]
    messages: int = 0  # sent and received by this rank
    bytes: int = 0  # of them
    others: int = 0  # bytes that passed between other ranks on rank 0's behalf, as rank 0 knows
    passage: Passage = field(default_factory=Passage)  # of models and totals

    def until(self, done: Callable[[], Any], asked: Callable[[], None] = lambda: None) -> Any:
        """Asks until `done` answers, ever more seldom: no wait is overslept by more than a fiftieth."""
        begin = self.clock()
        while not (answer := done()):
            asked()
            self.sleep(min(LONG, max(SHORT, (self.clock() - begin) / 50)))
        return answer

    def wait(self, request: MPI.Request, *buffers: np.ndarray | None) -> None:
        """Until the request is done; it is given its buffers, which must live that long."""
        self.until(request.Test)

    def total(self, mine: Buffer, ranks: int) -> Buffer:
        """The int64 sum over ranks 0 … `ranks`, on rank 0: pairs add, then pairs of pairs.

        MPI's own reduction comes in many small pieces, each of which would wait for the next look.
        """
        step, heard = 1, 0
        while step <= ranks:
            if self.rank & step:
                self.send({self.rank - step: seen_as(mine, "uint8")}, TOTAL)
                break
            if self.rank + step <= ranks:
                mine = mine + seen_as(self.receive(self.rank + step, TOTAL, self.passage), "int64")
                heard += 1
            step *= 2
        self.others += mine.nbytes * (ranks - heard)
        return mine

    def order(self, header: dict[str, Any]) -> None:
        """Sends every rank what to do: {"do": "plan" | "run" | "end", …}."""
        self.share(coded(header))

    def share(self, buffer: Buffer | None, passage: Passage = HOST) -> Buffer:
        """The root's bytes, on every rank: each hands them on to its branches.

        MPI's own broadcast must be told the size first, and sends long buffers along a chain of ranks in pieces, each of which
        would wait for the next look of every rank on its way.
        """
        held = self.receive(self.rank & (self.rank - 1), SHARED, passage) if buffer is None else buffer
        below = branches(self.rank, self.ranks)
        self.send(dict.fromkeys(below, held), SHARED)
        self.others += held.nbytes * (self.ranks - 1 - len(below))
        return held

    def send(self, buffers: dict[int, Buffer], tag: int) -> None:
        """A buffer to each of some ranks, all under way together."""
        requests = [self.comm.Isend(buffer, dest=rank, tag=tag) for rank, buffer in buffers.items()]
        for request, buffer in zip(requests, buffers.values(), strict=True):
            self.wait(request, buffer)
            self._count(buffer)

    def receive(self, rank: int, tag: int, passage: Passage = HOST) -> Buffer:
        status = MPI.Status()
        self.until(lambda: self.comm.Iprobe(source=rank, tag=tag, status=status))
        buffer = passage.room(status.Get_count(MPI.BYTE))
        self.wait(self.comm.Irecv(buffer, source=rank, tag=tag), buffer)
        self._count(buffer)
        return buffer

    def _count(self, buffer: Buffer) -> None:
        self.messages += 1
        self.bytes += buffer.nbytes

    @property
    def moved(self) -> int:
        """Bytes between all ranks, on rank 0."""
        return self.bytes + self.others

    def told(self, mine: str) -> list[str]:
        """A text of every rank, on every rank; the first TEXT bytes of each."""
        row = np.zeros(TEXT, dtype=np.uint8)
        text = mine.encode()[:TEXT]
        row[: len(text)] = np.frombuffer(text, np.uint8)
        every = np.zeros((self.comm.size, TEXT), dtype=np.uint8)
        self.wait(self.comm.Iallgather(row, every), row, every)
        return [bytes(row).rstrip(b"\0").decode(errors="replace") for row in every]

    @property
    def rank(self) -> int:
        return self.comm.rank

    @property
    def ranks(self) -> int:
        return self.comm.size

    def node_rank(self) -> int:
        """This rank's number among those of its machine, for choosing an accelerator."""
        return self.comm.Split_type(MPI.COMM_TYPE_SHARED).rank

    def abort(self, code: int) -> None:
        """Ends every rank at once."""
        self.comm.Abort(code)


def link(clock: Callable[[], float], sleep: Callable[[float], None]) -> Link:
    return Link(MPI.COMM_WORLD, clock, sleep)


def coded(header: dict[str, Any]) -> np.ndarray:
    return np.frombuffer(json.dumps(header).encode(), np.uint8)


class MPIFleet(LocalFleet):
    """Rank 0's side: deals packs to the other ranks, and does what is `later` while they train."""

    name = "mpi"

    def __init__(self, site: Site, account: Account, packs: int, link: Link, kept: MutableMapping[int, Tree] | None = None) -> None:
        super().__init__(site, account, packs, link.clock, kept)
        self.link = link
        self._tasks: list[Callable[[], None]] = []

    def later(self, task: Callable[[], None]) -> None:
        self._tasks.append(task)

    def drain(self) -> None:
        """Does what is still to be done later."""
        while self._tasks:
            self._tasks.pop(0)()

    def _carried_out(self, order: Order, packs: list[Pack]) -> Answer:
        begin, before = self.link.clock(), self.link.moved
        ranks = min(self.link.comm.size - 1, len(packs))
        self._send(order, packs, ranks)
        sent, shared = self.link.clock(), self.link.moved
        self.drain()
        answer, shapes = self._collect(order, ranks)
        computed, collected = self.link.clock(), self.link.moved
        self._reduce(answer, shapes, ranks)
        self.timing["broadcast"] += sent - begin
        self.timing["compute"] += computed - sent
        self.timing["reduce"] += self.link.clock() - computed
        self.moved["broadcast"] += shared - before
        self.moved["reduce"] += self.link.moved - collected
        self.traffic = {"rank_bytes": self.link.moved, "root_bytes": self.link.bytes, "root_messages": self.link.messages}
        return answer

    def _send(self, order: Order, packs: list[Pack], ranks: int) -> None:
        weights = [sum(sum(steps(order, self.site, client)) for client in pack.clients) for pack in packs]
        hands = deal(packs, weights, ranks)
        work, tensors = plain.dump(order.work)
        if tensors:
            raise TypeError(
                f"{type(order.work).__name__} holds a tensor; a Work is a dataclass of plain numbers, tensors go into shared or own"
            )
        header = {"do": "run", "work": work, "r": order.r, "n": order.n, "shared": layout(order.shared), "ranks": ranks}
        header["kept"] = {group: index.tolist() for group, index in order.net.kept.items()}
        header["packs"] = [[_told(packs[index]) for index in hand] for hand in hands]
        self.link.order(header)
        self.link.share(self.link.passage.out(bytes_of(order.shared)))
        self.link.send({rank + 1: _private([packs[i] for i in hand]) for rank, hand in enumerate(hands)}, OWN)

    def _collect(self, order: Order, ranks: int) -> tuple[Answer, dict[str, list[int]]]:
        answer, stopping = Answer(Sum(order.shared, order.n)), False
        shapes: dict[str, list[int]] = {}
        status = MPI.Status()

        def arrived() -> bool:
            return self.link.comm.Iprobe(source=MPI.ANY_SOURCE, tag=REPLY, status=status)

        def stop() -> None:
            nonlocal stopping
            if self.site.stopped() and not stopping:
                stopping = True
                self.link.send({rank: np.zeros(1, np.uint8) for rank in range(1, ranks + 1)}, STOP)

        for _ in range(ranks):
            self.link.until(arrived, stop)
            header = self.hear(status.Get_source(), answer)
            stopping |= header["stopped"]
            shapes = header["total"] or shapes
        go = np.array([0 if stopping else 1], dtype=np.uint8)
        self.link.send(dict.fromkeys(range(1, ranks + 1), go), GO)
        if stopping:
            raise Stopped
        return answer, shapes

    def hear(self, rank: int, answer: Answer) -> dict[str, Any]:
        """The header of a rank's reply, whose rows are added to the answer."""
        header: dict[str, Any] = json.loads(self.link.receive(rank, REPLY).tobytes())
        if "fault" in header:
            raise ClientFault(header["fault"])
        _take(answer, header, self.link.receive(rank, ROWS))
        return header

    def _reduce(self, answer: Answer, shapes: dict[str, list[int]], ranks: int) -> None:
        size = sum(int(np.prod(shape)) for shape in shapes.values())
        passage = self.link.passage
        whole = self.link.total(passage.out(torch.zeros(size, dtype=torch.int64, device=self.site.device)), ranks)
        answer.total.take(shapes, passage.taken(whole), len(answer.each))


def _told(pack: Pack) -> dict[str, Any]:
    kept = [None if kept is None else layout(kept) for kept in pack.kept]
    return {"clients": pack.clients, "calls": pack.calls, "own": layout(pack.own), "kept": kept}


def _private(packs: list[Pack]) -> np.ndarray:
    parts = [flat(tree) for pack in packs for tree in (pack.own, *(kept or {} for kept in pack.kept))]
    return np.concatenate(parts)


def _take(answer: Answer, header: dict[str, Any], rows: np.ndarray) -> None:
    """Adds a rank's rows to the answer."""
    begin = 0
    for client, each, keep in zip(header["clients"], header["each"], header["keep"], strict=True):
        for where, held in ((answer.each, each), (answer.keep, keep)):
            end = begin + size_of(held)
            where[client] = unflat(held, rows[begin:end])
            begin = end
    for name in ("loss", "ones", "arrived", "open", "up"):
        getattr(answer, name).update({int(client): value for client, value in header[name].items()})


class Rank:
    """A rank that trains: it waits for orders, carries them out and answers, until it is told to end."""

    def __init__(self, site: Site, link: Link) -> None:
        self.link = link
        self.engine: Answers | None = None
        self._flag = site.stopped
        self.site = replace(site, stopped=self._stopped, rank=link.comm.rank)

    def serve(self) -> int:
        """Answers orders until the last; the exit code that rank 0 says then."""
        while True:
            header = json.loads(self.link.share(None).tobytes())
            if header["do"] == "end":
                return int(header["code"])
            if header["do"] == "plan":
                self.engine = ENGINES[header["fleet"]]
                self.site = replace(self.site, channels_last=header["channels_last"])
                settle(self.site.net, header["dtype"], self.site.device, header["stacked"])
                self.site.net.use(read(header["sparse"]))
                self.link.passage = Passage.of(self.site.device, header["cuda_mpi"])
            else:
                passage = self.link.passage
                self._run(header, unflat(header["shared"], passage.taken(self.link.share(None, passage)), self.site.device))

    def _stopped(self) -> bool:
        return self._flag() or self.link.comm.Iprobe(source=0, tag=STOP)

    def _run(self, header: dict[str, Any], shared: Tree) -> None:
        me = self.link.comm.rank
        if me > header["ranks"]:
            return
        kept = {group: torch.tensor(index, device=self.site.device) for group, index in header["kept"].items()}
        net = self.site.net.cut(kept) if kept else self.site.net
        order = Order(plain.load(header["work"], {}), net, shared, header["r"], header["n"])
        packs = self._packs(header["packs"][me - 1])
        answer, reply = self._answer(order, packs)
        self.reply(answer, reply)
        if self.link.receive(0, GO)[0]:
            self.link.total(self.link.passage.total(answer.total), header["ranks"])
        while self.link.comm.Iprobe(source=0, tag=STOP):
            self.link.receive(0, STOP)

    def _packs(self, told: list[dict[str, Any]]) -> list[Pack]:
        buffer, packs, begin = self.link.receive(0, OWN), [], 0
        for pack in told:
            parts = []
            for rows in (pack["own"], *(kept or [] for kept in pack["kept"])):
                end = begin + size_of(rows)
                parts.append(unflat(rows, buffer[begin:end], self.site.device))
                begin = end
            kept = [None if rows is None else part for rows, part in zip(pack["kept"], parts[1:], strict=True)]
            packs.append(Pack(pack["clients"], parts[0], kept, pack["calls"]))
        return packs

    def _answer(self, order: Order, packs: list[Pack]) -> tuple[Answer, dict[str, Any]]:
        answer = Answer(Sum(order.shared, order.n))
        assert self.engine is not None, "rank 0 tells the plan first"
        try:
            with torch.no_grad():
                for part in self.engine(order, packs, self.site):
                    answer.merge(part)
        except Stopped:
            return answer, {"stopped": True}
        except ClientFault as fault:
            return answer, {"fault": str(fault)}
        except Exception as error:
            return answer, {"fault": f"[rank {self.link.comm.rank}, round {order.r}] {type(error).__name__}: {error}"}
        return answer, {"stopped": False}

    def reply(self, answer: Answer, reply: dict[str, Any]) -> None:
        """Tells rank 0 what came of the packs; MPIFleet.hear reads it."""
        clients = list(answer.each)
        header = {"clients": clients, "each": [layout(answer.each[client]) for client in clients]}
        header |= {"keep": [layout(answer.keep[client]) for client in clients], "total": answer.total.layout()}
        header |= {"loss": answer.loss, "ones": answer.ones, "arrived": answer.arrived, "open": answer.open, "up": answer.up} | reply
        rows = [flat(tree) for client in clients for tree in (answer.each[client], answer.keep[client])]
        self.link.send({0: coded(header)}, REPLY)
        self.link.send({0: np.concatenate(rows) if rows else np.zeros(0, np.uint8)}, ROWS)
