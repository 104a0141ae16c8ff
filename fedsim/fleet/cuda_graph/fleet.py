"""Clients stacked as one program of fixed shapes, captured as a CUDA graph where there is CUDA.

Every step runs for all K clients of a pack, out of buffers that stay where they are: what the clients hold, their states, and which
images a step shows. The program is E steps long, as a rule a local epoch; a feed of S steps runs it as often as it takes, and other
packs and rounds run it again. Packs of other sizes have programs of their own: a cohort is cut into packs of at most two sizes, and
rows added to make them one would cost arithmetic in every step.

On the CPU the same programs run as they are written. All is enqueued for one pack before the answer of the pack before is looked at,
so the device does not wait for the host, nor the next pack for the sums of this one.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fedsim.core import masks, tree
from fedsim.core.tree import Tree
from fedsim.errors import ClientFault, Stopped
from fedsim.federated.protocol import ClientInput, Work
from fedsim.fleet import checks
from fedsim.fleet.charging.report_costs import charge_all, charge_pack
from fedsim.fleet.checks import finite
from fedsim.fleet.cuda_graph.buffers import form, remembered
from fedsim.fleet.cuda_graph.capture import Run, graph_capture
from fedsim.fleet.cuda_graph.device_data import Resident
from fedsim.fleet.cuda_graph.exact_sum import DeviceSum, find_units
from fedsim.fleet.cuda_graph.program import GraphedPack, has_rate
from fedsim.fleet.local_fleet import LocalFleet
from fedsim.fleet.messages import ErrorContext, Pack, PackResult, WorkerContext, WorkOrder
from fedsim.fleet.packed import by_client, finish_function, map_clients, overwrite, rows_of, split_by_kept
from fedsim.fleet.packing import client_input, client_row

GRAPHED_PACKS = 6  # works whose programs are kept ready
REPORTED = 1 << 28  # bytes of float64 totals that are made at once


@dataclass
class PendingPack:
    """A pack whose work is under way on the device."""

    pack: Pack
    place: ErrorContext
    done: Run
    losses: list[Tensor]  # of each feed (S, K), on the host once it is done
    tally: DeviceSum
    magnitudes: Tensor  # on the host once it is done
    host: ClientInput  # what the clients hold, numbers on the host
    answer: PackResult

    def wait(self) -> PackResult:
        """Waits for the answer, and checks it."""
        sums = torch.zeros(len(self.pack.clients), dtype=torch.float64)
        with self.place.reporting():
            self.done()
            for losses in self.losses:
                finite(losses, self.pack.clients, self.place)
                sums += losses.sum(0).double()
            self.place.stage = "finish"
            self.answer.total = self.tally.checked(self.magnitudes, self.pack.clients, self.host.n.tolist())
        self.answer.loss = dict(zip(self.pack.clients, (sums / self.host.steps.sum(1)).tolist(), strict=True))
        return self.answer


class Engine:
    """What is kept between packs and rounds on one device: resident images, and the graphed packs of recent works."""

    def __init__(self, device: str) -> None:
        self.capture = graph_capture(device)
        self.resident = Resident(device, self.capture)
        self.graphed: OrderedDict[object, tuple[Any, GraphedPack]] = OrderedDict()

    def begin(self, order: WorkOrder, pack: Pack, site: WorkerContext) -> list[PendingPack]:
        """Enqueues the pack's work, clients whose kept states are alike at once; out of memory: again without other packs' buffers."""
        try:
            return self._enqueued(order, pack, site)
        except ClientFault as fault:
            if not isinstance(fault.__cause__, torch.OutOfMemoryError) or not self.graphed:
                raise
        self.capture.event()()
        self.graphed.clear()
        self.capture.release()
        return self._enqueued(order, pack, site)

    def _enqueued(self, order: WorkOrder, pack: Pack, site: WorkerContext) -> list[PendingPack]:
        find_units(order)
        pure = replace(order, net=order.net.under_vmap())
        host, held = self._both(pure, replace(pack, kept=[]), site)
        with ErrorContext(order, site, pack.clients, "init_kept").reporting():
            fresh = map_clients(partial(checks.init_kept, order.work), pure, held)
        if not fresh and not any(pack.kept):
            return [self._begun(order, pure, pack, host, held, site)]
        return [self._begun(order, pure, part, *self._both(pure, part, site), site) for part in split_by_kept(pure, pack, site)]

    def _both(self, pure: WorkOrder, pack: Pack, site: WorkerContext) -> tuple[ClientInput, ClientInput]:
        """What the clients hold: its numbers on the host, and all of it on the device. The host waits for nothing here."""
        host = client_input(pure, replace(site, device="cpu"), pack)
        n, steps, key = (self.capture.to_device(value) for value in (host.n, host.steps, host.key))
        kept = tree.stack([kept or {} for kept in pack.kept]) if any(pack.kept) else {}
        return host, ClientInput(host.shared, pack.own, kept, n, steps, key)

    def _begun(
        self, order: WorkOrder, pure: WorkOrder, pack: Pack, host: ClientInput, held: ClientInput, site: WorkerContext
    ) -> PendingPack:
        place, answer = ErrorContext(order, site, pack.clients), PackResult(order.sum())
        with place.reporting():
            start = map_clients(partial(checks.init_state, order.work), pure, held)
            masks.check(client_row(held, 0).tree(tree.row(start, 0)))
            graphed = self._graphed_pack(order, pure, held, start, site)
            graphed.take(order, held, start)
            losses = [self._feed(pure, graphed, held, host, pack, site, feed, place) for feed in range(len(order.work.feeds))]
            place.stage = "finish"
            tally = DeviceSum(order)
            self._report(pure, graphed, held, pack, tally, answer)
            with self.capture.on_side_stream():
                magnitudes = self.capture.to_host(tally.magnitudes())
        return PendingPack(pack, place, self.capture.event(), losses, tally, magnitudes, host, answer)

    def _graphed_pack(self, order: WorkOrder, pure: WorkOrder, held: ClientInput, start: Tree, site: WorkerContext) -> GraphedPack:
        work = replace(order.work, lr=0.0) if has_rate(order.work) else order.work  # type: ignore[type-var]
        parts = tuple(form(part) for part in (held.shared, held.own, held.kept, start))
        how = order.net.compute_dtype, order.net.packed_convolution, site.channels_last, site.dtype
        key = (type(work).__module__, repr(work), id(order.net), len(held.n), parts, how)
        return remembered(self.graphed, key, lambda: (order.net, GraphedPack(pure, held, start)), GRAPHED_PACKS)[1]

    def _feed(
        self,
        pure: WorkOrder,
        graphed: GraphedPack,
        held: ClientInput,
        host: ClientInput,
        pack: Pack,
        site: WorkerContext,
        feed: int,
        place: ErrorContext,
    ) -> Tensor:
        """Runs a feed; its losses (S, K), on their way to the host."""
        place.stage, state = f"begin {feed}", graphed.state.tree
        if type(pure.work).begin_feed is not Work.begin_feed:
            overwrite(state, map_clients(lambda net, one, rows: checks.begin_feed(pure.work, net, one, rows, feed), pure, held, state))
        shown = self.resident.shown(pure, pack, site, feed, host.steps[:, feed])
        return self.capture.to_host(graphed.run(feed, shown, site, place, self.capture))

    def _report(self, pure: WorkOrder, graphed: GraphedPack, held: ClientInput, pack: Pack, tally: DeviceSum, answer: PackResult) -> None:
        """What the clients hand back, some of them at a time."""
        each_takes = 8 * sum(buffer.shape[1] for buffer in graphed.state.buffers.values()) or 1
        at_once = max(1, REPORTED // each_takes)
        for begin in range(0, len(pack.clients), at_once):
            rows = slice(begin, begin + at_once)
            some, state = rows_of(held, rows), {key: value[rows] for key, value in graphed.state.tree.items()}
            total, each, keep = map_clients(finish_function(pure), pure, some, state)
            with self.capture.on_side_stream(*total.values()):
                tally.add(total)
            clients = pack.clients[rows]
            answer.clients += clients
            answer.each |= by_client(clients, each)
            answer.keep |= by_client(clients, keep)
            if charge_pack(pure):
                charge_all(answer, pure, clients, some, state, total | each)

    def answers(self, order: WorkOrder, packs: Sequence[Pack], site: WorkerContext) -> Iterator[PackResult]:
        """The packs' answers in turn, each looked at when the next pack is under way. Raises Stopped when the site is asked to stop."""
        waiting: list[PendingPack] = []
        for pack in packs:
            if site.stopped():
                raise Stopped
            begun = self.begin(order, pack, site)
            yield from (each.wait() for each in waiting)
            waiting = begun
        yield from (each.wait() for each in waiting)


DEVICE_ENGINES: dict[str, Engine] = {}  # by device; what one keeps changes how soon an answer comes, never the answer


def engine(device: str) -> Engine:
    """The engine of a device in this process."""
    if device not in DEVICE_ENGINES:
        DEVICE_ENGINES[device] = Engine(device)
    return DEVICE_ENGINES[device]


def forget() -> None:
    """Gives back all that engines keep."""
    DEVICE_ENGINES.clear()


def carry_out(order: WorkOrder, pack: Pack, site: WorkerContext) -> PackResult:
    """The pack's answer."""
    whole = PackResult(order.sum())
    for part in engine(site.device).answers(order, [pack], site):
        whole.merge(part)
    return whole


class CudaGraphFleet(LocalFleet):
    """Clients of a pack as one program."""

    name = "cuda_graph"
    carry_out = staticmethod(carry_out)

    @classmethod
    def answers(cls, order: WorkOrder, packs: Sequence[Pack], context: WorkerContext) -> Iterator[PackResult]:
        return engine(context.device).answers(order, packs, context)
