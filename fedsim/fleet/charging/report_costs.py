"""What the reports of a pack would cost on the air, noted where the clients are computed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fedsim.core import keys
from fedsim.core.keys import GATE, GATE_STEPS
from fedsim.core.masks import ones
from fedsim.core.tree import Tree, row, under
from fedsim.costs import communication
from fedsim.federated.client_work import Evaluate
from fedsim.federated.protocol import ClientInput
from fedsim.fleet.messages import Call, PackResult, WorkOrder
from fedsim.fleet.packing import client_row


def charge_pack(order: WorkOrder | Call) -> bool:
    """Whether the ledger sees the order: evaluation is the simulator's own."""
    return not isinstance(order.work, Evaluate)


def charge_all(answer: PackResult, order: WorkOrder, clients: Sequence[int], held: ClientInput, state: Tree, report: Tree) -> None:
    """`charge_report` for every client of a stacked pack; one without own masks or gates has the first one's."""
    before = charge_report(answer, order, clients[0], client_row(held, 0), row(state, 0), row(report, 0), None)
    own = {**held.own, **held.kept, **state}
    if not (client_masks(own) or GATE in own or GATE_STEPS in own or keys.SELECTED in report):
        answer.up.update(dict.fromkeys(clients, before))
        answer.open.update(dict.fromkeys(clients, answer.open[clients[0]]) if clients[0] in answer.open else {})
        return
    for i, client in enumerate(clients[1:], 1):
        before = charge_report(answer, order, client, client_row(held, i), row(state, i), row(report, i), before)


def client_masks(*trees: Tree) -> bool:
    """Whether a client has masks that the cohort does not share."""
    return any(key.startswith(keys.MASKS) for held in trees for key in held)


def charge_report(
    answer: PackResult, order: WorkOrder, client: int, one: ClientInput, state: Tree, report: Tree, before: int | None
) -> int:
    """Notes the client's bytes up, its hard gates, and its masks if it has some; without them its bytes are those of the client before.

    `report` is all that reaches the server; a mask in it is priced against the one that the client arrived with, also where it is
    a number in a sum.
    """
    report = report | {key: mask != 0 for key, mask in under(report, keys.MASKS).items()}
    seen, private = one.tree(state), client_masks(one.own, one.kept, state)
    if private:
        answer.arrived[client] = ones(one.own | one.kept)
        answer.ones[client] = ones(seen)
    if (gates := _hard(seen)) is not None:
        answer.open[client] = order.net.channels.open(gates)
    if small := _open_alone(order, seen):
        answer.arrived[client] = answer.arrived.get(client, {}) | ones(small)
    if before is None or private or order.work.compact or keys.SELECTED in report:
        travels = report if bool(report.get(keys.SELECTED, True)) else {}
        before = communication.length(travels, {**seen, **small}, under(one.tree({}), keys.MASKS))
    answer.up[client] = before
    return before


def _open_alone(order: WorkOrder, seen: Tree) -> Tree:
    """Under a mask's key, which entries of each tensor belong to open channels, where a work exchanges these alone."""
    if not (order.work.compact and GATE in seen):
        return {}
    cover = order.net.channels.cover(under(seen, keys.WEIGHTS, keys.BUFFERS), seen[GATE])
    return {keys.mask_of(key): entries for key, entries in cover.items() if not bool(entries.all())}


def _hard(held: Tree) -> Tensor | None:
    """(S, n) the hard gates of all steps, or the one for all of them."""
    gates = held[GATE_STEPS] if GATE_STEPS in held else held[GATE][None] if GATE in held else None
    return gates if gates is not None and gates.dtype == torch.bool else None
