"""Programs of fixed shapes for the K clients of a pack: E steps of a feed, out of buffers that stay where they are.

A client that has ended, or a step beyond the last, is void: it is computed, and the state from before put back.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fedsim.core.tree import Tree
from fedsim.core.types import Batch
from fedsim.federated.protocol import ClientInput, Work
from fedsim.fleet import checks
from fedsim.fleet.cuda_graph.buffers import InputBuffers, StateBuffers, remembered
from fedsim.fleet.cuda_graph.capture import GraphCapture, Run
from fedsim.fleet.cuda_graph.device_data import BatchGather, FeedIndex
from fedsim.fleet.messages import ErrorContext, WorkerContext, WorkOrder
from fedsim.fleet.packed import map_clients, overwrite

LONGEST = 32  # steps of one program
PROGRAMS = 16  # of a graphed pack that are kept ready


def chunks(steps: int, even: bool) -> tuple[int, int]:
    """(E, how often): programs of E steps for a feed of `steps`. Even feeds are met exactly; uneven ones share few lengths."""
    fits = [e for e in range(min(steps, LONGEST), 7, -1) if steps % e == 0]
    if even and (steps <= LONGEST or fits):
        return (steps, 1) if steps <= LONGEST else (fits[0], steps // fits[0])
    often = -(-steps // LONGEST)
    each = -(-steps // often)
    return (each if each <= 8 else -(-each // 4) * 4), often


class PackProgram:
    """E steps of a feed for all clients of a graphed pack."""

    def __init__(self, graphed: GraphedPack, feed: int, shown: FeedIndex, length: int, site: WorkerContext, whole: bool) -> None:
        self.graphed, self.feed, self.length = graphed, feed, length
        self.whole = whole  # no step is void
        self.feeder = BatchGather(shown, length, site)
        self.t = torch.zeros((), dtype=torch.int64, device=site.device)
        self.losses = torch.zeros(length, len(shown.steps), device=site.device)
        self.place: ErrorContext | None = None
        self.begin = 0
        self._run: Run | None = None

    def run(self, begin: int, place: ErrorContext, capture: GraphCapture) -> None:
        """The E steps from `begin` on, which the counter says too."""
        self.place, self.begin = place, begin
        if self._run is None:
            before, at = self.graphed.state.copy(), self.t.clone()
            name = f"{type(self.graphed.order.work).__name__}, feed {self.feed}"
            self._run = capture.capture(name, self._steps, lambda: self._back(before, at))
        self._run()
        self.place = None

    def _back(self, before: list[Tensor], at: Tensor) -> None:
        self.graphed.state.put_back(before)
        self.t.copy_(at)

    def _steps(self) -> None:
        for i in range(self.length):
            if self.place:
                self.place.stage = f"step {self.begin + i}"
            self._step(i)

    def _step(self, i: int) -> None:
        state, batch = self.graphed.state, self.feeder.batch(i)
        last = self.graphed.held.sent.steps[:, self.feed]
        before = [] if self.whole else state.copy()
        new, loss = self.graphed.stepped(self.feed, *batch, self.t, last)
        overwrite(state.tree, new)
        if not self.whole:
            active = self.t < last
            state.keep_where(active, before)
            loss = torch.where(active, loss, 0.0)
        self.losses[i].copy_(loss)
        self.t.add_(1)


class GraphedPack:
    """K clients at fixed places for one work: what they hold, their states, and the programs made for them."""

    def __init__(self, order: WorkOrder, held: ClientInput, start: Tree) -> None:
        self.held, self.state = InputBuffers(held), StateBuffers(start)
        self.lr = torch.zeros((), dtype=_dtype(order), device=held.n.device)
        rate = {"lr": self.lr} if has_rate(order.work) else {}
        self.order = replace(order, work=replace(order.work, **rate) if rate else order.work, shared={})  # type: ignore[type-var]
        self.programs: OrderedDict[object, PackProgram] = OrderedDict()

    def take(self, order: WorkOrder, held: ClientInput, start: Tree) -> None:
        """Copies the next pack's inputs and initial states into the static buffers that the captured graph reads."""
        self.held.take(held)
        self.state.take(start)
        if has_rate(order.work):
            self.lr.fill_(order.work.lr)  # type: ignore[attr-defined]

    def stepped(self, feed: int, x: Tensor, y: Tensor, real: Tensor | None, t: Tensor, last: Tensor) -> tuple[Tree, Tensor]:
        """The new states and losses (K,) of a step."""

        def one(net: Any, alone: ClientInput, rows: Tree, x: Tensor, y: Tensor, T: Tensor, *real: Tensor) -> tuple[Tree, Tensor]:
            return checks.step(self.order.work, net, alone, rows, Batch(x, y, real[0] if real else None, t, T, feed, alone.key))

        return map_clients(one, self.order, self.held.sent, self.state.tree, x, y, last, *(() if real is None else (real,)))

    def run(self, feed: int, shown: FeedIndex, site: WorkerContext, place: ErrorContext, capture: GraphCapture) -> Tensor:
        """All steps of a feed; losses (S, K), 0 where a client had ended."""
        steps = max(shown.steps)
        losses = torch.zeros(steps, len(shown.steps), device=site.device)
        if not steps:
            return losses
        length, often = chunks(steps, even=not shown.ragged)
        program = self._program(feed, shown, length, site, whole=not shown.ragged and length * often == steps)
        program.t.zero_()
        for begin in range(0, steps, length):
            program.feeder.take(shown, begin)
            program.run(begin, place, capture)
            losses[begin : begin + length] = program.losses[: steps - begin]
        return losses

    def _program(self, feed: int, shown: FeedIndex, length: int, site: WorkerContext, whole: bool) -> PackProgram:
        images = shown.images.data_ptr(), shown.images.shape, shown.images.dtype
        key = (feed, length, shown.where.shape[2], whole, shown.real is None, shown.keys is None, images)
        return remembered(self.programs, key, lambda: PackProgram(self, feed, shown, length, site, whole), PROGRAMS)


def has_rate(work: Work) -> bool:
    """Whether the work has a learning rate. The graph reads it from a buffer, so that the rate of another round needs no new capture."""
    return isinstance(getattr(work, "lr", None), float)


def _dtype(order: WorkOrder) -> torch.dtype:
    return next(iter(order.net.initial.values())).dtype
