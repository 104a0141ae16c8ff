"""A rank that trains: it waits for work orders, carries out its packs and answers."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from fedsim.core import serialization
from fedsim.core.exact_sum import Sum
from fedsim.core.trace import span
from fedsim.core.tree import Tree
from fedsim.errors import ClientFault, Stopped
from fedsim.fleet import checks
from fedsim.fleet.local_fleet import Answers
from fedsim.fleet.messages import Pack, PackResult, WorkerContext, WorkOrder
from fedsim.fleet.mpi.communicator import GO_TAG, OWN_TAG, REPLY_TAG, ROWS_TAG, STOP_TAG, Communicator, coded
from fedsim.fleet.mpi.device_transfer import DeviceTransfer
from fedsim.fleet.mpi.tree_buffer import flat, layout, size_of, unflat
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
                header = json.loads(self.link.broadcast(None).tobytes())
            if header["do"] == "end":
                return int(header["code"]), str(header["message"])
            if header["do"] == "plan":
                plan = Plan.of(header["plan"])
                self.answers, self.site = FLEETS[plan.fleet].answers, plan.apply(self.site)
                self.link.transfer = DeviceTransfer.of(self.site.device, header["cuda_aware_mpi"])
            else:
                transfer = self.link.transfer
                with span("receive the model"):
                    shared = unflat(header["shared"], transfer.incoming(self.link.broadcast(None, transfer)), self.site.device)
                self._run(header, shared)

    def _stopped(self) -> bool:
        return self._flag() or self.link.comm.Iprobe(source=0, tag=STOP_TAG)

    def _run(self, header: dict[str, Any], shared: Tree) -> None:
        me = self.link.comm.rank
        if me > header["ranks"]:
            return
        kept = {group: torch.tensor(index, device=self.site.device) for group, index in header["kept"].items()}
        net = self.site.net.cut(kept) if kept else self.site.net
        order = WorkOrder(serialization.load(header["work"], {}), net, shared, header["r"], header["n"])
        with span("receive packs"):
            packs = self._packs(header["packs"][me - 1])
        answer, reply = self._answer(order, packs)
        with span("reply"):
            self.reply(answer, reply)
        with span("wait for the others"):
            go = self.link.receive(0, GO_TAG)[0]
        if go:
            with span("reduce"):
                self.link.reduce(self.link.transfer.outgoing_sum(answer.total), header["ranks"])
        while self.link.comm.Iprobe(source=0, tag=STOP_TAG):
            self.link.receive(0, STOP_TAG)

    def _packs(self, headers: list[dict[str, Any]]) -> list[Pack]:
        buffer, packs, begin = self.link.receive(0, OWN_TAG), [], 0
        for pack in headers:
            parts = []
            for rows in (pack["own"], *(kept or [] for kept in pack["kept"])):
                end = begin + size_of(rows)
                parts.append(unflat(rows, buffer[begin:end], self.site.device))
                begin = end
            kept = [None if rows is None else part for rows, part in zip(pack["kept"], parts[1:], strict=True)]
            packs.append(Pack(pack["clients"], parts[0], kept, pack["calls"]))
        return packs

    def _answer(self, order: WorkOrder, packs: list[Pack]) -> tuple[PackResult, dict[str, Any]]:
        answer = PackResult(Sum(order.shared, order.n))
        assert self.answers is not None, "rank 0 sends the plan first"
        try:
            with torch.no_grad():
                for part in checks.drawing_by_keys(self.answers(order, packs, self.site), order, packs, self.site):
                    answer.merge(part)
        except Stopped:
            return answer, {"stopped": True}
        except ClientFault as fault:
            return answer, {"fault": str(fault)}
        except Exception as error:
            return answer, {"fault": f"[rank {self.link.comm.rank}, round {order.r}] {type(error).__name__}: {error}"}
        return answer, {"stopped": False}

    def reply(self, answer: PackResult, reply: dict[str, Any]) -> None:
        """Tells rank 0 what came of the packs; MPIFleet.hear reads it."""
        clients = list(answer.each)
        header = {"clients": clients, "each": [layout(answer.each[client]) for client in clients]}
        header |= {"keep": [layout(answer.keep[client]) for client in clients], "total": answer.total.layout()}
        header |= {"loss": answer.loss, "ones": answer.ones, "arrived": answer.arrived, "open": answer.open, "up": answer.up} | reply
        rows = [flat(tree) for client in clients for tree in (answer.each[client], answer.keep[client])]
        self.link.send({0: coded(header)}, REPLY_TAG)
        self.link.send({0: np.concatenate(rows) if rows else np.zeros(0, np.uint8)}, ROWS_TAG)
