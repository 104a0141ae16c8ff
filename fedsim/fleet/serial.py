"""The reference: one client after the other, in buffers that are laid out once and overwritten by every step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from fedsim import tree, wire
from fedsim.core import Batch, Report, Sent
from fedsim.exact import Sum
from fedsim.fleet.batches import Batches
from fedsim.fleet.local import LocalFleet
from fedsim.fleet.order import Answer, Order, Pack, Place, Site, batches, charged, finite, masks_of_one, row_of, sent
from fedsim.masks import ones
from fedsim.tree import Tree


def carry_out(order: Order, pack: Pack, site: Site) -> Answer:
    """The pack's answer, client by client."""
    return _carried_out(order, pack, site, idle=False)


def idle(order: Order, pack: Pack, site: Site) -> Answer:
    """The answer of clients that begin and end their work but take no step: what it would cost, not what it would give."""
    return _carried_out(order, pack, site, idle=True)


def _carried_out(order: Order, pack: Pack, site: Site, idle: bool) -> Answer:
    answer = Answer(Sum(order.shared, order.n))
    held = sent(order, site, pack)
    buffers: Tree = {}
    runs = _Runs(order, site, pack, held, idle)
    bytes_up: int | None = None
    for i, client in enumerate(pack.clients):
        place = Place(order, site.rank, [client])
        with place.told():
            one = _with_kept(order, row_of(held, i), pack.kept[i], place)
            state, answer.loss[client] = _work(order, runs, i, one, buffers, place)
            place.stage = "finish"
            report = order.work.finish(order.net, one, state)
            answer.total.add({key: value[None] for key, value in report.total.items()}, [client], [int(one.n)])
            answer.each[client], answer.keep[client] = tree.clone(report.each), tree.clone(report.keep)
            if charged(order):
                bytes_up = _charge(answer, client, one, state, report, bytes_up)
    return answer


def _charge(answer: Answer, client: int, one: Sent, state: Tree, report: Report, before: int | None) -> int:
    """Notes the client's bytes up, and its masks if it has some for itself; without them its bytes are those of the client before."""
    seen = one.tree(state)
    private = masks_of_one(one.own, one.kept, state)
    if private:
        answer.ones[client] = ones(seen)
    answer.up[client] = wire.length(report.total | report.each, seen) if before is None or private else before
    return answer.up[client]


def _with_kept(order: Order, one: Sent, kept: Tree | None, place: Place) -> Sent:
    place.stage = "fresh"
    return replace(one, kept=order.work.fresh(order.net, one) if kept is None else kept)


class _Runs:
    """The batches of every feed, made for the whole pack when the first client gets there."""

    def __init__(self, order: Order, site: Site, pack: Pack, held: Sent, idle: bool) -> None:
        self.order, self.site, self.pack, self.idle = order, site, pack, idle
        self.rows = [held.steps[:, feed].argsort(descending=True, stable=True, dim=0).tolist() for feed in range(len(order.work.feeds))]
        self.made: dict[int, Batches] = {}
        self.numbers = torch.arange(int(held.steps.max()) + 1 if held.steps.numel() else 1, device=site.device)

    def alone(self, feed: int, i: int) -> Iterator[tuple[int, Batch]]:
        if self.idle:
            return
        if feed not in self.made:
            self.made[feed] = batches(self.order, self.site, self.pack, feed, self.rows[feed])
        run, row = self.made[feed], self.rows[feed].index(i)
        for step in run.alone(row):
            yield step.t, Batch(step.x[0], step.y[0], None, self.numbers[step.t], self.numbers[run.steps[row]], feed)


def _work(order: Order, runs: _Runs, i: int, one: Sent, buffers: Tree, place: Place) -> tuple[Tree, float]:
    """The last state and the mean loss over all steps."""
    place.stage = "start"
    state = _laid_out(order.work.start(order.net, one), buffers)
    losses: list[Tensor] = []
    for feed in range(len(order.work.feeds)):
        place.stage = f"begin {feed}"
        state = order.work.begin(order.net, one, state, feed)
        for t, batch in runs.alone(feed, i):
            place.stage = f"step {t}"
            state, loss = order.work.step(order.net, one, state, batch)
            losses.append(loss)
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


class SerialFleet(LocalFleet):
    """Clients one after the other."""

    name = "serial"
    carry_out = staticmethod(carry_out)
