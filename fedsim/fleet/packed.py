"""Clients stacked: every step of the work runs once for all clients of a pack, by `torch.func.vmap`.

Shapes: K clients of the pack, A of them active at a step. Clients with more steps come first, so the pack narrows as they end
and a void step never reaches a state.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap

from fedsim import tree, wire
from fedsim.core import Batch, Sent
from fedsim.exact import Sum
from fedsim.fleet.batches import Step
from fedsim.fleet.local import LocalFleet
from fedsim.fleet.order import Answer, Order, Pack, Place, Site, batches, charged, finite, masks_of_one, row_of, sent
from fedsim.masks import ones
from fedsim.tree import Tree


def carry_out(order: Order, pack: Pack, site: Site) -> Answer:
    """The pack's answer, all clients at once."""
    order = replace(order, net=order.net.under_vmap())
    place = Place(order, site.rank, pack.clients)
    answer = Answer(Sum(order.shared, order.n))
    with place.told():
        held = _with_kept(order, pack, sent(order, site, pack), place)
        place.stage = "start"
        state = _laid_out(_mapped(order.work.start, order, held))
        losses = _losses(order, site, pack, held, state, place)
        place.stage = "finish"
        total, each, keep = _mapped(_finished(order), order, held, state)
        answer.total.add(total, pack.clients, held.n.tolist())
        for i, client in enumerate(pack.clients):
            answer.each[client], answer.keep[client] = tree.clone(tree.row(each, i)), tree.clone(tree.row(keep, i))
            answer.loss[client] = losses[i]
        if charged(order):
            _charge(answer, pack, held, state, total | each)
    return answer


def _mapped(function: Any, order: Order, held: Sent, *trees: Any) -> Any:
    """function(net, sent, *trees) for every client; outputs (K, …)."""

    def one(own: Tree, kept: Tree, n: Tensor, steps: Tensor, key: Tensor, *rows: Any) -> Any:
        return function(order.net, Sent(held.shared, own, kept, n, steps, key), *rows)

    return vmap(one)(held.own, held.kept, held.n, held.steps, held.key, *trees)


def _with_kept(order: Order, pack: Pack, held: Sent, place: Place) -> Sent:
    """Kept states stacked; clients never visited get their first one."""
    place.stage = "fresh"
    fresh = _mapped(order.work.fresh, order, held) if any(kept is None for kept in pack.kept) else {}
    rows = [tree.row(fresh, i) if kept is None else kept for i, kept in enumerate(pack.kept)]
    return replace(held, kept=tree.stack(rows))


def _laid_out(start: Tree) -> Tree:
    """Buffers of our own, (K, …): what vmap hands back may be one tensor shown K times."""
    return {key: value.clone(memory_format=torch.contiguous_format) for key, value in start.items()}


def _finished(order: Order) -> Any:
    def finish(net: Any, one: Sent, state: Tree) -> tuple[Tree, Tree, Tree]:
        report = order.work.finish(net, one, state)
        return report.total, report.each, report.keep

    return finish


def _losses(order: Order, site: Site, pack: Pack, held: Sent, state: Tree, place: Place) -> list[float]:
    """Runs every feed, overwriting `state`; the mean loss of each client (K,)."""
    sums = torch.zeros(len(pack.clients), dtype=torch.float64)
    for feed in range(len(order.work.feeds)):
        place.stage = f"begin {feed}"
        _keep(state, _mapped(lambda net, one, rows, feed=feed: order.work.begin(net, one, rows, feed), order, held, state))
        rows = held.steps[:, feed].argsort(dim=0, descending=True, stable=True).tolist()
        losses = _feed(order, site, pack, held, state, feed, rows, place)
        finite(losses, [pack.clients[i] for i in rows], place)
        sums[rows] += losses.sum(0).double().cpu()
    return (sums / held.steps.sum(1).cpu()).tolist()


def _feed(order: Order, site: Site, pack: Pack, held: Sent, state: Tree, feed: int, rows: list[int], place: Place) -> Tensor:
    """One feed, clients in the order of `rows`; losses (S, K), 0 where a client had ended."""
    run = batches(order, site, pack, feed, rows)
    ordered = rows == sorted(rows)
    inner = state if ordered else {key: value[rows] for key, value in state.items()}
    arranged = held if ordered else _taken(held, rows)
    numbers = torch.arange(run.steps[0] + 1, device=site.device)
    losses = torch.zeros(run.steps[0], len(rows), device=site.device)
    for step in run:
        place.stage = f"step {step.t}"
        narrow = {key: value[: step.active] for key, value in inner.items()}
        new, loss = _step(order, feed, step, _taken(arranged, slice(step.active)), narrow, numbers, arranged.steps[: step.active, feed])
        _keep(narrow, new)
        losses[step.t, : step.active] = loss
    if not ordered:
        for key, value in state.items():
            value[rows] = inner[key]
    return losses


def _taken(held: Sent, rows: Any) -> Sent:
    """Some clients' part of a packed Sent."""
    own, kept = ({key: value[rows] for key, value in part.items()} for part in (held.own, held.kept))
    return Sent(held.shared, own, kept, held.n[rows], held.steps[rows], held.key[rows])


def _step(order: Order, feed: int, step: Step, held: Sent, state: Tree, numbers: Tensor, last: Tensor) -> tuple[Tree, Tensor]:
    """One vmapped step; the new states and losses (A,)."""

    def one(net: Any, alone: Sent, rows: Tree, x: Tensor, y: Tensor, T: Tensor, *real: Tensor) -> tuple[Tree, Tensor]:
        return order.work.step(net, alone, rows, Batch(x, y, real[0] if real else None, numbers[step.t], T, feed))

    real = () if step.real is None else (step.real,)
    return _mapped(one, order, held, state, step.x, step.y, last, *real)


def _keep(state: Tree, new: Tree) -> None:
    """The new values in the old buffers; a step that wrote in place has nothing to copy."""
    for key, value in new.items():
        if value.data_ptr() != state[key].data_ptr():
            state[key].copy_(value)


def _charge(answer: Answer, pack: Pack, held: Sent, state: Tree, report: Tree) -> None:
    """Bytes up, and masks that a client has for itself."""
    private = masks_of_one(held.own, held.kept, state)
    for i, client in enumerate(pack.clients):
        if private or i == 0:
            seen = row_of(held, i).tree(tree.row(state, i))
            size = wire.length(tree.row(report, i), seen)
        if private:
            answer.ones[client] = ones(seen)
        answer.up[client] = size


class PackedFleet(LocalFleet):
    """Clients of a pack at once."""

    name = "packed"
    carry_out = staticmethod(carry_out)
