"""One client of a pack after the other, in buffers that are laid out once and overwritten by every step; or without any step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from fedsim.core import masks, tree
from fedsim.core.tree import Tree
from fedsim.core.types import Batch
from fedsim.federated.protocol import ClientInput
from fedsim.fleet import checks
from fedsim.fleet.batches import Batches
from fedsim.fleet.charging.report_costs import charge_pack, charge_report
from fedsim.fleet.checks import finite, unchanged
from fedsim.fleet.messages import ErrorContext, Pack, PackResult, WorkerContext, WorkOrder
from fedsim.fleet.packing import batches, client_input, client_row


def carry_out(order: WorkOrder, pack: Pack, site: WorkerContext) -> PackResult:
    """The pack's answer, client by client."""
    return _carried_out(order, pack, site, idle=False)


def idle(order: WorkOrder, pack: Pack, site: WorkerContext, totals: bool = True) -> PackResult:
    """The answer of clients that begin and end their work but take no step: what it would cost, not what it would give.

    totals: whether they are summed, as a method needs them; without steps a work may come to numbers that no sum takes.
    """
    return _carried_out(order, pack, site, idle=True, totals=totals)


def _carried_out(order: WorkOrder, pack: Pack, site: WorkerContext, idle: bool, totals: bool = True) -> PackResult:
    answer = PackResult(order.sum())
    held = client_input(order, site, pack)
    buffers: Tree = {}
    runs = _Runs(order, site, pack, held, idle)
    bytes_up: int | None = None
    for i, client in enumerate(pack.clients):
        place = ErrorContext(order, site, [client])
        with place.reporting():
            one = _with_kept(order, client_row(held, i), pack.kept[i], place)
            state, answer.loss[client] = _work(order, runs, i, one, buffers, place)
            place.stage = "finish"
            report = checks.finish(order.work, order.net, one, state)
            if totals:
                answer.total.add({key: value[None] for key, value in report.total.items()}, [client], [int(one.n)])
            answer.clients.append(client)
            for where, held_back in ((answer.each, report.each), (answer.keep, report.keep)):
                where.update({client: tree.clone(held_back)} if held_back else {})
            if charge_pack(order):
                bytes_up = charge_report(answer, order, client, one, state, report.total | report.each, bytes_up)
    return answer


def _with_kept(order: WorkOrder, one: ClientInput, kept: Tree | None, place: ErrorContext) -> ClientInput:
    place.stage = "init_kept"
    return replace(one, kept=checks.init_kept(order.work, order.net, one) | (kept or {}))


class _Runs:
    """The batches of every feed, made for the whole pack when the first client gets there."""

    def __init__(self, order: WorkOrder, site: WorkerContext, pack: Pack, held: ClientInput, idle: bool) -> None:
        self.order, self.site, self.pack, self.idle = order, site, pack, idle
        self.rows = [held.steps[:, feed].argsort(descending=True, stable=True, dim=0).tolist() for feed in range(len(order.work.feeds))]
        self.made: dict[int, Batches] = {}
        self.numbers = torch.arange(int(held.steps.max()) + 1 if held.steps.numel() else 1, device=site.device)

    def alone(self, feed: int, i: int, key: Tensor) -> Iterator[tuple[int, Batch]]:
        if self.idle:
            return
        if feed not in self.made:
            self.made[feed] = batches(self.order, self.site, self.pack, feed, self.rows[feed])
        run, row = self.made[feed], self.rows[feed].index(i)
        for step in run.alone(row):
            yield step.t, Batch(step.x[0], step.y[0], None, self.numbers[step.t], self.numbers[run.steps[row]], feed, key)


def _work(order: WorkOrder, runs: _Runs, i: int, one: ClientInput, buffers: Tree, place: ErrorContext) -> tuple[Tree, float]:
    """The last state and the mean loss over all steps."""
    place.stage = "init_state"
    start = checks.init_state(order.work, order.net, one)
    masks.check(one.tree(start))
    state = _laid_out(start, buffers)
    losses: list[Tensor] = []
    for feed in range(len(order.work.feeds)):
        place.stage = f"begin {feed}"
        state = checks.begin_feed(order.work, order.net, one, state, feed)
        for t, batch in runs.alone(feed, i, one.key):
            place.stage = f"step {t}"
            state, loss = checks.step(order.work, order.net, one, state, batch)
            losses.append(loss)
            if state.keys() != start.keys():
                unchanged(start, state)
    unchanged(start, state)
    if not losses:
        return state, float("nan")
    every = torch.stack(losses)
    finite(every, place.clients, place)
    return state, float(every.mean())


def _laid_out(start: Tree, buffers: Tree) -> Tree:
    """A copy of `start` in the pack's buffers, so that a step may overwrite it."""
    for key, value in start.items():
        if key in buffers and buffers[key].shape == value.shape:
            buffers[key].copy_(value)
        else:
            buffers[key] = value.clone(memory_format=torch.contiguous_format)
    return {key: buffers[key] for key in start}
