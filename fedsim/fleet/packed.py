"""Clients stacked: every step of the work runs once for all clients of a pack, by `torch.func.vmap`.

Shapes: K clients of the pack, A of them active at a step. Clients with more steps come first, so the pack narrows as they end
and a void step never reaches a state.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap

from fedsim.core import masks, tree
from fedsim.core.tree import Tree
from fedsim.core.types import Batch
from fedsim.federated.protocol import ClientInput, Work
from fedsim.fleet import checks
from fedsim.fleet.batches import Step
from fedsim.fleet.charging.report_costs import charge_all, charge_pack
from fedsim.fleet.checks import finite, unchanged
from fedsim.fleet.local_fleet import LocalFleet
from fedsim.fleet.messages import ErrorContext, Pack, PackResult, WorkerContext, WorkOrder
from fedsim.fleet.packing import batches, client_input, client_row


def carry_out(order: WorkOrder, pack: Pack, site: WorkerContext) -> PackResult:
    """The pack's answer, clients whose kept states are alike at once."""
    order = replace(order, net=order.net.under_vmap())
    answer, *others = [_stacked(order, part, site) for part in split_by_kept(order, pack, site)]
    for other in others:
        answer.merge(other)
    return answer


def split_by_kept(order: WorkOrder, pack: Pack, site: WorkerContext) -> list[Pack]:
    """The pack in parts whose kept states, first ones filled in, have the same keys, shapes and dtypes."""
    with ErrorContext(order, site, pack.clients, "init_kept").reporting():
        fresh = map_clients(partial(checks.init_kept, order.work), order, client_input(order, site, pack))
        if not fresh and not any(pack.kept):
            return [pack]
        rows = [tree.row(fresh, i) | (kept or {}) for i, kept in enumerate(pack.kept)]
    groups: dict[object, list[int]] = {}
    for i, kept in enumerate(rows):
        groups.setdefault(tuple((key, kept[key].shape, kept[key].dtype) for key in sorted(kept)), []).append(i)
    return [
        Pack(
            [pack.clients[i] for i in group],
            {key: value[group] for key, value in pack.own.items()} if len(group) < len(rows) else pack.own,
            [rows[i] for i in group],
            [[calls[i] for i in group] for calls in pack.calls],
        )
        for group in groups.values()
    ]


def _stacked(order: WorkOrder, pack: Pack, site: WorkerContext) -> PackResult:
    place = ErrorContext(order, site, pack.clients)
    answer = PackResult(order.sum())
    with place.reporting():
        held = replace(client_input(order, site, pack), kept=tree.stack([kept or {} for kept in pack.kept]))
        place.stage = "init_state"
        state = _laid_out(map_clients(partial(checks.init_state, order.work), order, held))
        masks.check(client_row(held, 0).tree(tree.row(state, 0)))
        losses = _losses(order, site, pack, held, state, place)
        place.stage = "finish"
        total, each, keep = map_clients(finish_function(order), order, held, state)
        answer.total.add(total, pack.clients, held.n.tolist())
        answer.loss = dict(zip(pack.clients, losses, strict=True))
        answer.clients = list(pack.clients)
        answer.each, answer.keep = by_client(pack.clients, each), by_client(pack.clients, keep)
        if charge_pack(order):
            charge_all(answer, order, pack.clients, held, state, total | each)
    return answer


def by_client(clients: list[int], rows: Tree) -> dict[int, Tree]:
    """Every client's row, a copy of its own: the stack is let go. Empty where there are none."""
    return {client: tree.clone(tree.row(rows, i)) for i, client in enumerate(clients)} if rows else {}


def map_clients(function: Any, order: WorkOrder, held: ClientInput, *trees: Any) -> Any:
    """function(net, sent, *trees) for every client; outputs (K, …)."""

    def one(own: Tree, kept: Tree, n: Tensor, steps: Tensor, key: Tensor, *rows: Any) -> Any:
        return function(order.net, ClientInput(held.shared, own, kept, n, steps, key), *rows)

    return vmap(one)(held.own, held.kept, held.n, held.steps, held.key, *trees)


