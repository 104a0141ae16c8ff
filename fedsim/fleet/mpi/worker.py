"""A rank that trains: it waits for work orders, carries out its packs and answers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedsim.core import serialization
from fedsim.core.exact_sum import Sum
from fedsim.core.trace import span
from fedsim.core.tree import Tree
from fedsim.errors import ClientFault, Stopped
from fedsim.fleet import checks
from fedsim.fleet.local_fleet import Answers
from fedsim.fleet.messages import Pack, PackResult, WorkerContext, WorkOrder
from fedsim.fleet.mpi.communicator import FAULT_TAG, OWN_TAG, REPLY_TAG, ROWS_TAG, STOP_TAG, TOTAL_TAG, Communicator
from fedsim.fleet.mpi.device_transfer import DeviceTransfer, seen_as
from fedsim.fleet.mpi.parts import read_part
from fedsim.fleet.mpi.reply import Reply
from fedsim.fleet.mpi.schedule import children
from fedsim.fleet.mpi.tree_buffer import size_of, unflat
from fedsim.fleet.plan import Plan
from fedsim.fleet.registry import FLEETS


class Worker:
    """A rank that trains: it waits for orders, carries them out and answers, until an order ends it."""

    def __init__(self, site: WorkerContext, link: Communicator) -> None:
        self.link = link
        self.answers: Answers | None = None
        self._flag = site.stopped
        self.site = replace(site, stopped=self._stopped, rank=link.comm.rank)

    def serve(self) -> tuple[int, str]:
        """Answers orders until the last; the exit code and the message of rank 0."""
        while True:
            with span("wait for an order"):
                header, mine = self.link.receive_order()
            if header["do"] == "end":
                self._read_stops(header["stops"])
                return int(header["code"]), str(header["message"])
            if header["do"] == "plan":
                plan = Plan.of(header["plan"])
                self.answers, self.site = FLEETS[plan.fleet].answers, plan.apply(self.site)
                self.link.transfer = DeviceTransfer.of(self.site.device, header["cuda_aware_mpi"])
            else:
                transfer = self.link.transfer
                with span("receive the model"):
                    shared = unflat(header["shared"], transfer.incoming(self.link.broadcast(None, transfer)), self.site.device)
                if mine.nbytes:
                    self._run(header, mine, shared)

    def _stopped(self) -> bool:
        return self._flag() or self.link.comm.Iprobe(source=0, tag=STOP_TAG)

    def _read_stops(self, sent: int) -> None:
        """Reads what rank 0 has sent to stop this rank, lest it stops another run."""
        while self.link.stops < sent:
            self.link.receive(0, STOP_TAG)
            self.link.stops += 1

    def _run(self, header: dict[str, Any], mine: NDArray[np.uint8], shared: Tree) -> None:
        kept = {group: torch.tensor(index, device=self.site.device) for group, index in header["kept"].items()}
        net = self.site.net.cut(kept) if kept else self.site.net
        order = WorkOrder(serialization.load(header["work"], {}), net, shared, header["r"], header["n"])
        with span("receive packs"):
            packs = self._packs(mine, 1 + len(order.work.feeds))
        answer, ending = self._answer(order, packs)
        if isinstance(ending, str):
            self.link.send({0: np.frombuffer(ending.encode(), np.uint8)}, FAULT_TAG)
        else:
            self.reply(answer, header["ranks"], ending)

    def _packs(self, mine: NDArray[np.uint8], counts: int) -> list[Pack]:
        """This rank's packs, by its part of the order; counts: numbers of earlier calls that each client has."""
        cohorts, headers = read_part(mine)
        private = any("own" in pack or "kept" in pack for pack in headers)
        buffer, packs, begin = self.link.receive(0, OWN_TAG) if private else np.zeros(0, np.uint8), [], 0
        for clients, pack in zip(cohorts, headers, strict=True):
            held, parts = pack.get("kept") or [None] * len(clients), []
            for rows in (pack.get("own", []), *(kept or [] for kept in held)):
                end = begin + size_of(rows)
                parts.append(unflat(rows, buffer[begin:end], self.site.device) if rows else {})
                begin = end
            kept = [None if rows is None else part for rows, part in zip(held, parts[1:], strict=True)]
            packs.append(Pack(clients, parts[0], kept, pack.get("calls") or [[0] * len(clients)] * counts))
        return packs

    def _answer(self, order: WorkOrder, packs: list[Pack]) -> tuple[PackResult, bool | str]:
        """The answer to all packs, and whether it was stopped before the last; or what went wrong."""
        answer = PackResult(Sum(order.shared, order.n))
        assert self.answers is not None, "rank 0 sends the plan first"
        try:
            with torch.no_grad():
                for part in checks.drawing_by_keys(self.answers(order, packs, self.site), order, packs, self.site):
                    answer.merge(part)
        except Stopped:
            return answer, True
        except ClientFault as fault:
            return answer, str(fault)
        except Exception as error:
            return answer, f"[rank {self.link.comm.rank}, round {order.r}] {type(error).__name__}: {error}"
        return answer, False

    def reply(self, answer: PackResult, ranks: int, stopped: bool) -> None:
        """Answers rank 0, through the rank's parent and with what its children answer; the totals follow. Among ranks 0 … `ranks`."""
        reply, rows = Reply.of(answer, self.link.rank, stopped)
        whose = []
        with span("wait for the others"):
            for rank in children(self.link.rank, ranks):
                buffer = self.link.receive(rank, REPLY_TAG)
                other = Reply.read(buffer)
                whose += [rank] if other.complete else []
                reply.join(other, buffer.nbytes)
        with span("reply"):
            self.link.send({self.link.parent: reply.coded()}, REPLY_TAG)
            self.link.send({} if rows is None else {0: rows}, ROWS_TAG)
        with span("reduce"):
            total = self.link.add(self.link.transfer.outgoing_sum(answer.total) if reply.complete else None, whose)
            self.link.send({} if total is None else {self.link.parent: seen_as(total, "uint8")}, TOTAL_TAG)