def _laid_out(start: Tree) -> Tree:
    """Buffers of our own, (K, …): what vmap hands back may be one tensor shown K times."""
    return {key: value.clone(memory_format=torch.contiguous_format) for key, value in start.items()}


def finish_function(order: WorkOrder) -> Any:
    def finish(net: Any, one: ClientInput, state: Tree) -> tuple[Tree, Tree, Tree]:
        report = checks.finish(order.work, net, one, state)
        return report.total, report.each, report.keep

    return finish


def _losses(order: WorkOrder, site: WorkerContext, pack: Pack, held: ClientInput, state: Tree, place: ErrorContext) -> list[float]:
    """Runs every feed, overwriting `state`; the mean loss of each client (K,)."""
    sums = torch.zeros(len(pack.clients), dtype=torch.float64)
    for feed in range(len(order.work.feeds)):
        place.stage = f"begin {feed}"
        if type(order.work).begin_feed is not Work.begin_feed:
            overwrite(
                state,
                map_clients(lambda net, one, rows, feed=feed: checks.begin_feed(order.work, net, one, rows, feed), order, held, state),
            )
        rows = held.steps[:, feed].argsort(dim=0, descending=True, stable=True).tolist()
        losses = _feed(order, site, pack, held, state, feed, rows, place)
        finite(losses, [pack.clients[i] for i in rows], place)
        sums[rows] += losses.sum(0).double().cpu()
    return (sums / held.steps.sum(1).cpu()).tolist()


def _feed(
    order: WorkOrder, site: WorkerContext, pack: Pack, held: ClientInput, state: Tree, feed: int, rows: list[int], place: ErrorContext
) -> Tensor:
    """One feed, clients in the order of `rows`; losses (S, K), 0 where a client had ended."""
    run = batches(order, site, pack, feed, rows)
    ordered = rows == sorted(rows)
    inner = state if ordered else {key: value[rows] for key, value in state.items()}
    arranged = held if ordered else rows_of(held, rows)
    numbers = torch.arange(run.steps[0] + 1, device=site.device)
    losses = torch.zeros(run.steps[0], len(rows), device=site.device)
    for step in run:
        place.stage = f"step {step.t}"
        narrow, some = inner, arranged
        if step.active < len(rows):
            narrow, some = {key: value[: step.active] for key, value in inner.items()}, rows_of(arranged, slice(step.active))
        new, loss = _step(order, feed, step, some, narrow, numbers, some.steps[:, feed])
        overwrite(narrow, new)
        losses[step.t, : step.active] = loss
    if not ordered:
        for key, value in state.items():
            value[rows] = inner[key]
    return losses


def rows_of(held: ClientInput, rows: Any) -> ClientInput:
    """Some clients' part of a pack's input."""
    own, kept = ({key: value[rows] for key, value in part.items()} for part in (held.own, held.kept))
    return ClientInput(held.shared, own, kept, held.n[rows], held.steps[rows], held.key[rows])


def _step(order: WorkOrder, feed: int, step: Step, held: ClientInput, state: Tree, numbers: Tensor, last: Tensor) -> tuple[Tree, Tensor]:
    """One vmapped step; the new states and losses (A,)."""

    def one(net: Any, alone: ClientInput, rows: Tree, x: Tensor, y: Tensor, T: Tensor, *real: Tensor) -> tuple[Tree, Tensor]:
        return checks.step(order.work, net, alone, rows, Batch(x, y, real[0] if real else None, numbers[step.t], T, feed, alone.key))

    real = () if step.real is None else (step.real,)
    return map_clients(one, order, held, state, step.x, step.y, last, *real)


def overwrite(state: Tree, new: Tree) -> None:
    """The new values in the old buffers; a step that wrote in place has nothing to copy, one that exchanged tensors copies first."""
    unchanged(state, new)
    places = {value.data_ptr() for value in state.values()}
    moved = {key: value for key, value in new.items() if value.data_ptr() != state[key].data_ptr()}
    moved = {key: value.clone() if value.data_ptr() in places else value for key, value in moved.items()}
    for key, value in moved.items():
        state[key].copy_(value)


class PackedFleet(LocalFleet):
    """Clients of a pack at once."""

    name = "packed"
    carry_out = staticmethod(carry_out)
